"""``compare``: how large adapters are, how they lie to each other, and where they will fight, from coefficients alone."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from svdbank import cache
from svdbank.adapter.bands import share_in
from svdbank.adapter.components import Component, compact
from svdbank.adapter.model import Adapter
from svdbank.adapter.naming import bank_names
from svdbank.bank.reading import Bank
from svdbank.composition.coordinates import common_coordinates
from svdbank.composition.inputs import Places, check_touching, domains_of, notes_of, read_inputs
from svdbank.core.errors import BankError, OptionError
from svdbank.core.specs import Struct

#: A weight with a cosine below this has two adapters pulling against each other: unrelated ones of the sizes in use (rank 8 or more, inputs
#: of some hundred features) stay within ±0.05.
OPPOSED = -0.05

#: The same for adapters as a whole, where thousands of times more coefficients leave chance no room.
OPPOSED_IN_ALL = -0.02

#: Overlap and conflict below this are not worth a word: less than one part in a hundred of the adapters' size.
NEGLIGIBLE = 0.01

_LAYER = re.compile(r"\.(\d+)\.")


class Relation(Struct, frozen=True):
    """Two adapters in one place: a weight, a layer, or all.

    Attributes
    ----------
    where
        Weight or layer; empty for all.
    norms
        ‖ΔW‖ of the two, Frobenius, over the weights that both touch there.
    cosine
        ``⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)``: what is added to or taken from the sum's size; ``agreement − conflict``.
    agreement, conflict
        The share of ``‖ΔW₁‖ ‖ΔW₂‖`` in products of coefficients of equal and of opposite sign. Conflict is what cancels in the sum: 0
        where the adapters stand on directions of their own, about 0.3 each for unrelated adapters on the same directions.
    overlap
        Share of both adapters' ``‖ΔW‖²`` (their geometric mean) that lies in output directions of the other.
    weights
        How many weights both touch there.
    """

    where: str
    norms: tuple[float, float]
    cosine: float
    agreement: float
    conflict: float
    overlap: float
    weights: int


class Pair(Struct, frozen=True):
    """Two adapters, in all, by layer and by weight; and what that means, in a sentence."""

    one: str
    other: str
    all: Relation
    layers: tuple[Relation, ...]
    weights: tuple[Relation, ...]
    verdict: str


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


class CompareReport(Struct, frozen=True):
    """Sizes of the adapters and relations of all pairs. ``image`` is the heat map that was written."""

    adapters: tuple[Size, ...]
    pairs: tuple[Pair, ...]
    image: str | None
    notes: tuple[str, ...]


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


def compare(
    adapters: Places,
    *,
    bank: str | Path | Bank | None = None,
    rebase: str | Path | Bank | None = None,
    image: str | Path | None = None,
) -> CompareReport:
    """Compare two adapters or more, pair by pair, without a model and without an (out, in) matrix.

    Parameters
    ----------
    adapters
        Folders, ``NAME=DIR``, or folders by name; a folder that ``stack`` wrote counts as the domains in it.
    bank
        Bank of the base: recognises factors that stand on its directions, and gives the share of each adapter in its minor subspace.
        One adapter alone may then be looked at.
    rebase
        As in :func:`svdbank.composition.inputs.read_inputs`.
    image
        File of a heat map, cosines by layer: ``.svg`` or ``.png``. Needs matplotlib (``pip install 'svdbank[report]'``).

    Raises :class:`OptionError` for adapters without a common weight and for two domains of one name, :class:`WrongBaseError` for
    adapters of different bases.
    """
    from svdbank.reporting.figures import check_image, draw_cosines

    if image is not None:
        check_image(Path(image))
    opened = cache.opened(bank)
    read = read_inputs(adapters, bank=opened, rebase=rebase)
    parts = domains_of(read)
    if len(parts) < 2 and opened is None:
        raise OptionError(
            "comparing takes two adapters or more", hint="with --bank BANK, one is compared with the minor subspace"
        )
    if len(parts) > 1:
        check_touching(parts)
    pairs = tuple(_pair(one, parts[one], other, parts[other]) for one, other in itertools.combinations(parts, 2))
    sizes = tuple(_size(name, adapter, opened) for name, adapter in parts.items())
    report = CompareReport(sizes, pairs, None if image is None else str(Path(image)), tuple(notes_of(read)))
    if image is not None:
        columns = ["all", *dict.fromkeys(relation.where for pair in pairs for relation in pair.layers)]
        values = [[_cosine(pair, column) for column in columns] for pair in pairs]
        draw_cosines([(pair.one, pair.other) for pair in pairs], columns, values, Path(image))
    return report


def _cosine(pair: Pair, column: str) -> float:
    if column == "all":
        return float(pair.all.cosine)
    return next((float(relation.cosine) for relation in pair.layers if relation.where == column), float("nan"))


def _size(name: str, adapter: Adapter, bank: Bank | None) -> Size:
    return Size(
        name=name,
        norm=adapter.norm(),
        rank=adapter.rank,
        touched=len(adapter.weights),
        in_bank=sum(weight.in_bank for weight in adapter.weights.values()),
        share=None if bank is None else _share(adapter, bank),
    )


def _share(adapter: Adapter, bank: Bank) -> float:
    """Share of ``‖ΔW‖²`` over all weights in what the bank stores of them."""
    names = bank_names(bank, list(adapter.weights))
    if len(names) < len(adapter.weights):
        raise BankError(
            f"{bank.path}: the bank lacks {len(adapter.weights) - len(names)} weights of the adapter",
            hint="svdbank build MODEL --targets … adds them",
        )
    inside = whole = 0.0
    for key, weight in adapter.weights.items():
        left = bank.left([names[key]], bank[names[key]].rank)[names[key]].mT
        A, B = (factor.double() for factor in weight.total().factors)
        square = max(0.0, float(((B.mT @ B) * (A @ A.mT)).sum()))
        whole += square
        inside += square * share_in(left, weight.total())
    return inside / whole if whole else 1.0


def _pair(one: str, first: Adapter, other: str, second: Adapter) -> Pair:
    sums = {
        key: _sums(first.weights[key].total(), second.weights[key].total()) for key in first.weights if key in second.weights
    }
    layers: dict[str, list[_Sums]] = {}
    for key, found in sums.items():
        layers.setdefault(layer_of(key), []).append(found)
    by_weight = tuple(found.relation(key) for key, found in sums.items())
    by_layer = tuple(_added(found).relation(layer) for layer, found in sorted(layers.items(), key=lambda item: _order(item[0])))
    total = _added(sums.values())
    whole = total.relation("")
    nothing = [name for name, square in zip((one, other), total.squares, strict=True) if sums and not square]
    verdict = f"{' and '.join(nothing)}: ΔW is zero there" if nothing else _verdict(one, other, whole, by_layer, by_weight)
    return Pair(one, other, whole, by_layer, by_weight, verdict)


def _sums(one: Component, other: Component) -> _Sums:
    at = common_coordinates([one, other], exact_norms=True)
    first, second = at.C.double()
    products = first * second
    opposing = -float(products.clamp(max=0).sum())
    agreeing = float(products.clamp(min=0).sum())
    squares = (float(first.square().sum()), float(second.square().sum()))
    if at.bands is not None and not _cut(one) and not _cut(other):
        reached = [part.abs().sum(dim=1) > 0 for part in (first, second)]
        within = (float(first[reached[1]].square().sum()), float(second[reached[0]].square().sum()))
    else:
        within = (_inside(first, other, at.directions), _inside(second, one, at.directions))
    return _Sums(squares, agreeing, opposing, within)


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


def _verdict(one: str, other: str, whole: Relation, layers: tuple[Relation, ...], weights: tuple[Relation, ...]) -> str:
    """Whether two adapters meet, agree or fight, and where."""
    names = f"{one} and {other}"
    if not weights:
        return f"{names} touch no weight in common"
    against = sorted((relation for relation in weights if relation.cosine < OPPOSED), key=lambda relation: relation.cosine)
    worst = "".join(f"{r.where} (cosine {r.cosine:+.2f})" for r in against[:1])
    places = f"{len(against)} of {len(weights)} weights, most in {worst}"
    if whole.cosine < OPPOSED_IN_ALL:
        layer = min(layers, key=lambda relation: relation.cosine)
        where = "" if layer.where == "-" else f", most of all in layer {layer.where} ({layer.cosine:+.2f})"
        among = f"in {places}" if against else f"a little in many weights, in none below {OPPOSED:+.2f}"
        return f"{names} fight: they pull against each other as a whole (cosine {whole.cosine:+.2f}){where}; {among}"
    agree = whole.cosine > -OPPOSED_IN_ALL
    if against:
        return f"{names} fight in {places}" + (f"; as a whole they agree (cosine {whole.cosine:+.2f})" if agree else "")
    if whole.overlap < NEGLIGIBLE and whole.conflict < NEGLIGIBLE:
        return f"{names} do not meet: their outputs lie in directions of their own"
    how = "and agree there" if agree else "without pulling together or against each other"
    cancels = whole.conflict >= NEGLIGIBLE
    lost = f"coefficients of opposite sign cancel {whole.conflict:.0%}" if cancels else "nothing cancels"
    return f"{names} share directions ({whole.overlap:.0%} of their size) {how} (cosine {whole.cosine:+.2f}); {lost}"
