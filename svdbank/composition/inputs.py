"""The adapters that are put together: read, named, and held against each other before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from svdbank import cache
from svdbank.adapter.fetching import located, name_of
from svdbank.adapter.folder import read_folder
from svdbank.adapter.model import Adapter, aligned, check_kinds
from svdbank.adapter.reading import adapter_of, read_adapter
from svdbank.adapter.weights import check_bases, names_in
from svdbank.bank.reading import Bank
from svdbank.composition.base import on_base
from svdbank.core.errors import OptionError, WrongBaseError
from svdbank.core.places import named_place

#: Adapters to put together: folders or ``org/name[@revision]`` on the Hub, as they are, written as ``NAME=PLACE``, or by name.
Places = Sequence[str | Path] | Mapping[str, str | Path]

_REBASE = "--rebase BANK carries them over to that bank's base and says what is lost"

_NAME = re.compile(r"[\w.+-]+", re.ASCII)


def named_places(places: Places) -> dict[str, tuple[str | Path, bool]]:
    """Place of each adapter by name, and whether that name was asked for; without one, the folder's or the repository's own serves.

    Raises :class:`OptionError` for two of one name, for an empty place, and for names that hold other characters than letters, digits
    and ``_ . + -``.
    """
    named: dict[str, tuple[str | Path, bool]] = {}
    entries = places.items() if isinstance(places, Mapping) else map(_entry, places)
    for given, place in entries:
        if not str(place).strip():
            raise OptionError("an adapter's name is empty", hint="name its folder")
        name = given or name_of(place)
        if not _NAME.fullmatch(name):
            raise OptionError(
                f"{name!r} cannot name an adapter: letters, digits and _ . + - can", hint=f"give it another name: NAME={place}"
            )
        if name in named:
            raise OptionError(f"two adapters are called {name!r}", hint=f"give one another name: NAME={place}")
        named[name] = (place, given is not None)
    return named


def _entry(value: str | Path) -> tuple[str | None, str | Path]:
    name, place = named_place(str(value))
    return (name, place) if name and place else (None, value)


def read_inputs(
    places: Places,
    *,
    bank: str | Path | Bank | None = None,
    rebase: str | Path | Bank | None = None,
    base: str | Path | None = None,
) -> dict[str, Adapter]:
    """Each adapter by name; a single component takes that name, several keep theirs unless ``NAME=PLACE`` makes them one.

    ``bank`` is the bank of their base: with it, factors that stand on its directions are recognised wherever they come from. ``rebase``
    is a bank that adapters of other bases are carried over to; what of each lies in it is in the notes of the adapter. ``base`` is their
    model (:func:`svdbank.composition.base.on_base`).

    Raises :class:`OptionError` for names, :class:`WrongBaseError` for adapters of different bases without ``rebase``, and what
    :func:`svdbank.adapter.reading.read_adapter` raises.
    """
    if bank is not None and rebase is not None:
        raise OptionError("a bank to read with and a bank to carry over to exclude each other", hint="--rebase alone does both")
    named = named_places(places)
    if not named:
        raise OptionError("no adapter was named", hint="name folders of adapters, or org/name on the Hub")
    opened = cache.opened(rebase if rebase is not None else bank)
    adapters = {}
    for name, (place, asked) in named.items():
        if rebase is not None and opened is not None:
            adapter = _carried_over(located(place)[0], name, opened)
        else:
            adapter = read_adapter(place, bank=opened, name=name)
        adapters[name] = adapter if len(adapter.names) > 1 and not asked else adapter.named(name)
    if rebase is None:
        _check_digests(adapters)
    adapters = on_base(adapters, base)
    adapters = dict(zip(adapters, aligned(list(adapters.values())), strict=True))
    check_bases([adapter.weights for adapter in adapters.values()], list(adapters), hint=_REBASE)
    check_kinds(list(adapters.values()))
    return adapters


def domains_of(read: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Every component of every input as an adapter of its own. Raises :class:`OptionError` for two of one name."""
    domains: dict[str, Adapter] = {}
    came: dict[str, str] = {}
    for place, adapter in read.items():
        for name in adapter.names:
            if name in domains:
                raise OptionError(
                    f"two domains are called {name!r}, of {came[name]} and of {place}",
                    hint="give one of the adapters another name: NAME=PLACE (a stack is then one domain)",
                )
            domains[name] = adapter if len(adapter.names) == 1 else adapter.only(name)
            came[name] = place
    return domains


def _carried_over(path: Path, name: str, bank: Bank) -> Adapter:
    """On the bank's base: as it is where it was made there or does not say, else projected on the bank's directions."""
    folder = read_folder(path)
    adapter = adapter_of(folder, name=name)
    known = names_in(bank, adapter.weights)
    made_elsewhere = (bool(adapter.base.digest and adapter.base.weights) and not adapter.base.is_of(bank)) or any(
        weight.source is not None and key in known and weight.source.sha256 != bank[known[key]].source_sha256
        for key, weight in adapter.weights.items()
    )
    if not made_elsewhere:
        return adapter_of(folder, bank=bank, name=name)
    moved = adapter.rebase(bank, force=True)
    return replace(moved, notes=tuple(f"{name}: {note}" for note in moved.notes))


def _check_digests(adapters: Mapping[str, Adapter]) -> None:
    """Compare adapters that record the base as one digest, over the same weights."""
    seen: dict[tuple[str, ...], tuple[str, str]] = {}
    for name, adapter in adapters.items():
        if not adapter.base.digest:
            continue
        other, digest = seen.setdefault(tuple(sorted(adapter.base.weights)), (name, adapter.base.digest))
        if digest != adapter.base.digest:
            raise WrongBaseError(f"{other} and {name} were made on different bases: their base digests differ", hint=_REBASE)


def notes_of(adapters: Mapping[str, Adapter]) -> list[str]:
    """What readers of the result should know: notes of the inputs, and bases that have two names."""
    notes = [note for adapter in adapters.values() for note in adapter.notes]
    bases = {adapter.base.name for adapter in adapters.values() if adapter.base.name}
    if len(bases) > 1:
        notes.append(f"the adapters name different bases: {', '.join(sorted(bases))}")
    return list(dict.fromkeys(notes))


def check_touching(adapters: Mapping[str, Adapter]) -> None:
    """Raise :class:`OptionError` where an adapter shares no weight with any other: there is nothing to merge or compare."""
    for name, adapter in adapters.items():
        others = set().union(*(other.weights for own, other in adapters.items() if own != name))
        if not others & adapter.weights.keys():
            raise OptionError(
                f"{name} touches no weight that another adapter touches, first {next(iter(adapter.weights))}",
                hint="svdbank stack puts adapters of different weights together",
            )
