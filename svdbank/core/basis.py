"""The values that a decomposition yields: minor triplets of one weight and the numbers that prove them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from svdbank.core.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

#: Machine epsilon of float64, the precision in which every basis is computed and certified.
EPSILON = 2.0**-52

#: Where ``100 ε σ_max / (σ_{r+1} − σ_r)`` exceeds this, the data do not define the rank-r subspace to 1e-6, whoever computes it.
UNRESOLVED = 1e-6

#: Largest residual let through, relative to σ_max. Backward-stable solves lie below 1e-12; the rest is room for κ near 1e7.
RESIDUAL_LIMIT = 1e-10
#: Largest entry of UᵀU − I let through. Householder factors reach about 1e-14; a lost vector shows as 1.
ORTHOGONALITY_LIMIT = 1e-11


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers that prove a basis, all measured in float64 before the cast to storage.

    Attributes
    ----------
    path
        Method whose result passed: ``dense``, ``shift-invert``, ``lq``, ``svd`` or ``zero``.
    tried
        Methods that ran before it, each with the gate it failed and the figure.
    dtype, device
        Working dtype and device type of the solve.
    rank_full
        ``min(out, in)``: how many singular values the weight has.
    sigma_max, sigma_min
        Largest and smallest singular value.
    sigma_next
        σ_{R+1}, the first one not in the basis; None when the basis holds all.
    orthogonality
        ``max(|UᵀU − I|, |VᵀV − I|)``, largest entry.
    residual
        ``max(‖W V − U Σ‖, ‖Wᵀ U − V Σ‖) / σ_max``, largest column. Zero on one side by construction; the other is the gate.
    angle_bound
        Residual over the gap at R (Wedin): bounds the sine of the angle to the true subspace. None when no gap exists.
    completeness
        How it was shown that nothing smaller was missed: ``cholesky`` (deflated factorisation) or ``spectrum`` (all were computed).
    """

    path: str
    tried: tuple[str, ...]
    dtype: str
    device: str
    rank_full: int
    sigma_max: float
    sigma_min: float
    sigma_next: float | None
    orthogonality: float
    residual: float
    angle_bound: float | None
    completeness: str


@dataclass(frozen=True)
class Triplets:
    """Singular triplets at one end of the spectrum, the outermost first.

    ``left`` is (R, out), ``right`` (R, in) or None, ``sigma`` (R,): row ``i`` of each belongs together.
    """

    left: Tensor
    right: Tensor | None
    sigma: Tensor


@dataclass(frozen=True)
class Basis:
    """Minor singular triplets of one weight ``W`` (out, in), most minor first, with their certificate.

    ``minor.left[i]`` is the left vector of the i-th smallest singular value, so every rank is a prefix. ``principal``, when asked
    for, holds the triplets of the largest singular values, largest first.
    """

    minor: Triplets
    certificate: Certificate
    principal: Triplets | None = None

    @property
    def rank(self) -> int:
        """Number of minor triplets held."""
        return int(self.minor.sigma.shape[0])

    def left(self, rank: int) -> Tensor:
        """``U[:, -rank:]`` of shape (out, rank), in PEFT's column order: the last column is the most minor direction."""
        return self.minor.left[: self._checked(rank)].flip(0).mT

    def right(self, rank: int) -> Tensor:
        """``V[:, -rank:]`` of shape (in, rank), in the same order as :meth:`left`."""
        if self.minor.right is None:
            raise OptionError("this basis was computed with side='left' and has no right vectors")
        return self.minor.right[: self._checked(rank)].flip(0).mT

    def sigma(self, rank: int) -> Tensor:
        """The ``rank`` smallest singular values of shape (rank,), in the same order as :meth:`left` (descending)."""
        return self.minor.sigma[: self._checked(rank)].flip(0)

    def _checked(self, rank: int) -> int:
        if not 1 <= rank <= self.rank:
            raise OptionError(f"rank {rank} is outside 1..{self.rank}, the ranks this basis holds")
        return rank


def unresolved_ranks(sigma: list[float], sigma_next: float | None, sigma_max: float) -> list[int]:
    """Ranks r whose subspace the data do not define to 1e-6: ``100 ε σ_max / (σ_{r+1} − σ_r) > 1e-6``.

    ``sigma`` ascends (most minor first). This is the only exemption from an accuracy claim.
    """
    ladder = sigma if sigma_next is None else [*sigma, sigma_next]
    floor = 100 * EPSILON * sigma_max / UNRESOLVED
    return [r for r in range(1, len(ladder)) if ladder[r] - ladder[r - 1] < floor]
