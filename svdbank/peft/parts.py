"""A model that is a part of the bank's, or has the bank's as a part: the same modules under other paths."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from svdbank.adapter.naming import Elsewhere, Move, elsewhere
from svdbank.bank.reading import Bank
from svdbank.core.probe import differing, is_readable, sample
from svdbank.peft.layers import unwrapped
from svdbank.peft.targets import Target, as_in, of_module


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


def keys_in(model: nn.Module, bank: Bank, names: Sequence[str]) -> dict[str, str]:
    """What an adapter of ``model`` calls each of the bank's weights that it has: by its path there, also where that is another one.

    Linear modules that are not in the bank under their own path say what other paths are, by :func:`under_other_paths`.
    """
    keys = {name: name if bank[name].stacked else bank[name].module for name in names}
    there = {unwrapped(path) for paths in (model.named_modules(), model.named_parameters()) for path, _ in paths}
    lacking = [name for name in names if bank[name].module not in there]
    if not lacking:
        return keys
    held: dict[str, list[str]] = defaultdict(list)
    for name in bank.names:
        held[bank[name].module].append(name)
    modules = {unwrapped(path): module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    places = elsewhere([path for path in modules if path not in held], held)
    own = [
        Target(path, modules[path].weight, False, modules[path].out_features, modules[path].in_features, 1)
        for path, found in places.items()
        if found
    ]
    changes = {
        (place.theirs, place.ours)
        for target, name in zip(own, under_other_paths(bank, held, own), strict=True)
        for place in (elsewhere([target.module], [bank[name].module])[target.module] if name is not None else ())
    }
    moved = {}
    for name in lacking:
        module = bank[name].module
        for theirs, ours in sorted(changes, key=lambda change: -len(change[0])):
            changed = Move(f"{theirs}." if theirs else "", f"{ours}." if ours else "")(module)
            if changed in there:
                moved[name] = changed + keys[name].removeprefix(module)
                break
    kept = {name: moved.get(name, key) for name, key in keys.items() if name in moved or bank[name].module in there}
    return kept or keys
