"""Sizes of adapters and angles between them, from coefficients or factors alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from svdbank.adapter.bands import share_in
from svdbank.adapter.components import Component
from svdbank.adapter.model import Adapter
from svdbank.adapter.spectra import compact
from svdbank.adapter.weights import names_in
from svdbank.bank.reading import Bank
from svdbank.composition.coordinates import common_coordinates
from svdbank.composition.relations import Pair, Relation, verdict
from svdbank.core.errors import BankError
from svdbank.core.specs import Struct

_LAYER = re.compile(r"\.(\d+)\.")


class Size(Struct, frozen=True):
    """One adapter: its norm over all weights, its largest rank, the weights it touches, how many of them stand on directions of a bank.

    ``share`` is the part of its ``‖ΔW‖²`` in the minor subspace that the bank stores, None without a bank.
    """

    name: str
    norm: float
    rank: int
    touched: int
    in_bank: int
    share: float | None


@dataclass(frozen=True)
class _Sums:
    """Sums over weights from which a :class:`Relation` follows; they add up."""

    squares: tuple[float, float]
    agreeing: float
    opposing: float
    within: tuple[float, float]
    weights: int = 1

    def relation(self, where: str) -> Relation:
        one, other = (math.sqrt(square) for square in self.squares)
        size = one * other
        shares = [inside / whole if whole else 0.0 for inside, whole in zip(self.within, self.squares, strict=True)]
        return Relation(
            where=where,
            norms=(one, other),
            cosine=(self.agreeing - self.opposing) / size if size else 0.0,
            agreement=self.agreeing / size if size else 0.0,
            conflict=self.opposing / size if size else 0.0,
            overlap=math.sqrt(max(0.0, shares[0] * shares[1])),
            weights=self.weights,
        )


def measure(name: str, adapter: Adapter, bank: Bank | None) -> Size:
    """How large an adapter is. Raises :class:`BankError` for weights that a given bank lacks."""
    return Size(
        name=name,
        norm=adapter.norm(),
        rank=adapter.rank,
        touched=len(adapter.weights) + len(adapter.whole.replacing),
        in_bank=sum(weight.in_bank for weight in adapter.weights.values()),
        share=None if bank is None else _share(adapter, bank),
    )


def _share(adapter: Adapter, bank: Bank) -> float:
    """Share of ``‖ΔW‖²`` over all weights in what the bank stores of them."""
    adapter.whole.refuse_replacing(adapter, "their share in a bank's directions is not measured")
    names = names_in(bank, adapter.weights)
    if len(names) < len(adapter.weights):
        raise BankError(
            f"{bank.place}: the bank lacks {len(adapter.weights) - len(names)} weights of the adapter",
            hint="svdbank build MODEL --targets … adds them",
        )
    inside = whole = 0.0
    for key, weight in adapter.weights.items():
        left = bank.left([names[key]], bank[names[key]].rank)[names[key]].mT
        whole += weight.squared_norm
        inside += weight.squared_norm * share_in(left, weight.total())
    return inside / whole if whole else 1.0


def relate(one: str, first: Adapter, other: str, second: Adapter) -> Pair:
    """Two adapters in every weight that both touch, summed by layer and in all; ``one`` and ``other`` are their names."""
    sums = {
        key: _sums(first.weights[key].total(), second.weights[key].total()) for key in first.weights if key in second.weights
    }
    mine, theirs = first.whole.differences(one), second.whole.differences(other)
    sums |= {name: _sums_of_whole(mine[name], theirs[name]) for name in mine if name in theirs}
    layers: dict[str, list[_Sums]] = {}
    for key, found in sums.items():
        layers.setdefault(layer_of(key), []).append(found)
    by_weight = tuple(found.relation(key) for key, found in sums.items())
    by_layer = tuple(_added(found).relation(layer) for layer, found in sorted(layers.items(), key=lambda item: _order(item[0])))
    total = _added(sums.values())
    whole = total.relation("")
    return Pair(one, other, whole, by_layer, by_weight, verdict(one, other, whole, by_layer, by_weight))


def _sums(one: Component, other: Component) -> _Sums:
    at = common_coordinates([one, other], exact_norms=True)
    first, second = at.C.double()
    products = first * second
    opposing = 0.0 - float(products.clamp(max=0).sum())  # never −0, which would be shown
    agreeing = float(products.clamp(min=0).sum())
    squares = (float(first.square().sum()), float(second.square().sum()))
    if at.bands is not None and not _cut(one) and not _cut(other):
        reached = [part.abs().sum(dim=1) > 0 for part in (first, second)]
        within = (float(first[reached[1]].square().sum()), float(second[reached[0]].square().sum()))
    else:
        within = (_inside(first, other, at.directions), _inside(second, one, at.directions))
    return _Sums(squares, agreeing, opposing, within)


def _sums_of_whole(one: torch.Tensor, other: torch.Tensor) -> _Sums:
    """Of ``W − W₀`` of two whole tensors, entry by entry; a vector is one column."""
    one, other = (each.reshape(each.shape[0], -1) for each in (one, other))
    products = one * other
    within = []
    for each, against in ((one, other), (other, one)):
        left, sigma, _ = torch.linalg.svd(against, full_matrices=False)
        left = left[:, sigma > 1e-9 * sigma.max()]
        within.append(float((left.mT @ each).square().sum()))
    return _Sums(
        squares=(float(one.square().sum()), float(other.square().sum())),
        agreeing=float(products.clamp(min=0).sum()),
        opposing=0.0 - float(products.clamp(max=0).sum()),
        within=(within[0], within[1]),
    )


def _cut(component: Component) -> bool:
    """Whether ``ΔW`` reaches fewer outputs than the directions it is written on, as after a truncation."""
    return component.max_rank < component.factors[0].shape[0]


def _inside(C: torch.Tensor, other: Component, directions: torch.Tensor) -> float:
    """``‖P ΔW‖²`` with P on the outputs that the other's ``ΔW`` reaches."""
    A, B = (factor.double() for factor in compact(other))
    used = B[:, A.abs().sum(dim=1) > 0]
    if not used.shape[1]:
        return 0.0
    own, sigma, _ = torch.linalg.svd(directions.double().mT @ used, full_matrices=False)
    own = own[:, sigma > 1e-9 * sigma.max()]
    return float((own.mT @ C).square().sum())


def _added(found: Iterable[_Sums]) -> _Sums:
    parts = list(found)
    return _Sums(
        squares=(math.fsum(p.squares[0] for p in parts), math.fsum(p.squares[1] for p in parts)),
        agreeing=math.fsum(p.agreeing for p in parts),
        opposing=math.fsum(p.opposing for p in parts),
        within=(math.fsum(p.within[0] for p in parts), math.fsum(p.within[1] for p in parts)),
        weights=len(parts),
    )


def layer_of(key: str) -> str:
    """Number of the layer in a module's path; ``-`` for weights outside the layers."""
    found = _LAYER.search(f".{key}.")
    return found[1] if found else "-"


def _order(layer: str) -> tuple[int, int]:
    return (0, int(layer)) if layer.isdigit() else (1, 0)
