"""Stacking as a value: the sum of domains, each still apart in it, and which of them stand on each other's directions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from svdbank.adapter.components import Band, Component, InBank
from svdbank.adapter.model import Adapter, combination
from svdbank.core.specs import Struct


class Domain(Struct, frozen=True):
    """One domain of a stack: what it was multiplied by now, its norm after that, how many weights it touches, and its bands' hull."""

    scale: float
    norm: float
    touched: int
    band: Band | None


class Overlap(Struct, frozen=True):
    """Two domains that stand on directions of each other: in how many of the weights that both touch."""

    one: str
    other: str
    weights: int
    of: int


def stacked(domains: Mapping[str, Adapter], scales: Mapping[str, float]) -> Adapter:
    """``Σ scaleᵢ ΔWᵢ`` with every domain as a component of its own, in the order given; the sum is the same to the bit in any."""
    return combination([(scales[name], domain) for name, domain in domains.items()])


def as_domain(adapter: Adapter, scale: float) -> Domain:
    """What an adapter is in a stack, multiplied by ``scale``."""
    bands = [band for key in adapter.weights for band in adapter.bands(key)]
    hull = (min(start for start, _ in bands), max(stop for _, stop in bands)) if bands else None
    return Domain(scale, (scale * adapter).norm(), len(adapter.weights), hull)


def overlaps(domains: Mapping[str, Adapter]) -> list[Overlap]:
    """The pairs of domains whose outputs can add up on one direction."""
    meeting = []
    for (one, first), (other, second) in itertools.combinations(domains.items(), 2):
        both = [key for key in first.weights if key in second.weights]
        count = sum(_meet(first.weights[key].total(), second.weights[key].total()) for key in both)
        if count:
            meeting.append(Overlap(one, other, count, len(both)))
    return meeting


def _meet(one: Component, other: Component) -> bool:
    """Whether outputs of two components can add up on one direction: free factors may stand anywhere."""
    if isinstance(one, InBank) and isinstance(other, InBank):
        return bool(set(one.indices) & set(other.indices))
    return True
