"""Merging as a value: adapters become one by a weighted sum or by a method that looks at single coefficients, and ranks are cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch

from svdbank.adapter.components import Component
from svdbank.adapter.model import Adapter, combination, joined
from svdbank.adapter.spectra import singular_values, truncated
from svdbank.adapter.weights import AdaptedWeight
from svdbank.composition.coordinates import common_coordinates
from svdbank.composition.sparsification import dropped, elected, summed, trimmed

MergeMethod = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)

#: Name of the one component that a merged adapter has.
MERGED = "merged"

#: Share of the coefficients that the sparsifying methods keep where nothing is asked for.
DENSITY = 0.5


def merged(
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    *,
    method: MergeMethod = "linear",
    density: float = DENSITY,
    seed: int = 0,
) -> Adapter:
    """The merge as a value, with one component called ``merged``; before ranks are cut."""
    if method == "linear":
        total = combination(list(zip(weights, adapters.values(), strict=True)), name=MERGED)
    else:

        def by_coefficients(key: str, parts: Mapping[int, AdaptedWeight]) -> dict[str, Component]:
            own = [weights[number] for number in parts]
            components = [weight.total() for weight in parts.values()]
            return {MERGED: _by_coefficients(components, own, method, density, _seeds(seed, key, list(parts)))}

        total = joined(list(adapters.values()), by_coefficients)
    return replace(total, weights={key: _narrowed(weight) for key, weight in total.weights.items()})


def _by_coefficients(
    components: Sequence[Component], weights: Sequence[float], method: MergeMethod, density: float, seeds: Sequence[int]
) -> Component:
    at = common_coordinates(components)
    if method in ("ties", "magnitude_prune"):
        C = trimmed(at.C, at.rows, density)
    else:
        drawn = [dropped(part[None], density, np.random.default_rng(seed)) for part, seed in zip(at.C, seeds, strict=True)]
        C = torch.cat(drawn)
    return at.component(elected(C, weights) if method in ("ties", "dare_ties") else summed(C, weights))


def _seeds(seed: int, key: str, numbers: Sequence[int]) -> list[int]:
    """One for each adapter and weight, so that what is drawn does not depend on what else is merged in which order."""
    return [int.from_bytes(hashlib.sha256(f"{seed}/{number}/{key}".encode()).digest()[:7], "big") for number in numbers]


def _narrowed(weight: AdaptedWeight) -> AdaptedWeight:
    """Factors with more columns than the matrix has sides, as concatenation gives, cut to what the matrix can have: nothing is lost."""
    most = min(weight.out_features, weight.in_features)
    total = weight.total()
    return weight if total.max_rank <= most else replace(weight, components={MERGED: truncated(total, most)})


@dataclass(frozen=True, eq=False)
class Cut:
    """An adapter after its ranks were cut; ``lost`` is ``‖ΔW − ΔW_k‖`` (Frobenius) of each weight that was."""

    adapter: Adapter
    lost: Mapping[str, float]


def cut(adapter: Adapter, rank: int | None) -> Cut:
    """Every weight's best approximation of ``rank`` (Eckart–Young); as it is without one."""
    if rank is None:
        return Cut(adapter, {})
    totals = {key: weight.total() for key, weight in adapter.weights.items()}
    lost = {
        key: float(torch.linalg.vector_norm(singular_values(total)[rank:]))
        for key, total in totals.items()
        if total.max_rank > rank
    }
    return Cut(adapter.truncate(rank), lost)


@dataclass(frozen=True)
class Sizes:
    """``norm`` is what is left of an adapter, ``error`` the share of ``‖ΔW‖`` over all weights that cutting cost, ``worst`` the weight
    that lost most of its own norm, and that share."""

    norm: float
    error: float
    worst: tuple[str, float] | None


def sizes_of(result: Cut) -> Sizes:
    """What was kept and what was lost, over all weights and in the worst one; of whole tensors where the base's own are known."""
    kept = {key: weight.squared_norm for key, weight in result.adapter.weights.items()}
    lost = {key: loss**2 for key, loss in result.lost.items()}
    tensors = result.adapter.whole
    if not tensors.replacing.keys() - tensors.original.keys():
        kept |= {name: float(each.square().sum()) for name, each in tensors.differences(result.adapter).items()}
    whole = math.fsum(kept.values()) + math.fsum(lost.values())
    shares = {key: result.lost[key] / math.sqrt(kept[key] + square) for key, square in lost.items() if kept[key] + square > 0}
    worst = max(shares, key=shares.__getitem__, default=None)
    return Sizes(
        norm=math.sqrt(math.fsum(kept.values())),
        error=math.sqrt(math.fsum(lost.values()) / whole) if whole else 0.0,
        worst=None if worst is None else (worst, shares[worst]),
    )
