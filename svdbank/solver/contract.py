"""What every method takes and gives: a weight seen from its short side in, a candidate or a failure out.

All methods work on ``M`` of shape (k, n) with k ≤ n: the weight itself where out ≤ in, else its transpose as a view. ``short``
vectors live in the k rows of M, ``long`` vectors in its n columns; ``minor_basis`` names them left and right.
Failure is a value: a method that cannot serve a matrix says so and the next one is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.core.basis import Triplets
from svdbank.core.specs import Side

#: torch exports it, its type stubs do not.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
#: LAPACK counts workspace in 32-bit integers. ``syevd`` wants 2k² + 6k + 1 entries, ``gesdd`` 4k² + 7k.
LAPACK_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Block:
    """Singular triplets as columns: ``short`` (k, s), ``long`` (n, s), ``sigma`` (s,)."""

    short: Tensor
    long: Tensor
    sigma: Tensor

    def first(self, count: int) -> Block:
        """The leading ``count`` triplets."""
        return Block(self.short[:, :count], self.long[:, :count], self.sigma[:count])

    def flipped(self) -> Block:
        """The same triplets in the opposite order."""
        return Block(self.short.flip(1), self.long.flip(1), self.sigma.flip(0))


@dataclass(frozen=True)
class Candidate:
    """What a method claims, before the gates have judged it.

    Attributes
    ----------
    minor
        The ``rank`` triplets of the smallest singular values, ascending.
    principal
        The triplets of the largest singular values, descending; None when none were asked for.
    sigma_next
        σ_{R+1}; None when the block holds all.
    sigma_min, sigma_max
        Ends of the spectrum.
    spectrum
        All k singular values ascending where the method computed them, else None.
    gram
        ``M Mᵀ`` (k, k), needed to prove completeness where the spectrum is not known; the gates overwrite it.
    apply_inverse
        ``(M Mᵀ)⁻¹ X`` on the complement of the minor block, to correct what squaring κ costs; None where κ was not squared.
    notes
        What went wrong on the way and how it was got round, for the certificate.
    """

    minor: Block
    principal: Block | None
    sigma_next: float | None
    sigma_min: float
    sigma_max: float
    spectrum: Tensor | None
    gram: Tensor | None
    apply_inverse: Callable[[Tensor], Tensor] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a method has no candidate to offer."""

    reason: str


def triplets(left: Tensor, right: Tensor, sigma: Tensor, side: Side) -> Triplets:
    """Columns ``left`` (…, out, R) and ``right`` (…, in, R) with σ (…, R) as contiguous rows, signs canonical."""
    sign = canonical_signs(left).unsqueeze(-2)
    return Triplets(
        left=(left * sign).mT.contiguous(),
        right=(right * sign).mT.contiguous() if side == "both" else None,
        sigma=sigma.contiguous(),
    )


def canonical_signs(left: Tensor) -> Tensor:
    """±1 for each column of ``left`` (…, out, R): what makes its entry of largest magnitude positive, the first one on a tie."""
    magnitude = left.abs()
    # argmax does not promise the first of equal entries; the smallest index that attains the maximum does.
    count = left.shape[-2]
    index = torch.arange(count, device=left.device).unsqueeze(1)
    first = torch.where(magnitude == magnitude.amax(-2, keepdim=True), index, count).amin(-2, keepdim=True)
    entry = left.gather(-2, first.clamp_max(count - 1)).squeeze(-2)  # of NaN none is the largest
    return torch.where(entry < 0, -1.0, 1.0).to(left.dtype)
