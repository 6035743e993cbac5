"""``report``: banks, builds, adapters and evaluations as one HTML file that can be opened anywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from svdbank.core import disk
from svdbank.core.errors import OptionError
from svdbank.core.specs import Progress, ProgressCallback, Struct, ignore_progress
from svdbank.reporting.adapters import adapters_chapter
from svdbank.reporting.banks import bank_chapter
from svdbank.reporting.builds import build_chapter
from svdbank.reporting.document import Chapter
from svdbank.reporting.figures import load_matplotlib
from svdbank.reporting.page import checked_place, load_template, render
from svdbank.reporting.sources import NamedSources, opened_sources, read_adapters
from svdbank.reporting.training import evaluation_chapter, evaluation_of

#: A report is one file that people send to each other.
_LARGEST = 2_000_000


class WrittenReport(Struct, frozen=True):
    """What was written where, and what it is about. As text it is the file's path."""

    path: str
    nbytes: int
    banks: tuple[str, ...]
    builds: tuple[str, ...]
    adapters: tuple[str, ...]
    evaluations: tuple[str, ...]
    figures: int

    def __str__(self) -> str:
        return self.path


def report(
    sources: str | os.PathLike[str] | Sequence[str | Path | Struct],
    output: str | os.PathLike[str] = "report.html",
    *,
    bank: str | Path | None = None,
    base: str | Path | None = None,
    title: str | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> WrittenReport:
    """Write one self-contained HTML file about banks, unfinished builds, adapters, stacks and evaluations.

    Parameters
    ----------
    sources
        Folders of banks or adapters, models whose cached bank is meant, adapters on the Hub, and what ``svdbank eval --json`` printed, in
        a file, or what ``svdbank.eval`` returned; adapters also as ``NAME=PLACE``. A stack counts as the domains in it.
    output
        The file; its folder must exist. An earlier report is replaced, any other file only with ``force``.
    bank
        Bank of the adapters' base; else one of ``sources``, or the cached one of the base that they record, where it fits.
    base
        Their base model, for whole tensors and names of older Transformers.

    Raises, before anything is written: :class:`OptionError` for sources that are none of these and for an output that cannot be,
    :class:`MissingExtraError` without matplotlib or Jinja (``pip install 'svdbank[report]'``), and what opening a bank or reading an
    adapter raises.
    """
    named = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not named:
        raise OptionError(
            "nothing was named to report on", hint="name a bank, an adapter's folder, or a model with a cached bank"
        )
    place = checked_place(output, force=force)
    load_matplotlib()
    load_template()
    tell = progress or ignore_progress
    found = opened_sources([os.fspath(one) for one in named if not isinstance(one, Struct)])
    found.evaluations += [("evaluation", evaluation_of(one)) for one in named if isinstance(one, Struct)]
    together = read_adapters(found.adapters, found.banks, bank, base)
    parts = len(found.builds) + len(found.banks) + len(together) + len(found.evaluations)
    chapters: list[Chapter] = []

    def drawn(chapter: Chapter) -> None:
        chapters.append(chapter)
        tell(Progress("report", len(chapters), parts, "parts", chapter.title))

    tell(Progress("report", 0, parts, "parts"))
    for info, shards in found.builds:
        drawn(build_chapter(info, shards))
    for opened in found.banks:
        drawn(bank_chapter(opened))
    for group in together:
        drawn(adapters_chapter(group.adapters, group.bank, group.notes))
    for name, evaluation in found.evaluations:
        drawn(evaluation_chapter(name, evaluation))
    data = _encoded(title or _title(found, chapters), chapters)
    disk.write_bytes(place, data)
    return WrittenReport(
        path=str(output),
        nbytes=len(data),
        banks=tuple(opened.place for opened in found.banks),
        builds=tuple(info.path for info, _ in found.builds),
        adapters=tuple(one.name for group in together for one in group.adapters),
        evaluations=tuple(name for name, _ in found.evaluations),
        figures=sum(len(section.figures) for chapter in chapters for section in chapter.sections),
    )


def _encoded(title: str, chapters: Sequence[Chapter]) -> bytes:
    data = render(title, chapters).encode("utf-8", "backslashreplace")
    if len(data) > _LARGEST:
        raise OptionError(
            f"the report would have {len(data) / 1e6:.1f} MB, more than {_LARGEST / 1e6:.0f} MB",
            hint="name fewer banks and adapters at a time",
        )
    return data


def _title(found: NamedSources, chapters: Sequence[Chapter]) -> str:
    """The only one's own name, or how many there are of what."""
    if len(chapters) == 1:
        return chapters[0].title
    counts = [
        (len(found.builds), "unfinished build"),
        (len(found.banks), "bank"),
        (len(found.adapters), "adapter"),
        (len(found.evaluations), "evaluation"),
    ]
    return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts if count)
