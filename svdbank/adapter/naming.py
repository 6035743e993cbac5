"""Which weight of a bank a weight of an adapter is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from svdbank.bank.reading import Bank


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
