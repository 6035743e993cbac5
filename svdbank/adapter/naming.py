"""Which weight of a bank a weight of an adapter is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError


def bank_names(bank: Bank, keys: Sequence[str]) -> dict[str, str]:
    """Name in the bank of each weight that the bank holds, by the adapter's key.

    A class may put the whole model under a prefix (``bert.``) that another lacks: one prefix, added or removed for all, is tried.
    """
    bases = (bank[name] for name in bank)
    return matched({(basis.name if basis.stacked else basis.module): basis.name for basis in bases}, keys)


def matched(held: Mapping[str, str], keys: Sequence[str]) -> dict[str, str]:
    """What ``held`` has for each of ``keys`` that it holds, under one prefix added or removed for all where that finds more."""
    best: dict[str, str] = {}
    for change in _prefixes(keys, held):
        found = {key: held[changed] for key in keys if (changed := change(key)) in held}
        if len(found) > len(best):
            best = found
        if len(best) == len(keys):
            break
    return best


def _prefixes(keys: Sequence[str], held: Mapping[str, str]) -> Iterator[_Prefix]:
    yield _Prefix("", "")
    first = keys[0]
    parts = first.split(".")
    for count in range(1, len(parts)):
        yield _Prefix(".".join(parts[:count]) + ".", "")
    for module in held:
        if module.endswith(f".{first}"):
            yield _Prefix("", module.removesuffix(first))


@dataclass(frozen=True)
class _Prefix:
    removed: str
    added: str

    def __call__(self, key: str) -> str:
        return self.added + key.removeprefix(self.removed)


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
