"""The weights of an adapter folder, one by one: what PEFT keeps by module, taken apart by weight and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from svdbank.adapter.components import Kind
from svdbank.adapter.experts import join, parameters_of, split, wrapper_paths
from svdbank.adapter.folder import AdapterFolder, Factors
from svdbank.adapter.settings import WEIGHTS


@dataclass(frozen=True)
class Entry:
    """One weight of a folder: factors (r, in) and (out, r), the scale PEFT applies, and what kind of weight it is."""

    key: str
    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    scale: float
    kind: Kind
    experts: int = 0


def entries_of(folder: AdapterFolder) -> Iterator[Entry]:
    """Every weight of a folder, stacked experts taken apart, with PEFT's rank, α and scale."""
    parameters = parameters_of(folder.settings, folder.factors)
    for module, pair in folder.factors.items():
        path = parameters.get(module, module)
        rank, alpha, scale = folder.rank(path), folder.alpha(path), folder.scale(path)
        if module not in parameters:
            yield Entry(path, pair.A, pair.B, rank, alpha, scale, "embedding" if pair.embedding else "linear")
            continue
        pairs = split(pair.A, pair.B, rank, f"{folder.path / WEIGHTS}: {module}")
        if len(pairs) == 1 and path.endswith(".weight"):
            yield Entry(path.removesuffix(".weight"), *pairs[0], rank, alpha, scale, "parameter")
            continue
        for expert, (A, B) in enumerate(pairs):
            yield Entry(f"{path}.{expert}", A, B, rank, alpha, scale, "expert", len(pairs))


def by_module(
    pairs: Mapping[str, tuple[Tensor, Tensor]], kinds: Mapping[str, Kind], counts: Mapping[str, int] | None = None
) -> dict[str, Factors]:
    """Factors by PEFT's module paths from A (r, in) and B (out, r) of each weight, experts of a parameter side by side.

    ``counts`` says how many experts a parameter has where that is more than there are factors of: the others get factors of zero.
    """
    factors: dict[str, Factors] = {}
    experts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for key, (A, B) in pairs.items():
        if kinds[key] == "expert":
            parameter, _, number = key.rpartition(".")
            experts.setdefault(parameter, {})[int(number)] = (A, B)
        else:
            factors[key] = Factors(A, B, embedding=kinds[key] == "embedding")
    paths = wrapper_paths(list(experts))
    for parameter, members in experts.items():
        A, B = next(iter(members.values()))
        nothing = (A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1))
        count = max((counts or {}).get(parameter, 0), max(members) + 1)
        factors[paths[parameter]] = Factors(*join([members.get(expert, nothing) for expert in range(count)]))
    return factors
