"""Which weight of a bank a weight of an adapter is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError

#: Whether a key and a name of what is held may be one weight.
Fits = Callable[[str, str], bool]


def bank_names(bank: Bank, keys: Sequence[str], recorded: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Name in the bank of each weight that the bank holds, by the adapter's key.

    A class may put the whole model under a prefix (``bert.``) that another lacks, and a multimodal one has its language model under a path
    of its own: one such change, the same for all, is tried, where the names ``recorded`` with the adapter are not this bank's.
    """
    if all(recorded.get(key) in bank for key in keys):
        return {key: recorded[key] for key in keys}
    bases = (bank[name] for name in bank)
    return matched({(basis.name if basis.stacked else basis.module): basis.name for basis in bases}, keys)


def matched(held: Mapping[str, str], keys: Sequence[str], fits: Fits | None = None) -> dict[str, str]:
    """What ``held`` has for each of ``keys`` that it holds: under its own name, else under one move of paths, the same for all.

    ``fits`` says of a key and a name of ``held`` whether they may be one weight. Raises :class:`OptionError` where two moves would do.
    """
    move = move_of(keys, held, fits)
    moved = {key: move(key) for key in keys}
    return {key: held[name] for key, name in moved.items() if name in held}


def move_of(keys: Sequence[str], held: Mapping[str, str], fits: Fits | None = None) -> Move:
    """The move of paths under which ``held`` has most of ``keys``, none where that is as many; :func:`matched` says what is raised."""
    own = sum(key in held for key in keys)
    most, found = own, {tuple[str, ...](): Move("", "")}
    if own == len(keys):
        return Move("", "")
    for move in (*_prefixes(keys, held), *_parts(keys, held)):
        names = tuple(name for key in keys if (name := move(key)) in held and (fits is None or fits(key, name)))
        if len(names) > most:
            most, found = len(names), {}
        if len(names) == most > own:
            found.setdefault(names, move)
    if len(found) > 1:
        raise OptionError(
            f"{keys[0]} of the adapter may be {' or '.join(names[0] for names in found)}, and so the others: it cannot be told which is "
            "meant",
            hint="name the model that the adapter was trained on",
        )
    return next(iter(found.values()))


def _prefixes(keys: Sequence[str], held: Mapping[str, str]) -> Iterator[Move]:
    first = keys[0]
    parts = first.split(".")
    for count in range(1, len(parts)):
        yield Move(".".join(parts[:count]) + ".", "")
    for added in dict.fromkeys(module.removesuffix(first) for module in held if module.endswith(f".{first}")):
        yield Move("", added)


def _parts(keys: Sequence[str], held: Mapping[str, str]) -> Iterator[Move]:
    """Changes of a path into a longer or a shorter one: a language model alone, and inside a multimodal one."""
    here = [key for key in keys if key in held]
    places = elsewhere([key for key in keys if key not in held], held)
    pairs = {
        (place.ours, place.theirs) for own in places.values() for place in own if place.is_part and place.ours and place.theirs
    }
    for ours, theirs in sorted(pairs):
        if not any(key.startswith(f"{ours}.") for key in here):  # what is there is no other's part
            yield Move(f"{ours}.", f"{theirs}.")


@dataclass(frozen=True)
class Move:
    """Of paths that begin with ``removed``: they begin with ``added`` instead; others stay."""

    removed: str
    added: str

    def __call__(self, key: str) -> str:
        return self.added + key.removeprefix(self.removed) if key.startswith(self.removed) else key


@dataclass(frozen=True)
class Elsewhere:
    """``module`` of a bank is a module of a model if what is ``ours`` there, at the beginning of paths, is ``theirs`` in the bank."""

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
    """Of each module of a model, where it may be among ``held``: paths that end alike, from numbered layers on at least."""
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


def missing_prefix(keys: Sequence[str], others: Sequence[str]) -> str:
    """What has to be put before ``keys`` so that they name modules as ``others`` do; nothing where they do already, or cannot.

    A model in a class of its own and inside a larger one (``LlamaModel``, ``LlamaForCausalLM``) has two names for each module:
    ``layers.0.…`` and ``model.layers.0.…``. Compared is what stands before the number of a layer, so that adapters of different layers or
    modules are recognised too. Raises :class:`OptionError` where two prefixes would do.
    """
    mine, theirs = _stems(keys), _stems(others)
    if mine & theirs:
        return ""
    found = {other.removesuffix(own) for own in mine for other in theirs if other.endswith(f".{own}")}
    if len(found) > 1:
        raise OptionError(
            f"one adapter has modules {min(mine)}.…, another has them under {' and '.join(sorted(found))}: it cannot be told "
            "which are meant",
            hint="save both from the same class of model",
        )
    return found.pop() if found else ""


def common_prefixes(keys: Sequence[Sequence[str]]) -> list[str]:
    """What has to be put before each adapter's keys so that all are named as the one with the longest names (:func:`missing_prefix`)."""
    return [
        max((missing_prefix(own, other) for j, other in enumerate(keys) if j != i), key=len, default="")
        for i, own in enumerate(keys)
    ]


def _stems(keys: Sequence[str]) -> set[str]:
    """What comes before the first number of each key; nothing of keys without one."""
    return {match[1] for key in keys if (match := re.match(r"(.+?)\.\d+(?:\.|$)", key))}
