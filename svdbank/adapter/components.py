"""What an adapter adds to one weight, as values with exact small-matrix arithmetic.

A component is a product of two thin matrices, never the (out, in) matrix itself. :class:`InBank` stands on directions of a bank,
:class:`Free` on factors of its own. Sums are taken in float64 and rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from svdbank.core.errors import OptionError

#: What a weight is: in its model, a matrix or a table of vectors; of experts that a model keeps in one parameter, one of them; a matrix
#: that PEFT adapts as a parameter, by its name (routers).
Kind = Literal["linear", "embedding", "expert", "parameter"]

#: A half-open interval [start, stop) of minor indices, 0 = the most minor direction.
Band = tuple[int, int]


def bands_of(indices: Iterable[int]) -> tuple[Band, ...]:
    """The fewest disjoint bands that hold ``indices``, ascending."""
    found: list[list[int]] = []
    for index in sorted(set(indices)):
        if found and found[-1][1] == index:
            found[-1][1] = index + 1
        else:
            found.append([index, index + 1])
    return tuple((start, stop) for start, stop in found)


def indices_of(bands: Iterable[Band]) -> tuple[int, ...]:
    """Every index of the bands, in their order."""
    return tuple(index for start, stop in bands for index in range(start, stop))


@dataclass(frozen=True, eq=False)
class InBank:
    """``ΔW = left · C`` on bank directions, the LoRA scale folded into ``C``.

    Attributes
    ----------
    bands
        Minor indices of the directions: disjoint, ascending, adjacent ones joined.
    C
        Coefficients (n, in), float32; row k belongs to the k-th index of ``bands``.
    left
        The directions (out, n), as the files hold them: orthonormal to the rounding of their dtype.
    orthonormal
        True where ``left`` is the bank's float32 vectors to the bit, so that norms and inner products need only ``C``.
    max_rank
        A known bound on the rank of ``C``; n where nothing better is known.
    """

    bands: tuple[Band, ...]
    C: Tensor
    left: Tensor
    orthonormal: bool = True
    max_rank: int = 0

    def __post_init__(self) -> None:
        count = sum(stop - start for start, stop in self.bands)
        apart = all(one[1] < other[0] for one, other in pairwise(self.bands)) and all(
            start < stop for start, stop in self.bands
        )
        if not apart or self.C.shape[0] != count or self.left.shape[1] != count:
            raise OptionError(f"bands {self.bands} do not fit C {tuple(self.C.shape)} and directions {tuple(self.left.shape)}")
        if not 0 < self.max_rank <= count:
            object.__setattr__(self, "max_rank", count)

    @property
    def indices(self) -> tuple[int, ...]:
        """Minor index of each row of ``C``."""
        return indices_of(self.bands)

    @property
    def band(self) -> Band:
        """The hull of the bands."""
        return self.bands[0][0], self.bands[-1][1]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (n, in) and ``B`` (out, n) with ``ΔW = B A``."""
        return self.C, self.left


