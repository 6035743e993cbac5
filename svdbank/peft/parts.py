"""A model that is a part of the bank's, or has the bank's as a part: the same modules under other paths."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from svdbank.bank.reading import Bank
from svdbank.core.probe import differing, is_readable, sample
from svdbank.peft.targets import Target, as_in, of_module


@dataclass(frozen=True)
class Elsewhere:
    """``module`` of the bank is a module of the model if what is ``ours`` there, at the beginning of paths, is ``theirs`` in the bank."""

    module: str
    ours: str
    theirs: str

    @property
    def is_part(self) -> bool:
        """True where one path is the other with components left out: ``model`` and ``model.language_model``, no encoder and decoder."""
        less, more = sorted((self.ours.split("."), self.theirs.split(".")), key=len)
        rest = iter(more)
        return less == [""] or all(part in rest for part in less)


def elsewhere(modules: Iterable[str], held: Iterable[str]) -> dict[str, list[Elsewhere]]:
    """Of each module of a model, where it may be in a bank of ``held``: paths that end alike, from numbered layers on at least."""
    ends: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in held:
        for theirs, end in _parted(path):
            ends[end].append((theirs, path))
    return {
        module: [
            Elsewhere(path, ours, theirs)
            for ours, end in _parted(module)
            for theirs, path in ends.get(end, ())
            if not ours or not theirs or ours.rpartition(".")[2] != theirs.rpartition(".")[2]
        ]
        for module in modules
    }


def _parted(path: str) -> Iterator[tuple[str, str]]:
    """(beginning, end): a number and what it counts stay at the end."""
    parts = path.split(".")
    last = next((i - 1 for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    for i in range(max(last, 0) + 1):
        yield ".".join(parts[:i]), ".".join(parts[i:])


def under_other_paths(bank: Bank, held: Mapping[str, Sequence[str]], targets: Sequence[Target]) -> list[str | None]:
    """Names in the bank of the same weights in another model: one that has this one as a part, or is a part of it.

    Values decide. Where those of a target cannot be read, paths count that others were recognised by; where none can be, paths of which
    one is the other with components left out and under which every target is found, if they lead to one weight.
    """
    places = elsewhere({target.module for target in targets}, held) if targets else {}
    found: list[list[tuple[str, Elsewhere]]] = []
    for target in targets:
        shape = target.out_features, target.in_features
        named = [(of_module(bank, held[place.module], target), place) for place in places[target.module]]
        found.append([(n, place) for n, place in named if n and (bank[n].out_features, bank[n].in_features) == shape])
    readable = [(i, name, place) for i, own in enumerate(found) if is_readable(targets[i]) for name, place in own]
    stored = bank.probes({name for _, name, _ in readable})
    values = sample([as_in(bank, name, targets[i]) for i, name, _ in readable])
    wrong = set(differing(values, [stored[name] for _, name, _ in readable]))
    same = [one for number, one in enumerate(readable) if number not in wrong]
    by_paths = Counter((place.ours, place.theirs) for _, _, place in same)
    names: list[str | None] = [None] * len(targets)
    for i, name, _ in sorted(same, key=lambda one: by_paths[one[2].ours, one[2].theirs]):
        names[i] = name
    known = set(by_paths) if readable else _of_all(targets, found)
    for i, target in enumerate(targets):
        if not is_readable(target):
            fits = {name for name, place in found[i] if (place.ours, place.theirs) in known}
            names[i] = fits.pop() if len(fits) == 1 else None
    return names


def _of_all(targets: Sequence[Target], found: Sequence[Sequence[tuple[str, Elsewhere]]]) -> set[tuple[str, str]]:
    """Paths (ours, theirs) of a part and a whole under which every target that is below ours is found."""
    served = Counter(paths for own in found for paths in {(place.ours, place.theirs) for _, place in own if place.is_part})
    return {
        (ours, theirs)
        for (ours, theirs), count in served.items()
        if count == sum(not ours or target.module.startswith(f"{ours}.") for target in targets)
    }
