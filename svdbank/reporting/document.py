"""What a report consists of before it is a page: sections of sentences, facts, tables, and figures that each carry their data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from svdbank.core import units

#: Rows of a table in a report; the rest is in the CSV and JSON of the verbs, and a note says so.
MOST_ROWS = 250

_NUMBER = re.compile(r"[+−-]?[\d,.]+(e[+-]?\d+)?( ?(%|±.*|s|ms|min|h|B|kB|MB|GB|TB))?|[–∞]|")


@dataclass(frozen=True)
class Table:
    """Cells as text. ``note`` says what is not shown. ``of`` names the rows, for the table's caption."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    @cached_property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers alone: they stand to the right. Made once: a page asks at every cell."""
        return tuple(
            bool(self.rows) and all(_NUMBER.fullmatch(row[column]) for row in self.rows) for column in range(len(self.header))
        )


@dataclass(frozen=True)
class Figure:
    """A drawing (inline SVG) with a title, what one sees in it, and the numbers that it was drawn from."""

    title: str
    says: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it. ``facts`` are terms and what they are."""

    title: str
    says: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[tuple[str, Table]] = ()
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Chapter:
    """One bank, one unfinished build, the adapters, the evaluations."""

    kind: str
    title: str
    verdict: str
    sections: Sequence[Section] = field(default_factory=tuple)


def shortened(table: Table, most: int = MOST_ROWS, elsewhere: str = "") -> Table:
    """The first rows, and a note of how many there are."""
    if len(table.rows) <= most:
        return table
    note = f"The first {most} of {len(table.rows):,} rows" + (f"; {elsewhere} has all." if elsewhere else ".")
    return Table(table.header, table.rows[:most], note)


def visible(text: object) -> str:
    """Text from outside with control characters, surrogates and marks that turn the direction of writing made visible."""
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode() for ch in str(text))


def brief(text: str, most: int = 28) -> str:
    """The end of a long name, which tells most; the whole stands in the table."""
    shown = visible(text)
    return shown if len(shown) <= most else "…" + shown[1 - most :]


def sci(value: float | None, digits: int = 1) -> str:
    """``1.2e-03``; a dash for nothing, ∞ for what has no end."""
    if value is None or value != value:
        return "–"
    return "∞" if value in (float("inf"), float("-inf")) else f"{value:.{digits}e}"


def duration(seconds: float) -> str:
    """Milliseconds to hours."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else units.duration(seconds)


def counted(number: int, one: str, many: str = "") -> str:
    """``1 weight``, ``2 weights``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