@dataclass(frozen=True, eq=False)
class Free:
    """``ΔW = B A`` on factors of its own: ``A`` (k, in) with the LoRA scale folded in, ``B`` (out, k). float32."""

    A: Tensor
    B: Tensor

    @property
    def max_rank(self) -> int:
        """Number of columns of ``B``."""
        return self.B.shape[1]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` (k, in) and ``B`` (out, k) with ``ΔW = B A``."""
        return self.A, self.B


Component = InBank | Free


def scaled(component: Component, factor: float) -> Component:
    """``factor · ΔW``, rounded to float32 once."""
    if factor == 1:
        return component
    if isinstance(component, InBank):
        return InBank(component.bands, _times(component.C, factor), component.left, component.orthonormal, component.max_rank)
    return Free(_times(component.A, factor), component.B)


def _times(matrix: Tensor, factor: float) -> Tensor:
    return (matrix.double() * factor).float()


def combined(terms: Sequence[tuple[float, Component]]) -> Component:
    """``Σ wᵢ ΔWᵢ`` as one component.

    Terms on bank directions stay there, on the union of their bands, as long as they mean the same directions to the bit: then rows of
    equal index add up and the rank grows only by new directions. Anything else becomes :class:`Free` by putting factors side by side,
    which is exact too, with a rank that is the sum of the ranks.
    """
    if not terms:
        raise OptionError("a sum of no components has no shape")
    if len(terms) == 1:
        return scaled(terms[0][1], terms[0][0])
    in_bank = [(weight, component) for weight, component in terms if isinstance(component, InBank)]
    total = _sum_in_bank(in_bank) if in_bank else None
    if total is not None and len(in_bank) == len(terms):
        return total
    free = [scaled(c, w) for w, c in terms if total is None or isinstance(c, Free)]
    factors = [part.factors for part in ([total, *free] if total is not None else free)]
    return Free(torch.cat([A for A, _ in factors]), torch.cat([B.float() for _, B in factors], dim=1))


def _sum_in_bank(terms: Sequence[tuple[float, InBank]]) -> InBank | None:
    """The sum on the union of the bands; None where one index stands for different columns (other roundings, another bank)."""
    first = terms[0][1]
    if all(term.bands == first.bands for _, term in terms):
        if not all(term.left is first.left or torch.equal(term.left, first.left) for _, term in terms):
            return None
        C = torch.zeros_like(first.C, dtype=torch.float64)
        for weight, term in terms:
            C.add_(term.C, alpha=weight)
        return InBank(first.bands, C.float(), first.left, all(t.orthonormal for _, t in terms), _bounded(terms, len(C)))
    union = sorted({index for _, term in terms for index in term.indices})
    position = {index: row for row, index in enumerate(union)}
    C = torch.zeros(len(union), first.C.shape[1], dtype=torch.float64)
    left = torch.zeros(first.left.shape[0], len(union))
    known = torch.zeros(len(union), dtype=torch.bool)
    for weight, term in terms:
        rows = torch.tensor([position[index] for index in term.indices])
        shared = known[rows]
        columns = term.left.float()
        if shared.any() and not torch.equal(left[:, rows[shared]], columns[:, shared]):
            return None
        left[:, rows] = columns
        known[rows] = True
        C.index_add_(0, rows, term.C.double(), alpha=weight)
    return InBank(bands_of(union), C.float(), left, all(t.orthonormal for _, t in terms), _bounded(terms, len(union)))


def _bounded(terms: Sequence[tuple[float, InBank]], count: int) -> int:
    return min(count, sum(term.max_rank for _, term in terms))


def inner(one: Component, other: Component) -> float:
    """``⟨ΔW₁, ΔW₂⟩``, the sum of products of entries, without forming an (out, in) matrix.

    On the bank's own directions it is ``⟨C₁, C₂⟩`` over the indices they share; otherwise ``⟨B₁ᵀB₂, A₁A₂ᵀ⟩``.
    """
    if isinstance(one, InBank) and isinstance(other, InBank) and one.orthonormal and other.orthonormal:
        return _inner_of_coefficients(one, other)
    (A1, B1), (A2, B2) = one.factors, other.factors
    return float(((B1.double().mT @ B2.double()) * (A1.double() @ A2.double().mT)).sum())


def squared_norm(component: Component) -> float:
    """``‖ΔW‖²`` (Frobenius) in float64: ``‖C‖²`` on the bank's own directions, else from Gram matrices."""
    if isinstance(component, InBank) and component.orthonormal:
        return float(torch.linalg.vector_norm(component.C.double())) ** 2
    return squared_norm_of(*component.factors)


def squared_norm_of(A: Tensor, B: Tensor) -> float:
    """``‖B A‖²`` (Frobenius) from the Gram matrices of ``A`` (k, in) and ``B`` (out, k) in float64; never below 0."""
    A, B = A.double(), B.double()
    return max(0.0, float(((B.mT @ B) * (A @ A.mT)).sum()))


def _inner_of_coefficients(one: InBank, other: InBank) -> float:
    if one.bands == other.bands:
        return float(torch.dot(one.C.double().flatten(), other.C.double().flatten()))
    place = {index: row for row, index in enumerate(other.indices)}
    shared = [(row, place[index]) for row, index in enumerate(one.indices) if index in place]
    if not shared:
        return 0.0
    mine, theirs = (list(side) for side in zip(*shared, strict=True))
    return float((one.C[mine].double() * other.C[theirs].double()).sum())


def off_orthonormal(B: Tensor) -> float:
    """``max |BᵀB − I|`` of the columns of B (out, k), in float64."""
    gram = B.double().mT @ B.double()
    return float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())
