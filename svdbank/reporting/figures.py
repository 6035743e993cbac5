"""Figures of reports. matplotlib is loaded where one is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdbank.core import disk
from svdbank.core.errors import OptionError, missing_extra

_SUFFIXES = (".svg", ".png")


def check_image(path: Path) -> None:
    """Refuse an image that cannot be drawn, before any work: another format, a folder that is not there, or no matplotlib."""
    if path.suffix.lower() not in _SUFFIXES:
        raise OptionError(f"{path}: an image ends in {' or '.join(_SUFFIXES)}")
    if not path.expanduser().resolve().parent.is_dir():
        raise OptionError(f"{path}: its folder does not exist")
    load_matplotlib()


def draw_heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], path: Path, *, across: str, colour: str
) -> None:
    """A heat map of signed values, rows by columns, the first column set off as their sum: red below 0, blue above, NaN left white.

    ``across`` says what the columns are, ``colour`` what the values are. The same values give the same bytes.
    """
    matplotlib = load_matplotlib()
    from matplotlib.figure import Figure

    size = max((abs(value) for row in values for value in row if value == value), default=0.0) or 1.0
    with matplotlib.rc_context({"svg.hashsalt": "svdbank", "svg.fonttype": "none"}):
        figure = Figure(figsize=(2.5 + 0.32 * len(columns), 1.4 + 0.35 * len(values)), layout="constrained")
        axes = figure.add_subplot()
        shown = axes.imshow(values, cmap="RdBu", vmin=-size, vmax=size, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, fontsize=7)
        labels = axes.set_yticks(range(len(values)), list(rows), fontsize=8)
        for label in labels:
            # Names are no formulas.
            label.label1.set_parse_math(False)
        axes.axvline(0.5, color="black", linewidth=0.8)
        axes.set_xlabel(across)
        figure.colorbar(shown, label=colour)
        buffer = io.BytesIO()
        kind = path.suffix.lower()[1:]
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    disk.write_bytes(path.expanduser().resolve(), buffer.getvalue())


def load_matplotlib() -> Any:
    """matplotlib, or the error that names the command which installs it."""
    try:
        import matplotlib
    except ImportError as cause:
        raise missing_extra("matplotlib", "report") from cause
    return matplotlib
