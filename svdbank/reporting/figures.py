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
    _matplotlib()


def draw_cosines(
    pairs: Sequence[tuple[str, str]], columns: Sequence[str], values: Sequence[Sequence[float]], path: Path
) -> None:
    """A heat map of cosines, pairs by columns ("all" first, then layers): red where two adapters pull against each other, blue where
    they agree.

    The same values give the same bytes; NaN is left white. Raises :class:`OptionError` without pairs.
    """
    if not pairs:
        raise OptionError("a heat map needs two adapters or more")
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    size = max((abs(value) for row in values for value in row if value == value), default=0.0) or 1.0
    with matplotlib.rc_context({"svg.hashsalt": "svdbank", "svg.fonttype": "none"}):
        figure = Figure(figsize=(2.5 + 0.32 * len(columns), 1.4 + 0.35 * len(values)), layout="constrained")
        axes = figure.add_subplot()
        shown = axes.imshow(values, cmap="RdBu", vmin=-size, vmax=size, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, fontsize=7)
        labels = axes.set_yticks(range(len(values)), [" · ".join(pair) for pair in pairs], fontsize=8)
        for label in labels:
            # Names of adapters are no formulas.
            label.label1.set_parse_math(False)
        axes.axvline(0.5, color="black", linewidth=0.8)
        axes.set_xlabel("layer")
        figure.colorbar(shown, label="cosine of ΔW")
        buffer = io.BytesIO()
        kind = path.suffix.lower()[1:]
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    disk.write_bytes(path.expanduser().resolve(), buffer.getvalue())


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as cause:
        raise missing_extra("matplotlib", "report") from cause
    return matplotlib
