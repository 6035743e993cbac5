"""Where a command's words go: data to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Never, Protocol, TypeVar

import click

from svdbank.core.units import duration, size

if TYPE_CHECKING:
    from tqdm import tqdm

    from svdbank.core.specs import Progress

Report = TypeVar("Report")

#: Seconds between progress lines where there is no terminal.
_LINE_EVERY = 5.0


def printable(text: object) -> str:
    """Text from outside (names in a checkpoint, paths) with control characters made visible: a terminal must not obey them."""
    return "".join(ch if ch.isprintable() or ch in "\n\t" else repr(ch)[1:-1] for ch in str(text))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: numbers to the right, words to the left."""
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [rows and all(isinstance(row[column], int | float) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


class OfModule(Protocol):
    """What a report says of one weight."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...


Weight = TypeVar("Weight", bound=OfModule)


def grouped(weights: Iterable[Weight], *, per_weight: bool) -> dict[str, list[Weight]]:
    """Weights by what a row of a table stands for: their role (``q_proj``), or each on its own."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(weight.name if per_weight else weight.module.rpartition(".")[2], []).append(weight)
    return groups


class Output:
    """One command's sink: human, ``--json`` or ``--quiet``."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def data(self, value: Report, human: Callable[[Report], str]) -> None:
        """The result: one JSON document, or text for people. ``--quiet`` does not silence it."""
        if self.json:
            self.line(value)
        else:
            click.echo(printable(human(value)))

    def line(self, value: object) -> None:
        """One JSON document on one line."""
        import msgspec

        click.echo(msgspec.json.encode(value).decode())

    def say(self, text: str) -> None:
        """Talk, for people only."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def notes(self, notes: Iterable[str]) -> None:
        """What a report wants people to know beside its figures."""
        for note in notes:
            self.say(f"Note: {note}")

    def progress(self, *, lines: bool = False) -> ProgressView:
        """A progress callback; ``lines`` sends JSON lines to stdout when ``--json`` is on. Use as a context manager."""
        return ProgressView(self, json_lines=lines and self.json)


def dequantised(formats: dict[str, int]) -> str:
    """What to say of weights stored as codes and scales, counted by format."""
    codes = sorted({text.partition(" = ")[2].partition(" ")[0] for text in formats})
    return f"{sum(formats.values())} weights are stored as {', '.join(codes)} codes: the bank describes the dequantised values"


def named_by(decided: str, doubt: str | None, before: Sequence[str]) -> list[str]:
    """What to say of who knew which matrices there are; nothing where it was this package's own table."""
    lines = []
    if decided == "names":
        lines.append(f"nothing but the stored names was known{f': {doubt}' if doubt else ''}; attaching compares values")
    elif decided != "table":
        lines.append(f"modules as {decided} has them")
    elif doubt:
        lines.append(f"by svdbank's own table: {doubt}")
    if before:
        lines.append(f"what the bank holds already was named by {' and '.join(_KNEW.get(one, one) for one in before)}")
    return lines


_KNEW = {"table": "svdbank's own table", "names": "the stored names alone"}


def _of_build(progress: Progress) -> list[str]:
    """What a build says beside its weights: time left, and its workers where there are several, or one waits."""
    seconds, workers, waiting = (getattr(progress, name, None) for name in ("seconds_left", "workers", "waiting"))
    parts = [f"{duration(seconds)} left"] if seconds else []
    if workers is not None and workers > 1:
        parts.append(f"{workers} workers")
    if waiting:
        parts.append(f"{len(waiting)} waiting for bytes" if (workers or 1) > 1 else "waiting for bytes")
    return parts


class ProgressView:
    """Shows progress: a bar on a terminal, else a line every few seconds, or JSON lines."""

    def __init__(self, output: Output, *, json_lines: bool) -> None:
        self._output = output
        self._json_lines = json_lines
        self._bars = sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
        self._stage = ""
        self._bar: tqdm[Never] | None = None
        self._last = 0.0

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, progress: Progress) -> None:
        if self._json_lines:
            self._output.line(progress)
        elif progress.unit == "note":
            self._output.notes([progress.item])
        elif not self._output.quiet:
            (self._show_bar if self._bars else self._show_line)(progress)

    def _show_bar(self, progress: Progress) -> None:
        from tqdm import tqdm

        bar = self._bar
        if bar is None or progress.stage != self._stage:
            self._close()
            self._stage = progress.stage
            bytes_ = progress.unit == "bytes"
            self._bar = bar = tqdm(
                total=progress.total,
                desc=progress.stage,
                unit="B" if bytes_ else f" {progress.unit}",
                unit_scale=bytes_,
                initial=progress.done if progress.stage == "decompose" else 0,
                dynamic_ncols=True,
                file=sys.stderr,
            )
        bar.update(progress.done - bar.n)
        if text := ", ".join(filter(None, (printable(progress.item)[-48:], *_of_build(progress)))):
            bar.set_postfix_str(text, refresh=False)

    def _show_line(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage or progress.done >= progress.total or now - self._last > _LINE_EVERY:
            self._stage, self._last = progress.stage, now
            amounts = (
                f"{size(progress.done)} of {size(progress.total)}"
                if progress.unit == "bytes"
                else f"{progress.done:g} of {progress.total:g} {progress.unit}"
            )
            text = ", ".join((f"{progress.stage}: {amounts} {progress.item}".rstrip(), *_of_build(progress)))
            click.echo(printable(text), err=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
