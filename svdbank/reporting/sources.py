"""What a report is asked about: each name told apart (bank, unfinished build, adapter, evaluation), opened and read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from svdbank import cache
from svdbank.adapter.documents import read_documents
from svdbank.adapter.fetching import located, name_of
from svdbank.adapter.model import Adapter
from svdbank.adapter.settings import CONFIG, SLIM
from svdbank.bank.layout import MANIFEST
from svdbank.bank.reading import Bank
from svdbank.building.freezing import frozen_plan
from svdbank.building.standing import UnfinishedInfo, unfinished_info
from svdbank.composition.inputs import read_inputs
from svdbank.core.errors import BankNotFoundError, OptionError, SvdbankError
from svdbank.core.places import OnDisk, OnHub, locate, named_place, refuse_empty
from svdbank.reporting.measuring import ReadAdapter
from svdbank.reporting.training import Evaluation, read_evaluation, read_training

_STRANGE = re.compile(r"[^\w.+-]+", re.ASCII)


@dataclass
class NamedSources:
    """What was named, by kind. ``adapters`` are (NAME=)PLACE, read later: together, with a bank of their base."""

    banks: list[Bank] = field(default_factory=list)
    builds: list[tuple[UnfinishedInfo, Counter[str]]] = field(default_factory=list)
    adapters: list[tuple[str | None, str]] = field(default_factory=list)
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)


def opened_sources(named: Sequence[str | Path]) -> NamedSources:
    """Every name once. Raises :class:`OptionError` for what is none of a report's kinds, and what opening it raises."""
    found = NamedSources()
    for value in dict.fromkeys(str(value) for value in named):
        refuse_empty(value, "a source's name", "name a bank, an adapter's folder, or a file that svdbank eval --json wrote")
        name, text = named_place(value)
        place = locate(text)
        if isinstance(place, OnDisk):
            _on_disk(found, name, place.path)
        else:
            _elsewhere(found, name, text, on_hub=isinstance(place, OnHub))
    return found


def _on_disk(found: NamedSources, name: str | None, path: Path) -> None:
    if path.is_file() and path.suffix == ".json":
        found.evaluations.append((name or path.name, read_evaluation(path)))
        return
    if (path / CONFIG).is_file() or (path / SLIM).is_file():
        found.adapters.append((name, str(path)))
        return
    unfinished = unfinished_info(path)
    if unfinished is not None:
        frozen = frozen_plan(path)
        shards = Counter(shard.family for shard in frozen.plan.shards) if frozen is not None else Counter()
        found.builds.append((unfinished, shards))
        if not (path / MANIFEST).is_file():
            return
    try:
        found.banks.append(cache.open(path))
    except BankNotFoundError as cause:
        raise OptionError(
            f"{path} holds no bank, no adapter and no evaluation, and no bank of it is in the cache",
            hint="svdbank ls shows the banks there are",
        ) from cause


def _elsewhere(found: NamedSources, name: str | None, text: str, *, on_hub: bool) -> None:
    try:
        found.banks.append(cache.open(text))
    except BankNotFoundError:
        if not on_hub:
            raise
        located(text)
        found.adapters.append((name, text))


@dataclass(frozen=True)
class ReadTogether:
    """Adapters that are looked at together, the bank of their base where one is at hand, and what there is to say of that."""

    adapters: list[ReadAdapter]
    bank: Bank | None
    notes: list[str]


def read_adapters(
    places: Sequence[tuple[str | None, str]],
    banks: Sequence[Bank],
    bank: str | Path | Bank | None = None,
    base: str | Path | None = None,
) -> list[ReadTogether]:
    """All together where they are of one base, else each by itself. ``bank`` is asked for; else one of ``banks``, or the cached one.

    Raises what reading an adapter raises; a bank that was not asked for and does not fit is left out, and a note says so.
    """
    if not places:
        return []
    entries = _entries(places)
    if bank is not None:
        return [_together(entries, cache.opened(bank), base)]
    notes: list[str] = []
    for candidate in (*banks, *_recorded_bank(places)):
        try:
            return [_together(entries, candidate, base)]
        except SvdbankError as error:
            notes.append(f"the bank {candidate.place} was not used for the adapters: {error}")
    try:
        found = _together(entries, None, base)
        return [ReadTogether(found.adapters, None, [*notes[:1], *found.notes])]
    except SvdbankError:
        if len(entries) == 1:
            raise
    return [one for place in places for one in read_adapters([place], banks, None, base)]


def _together(entries: Sequence[tuple[str, str]], bank: Bank | None, base: str | Path | None) -> ReadTogether:
    read = read_inputs([entry for entry, _ in entries], bank=bank, base=base)
    trainings = {name: read_training(located(place)[0]) for name, (_, place) in zip(read, entries, strict=True)}
    places = {name: place for name, (_, place) in zip(read, entries, strict=True)}
    adapters = [
        ReadAdapter(own, places[name], adapter, name if own != name else None, trainings[name] if own == name else None)
        for name, whole in read.items()
        for own, adapter in _domains(name, whole)
    ]
    return ReadTogether(adapters, bank, [])


def _domains(name: str, adapter: Adapter) -> list[tuple[str, Adapter]]:
    """A stack as what is in it, named after both."""
    if len(adapter.names) < 2:
        return [(name, adapter)]
    try:
        return [(f"{name}/{own}", adapter.only(own)) for own in adapter.names]
    except OptionError:  # it brings whole tensors, and whose they are is not known
        return [(name, adapter.named(name))]


def _entries(places: Sequence[tuple[str | None, str]]) -> list[tuple[str, str]]:
    """(NAME=PLACE, place), with names that are one word and differ; PLACE alone where the folder's own name serves, so that a stack stays
    apart."""
    entries, seen = [], set[str]()
    for given, place in places:
        own = name_of(place)
        name = shorter = (_STRANGE.sub("-", given or own).strip("-") or "adapter")[:60]
        number = 2
        while name in seen:
            name, number = f"{shorter}-{number}", number + 1
        seen.add(name)
        entries.append((place if given is None and name == own else f"{name}={place}", place))
    return entries


def _recorded_bank(places: Sequence[tuple[str | None, str]]) -> list[Bank]:
    """The cached bank of the base that the first adapter records, where there is one."""
    try:
        return [cache.recorded_bank(read_documents(located(places[0][1])[0]), "a report")]
    except SvdbankError:
        return []
