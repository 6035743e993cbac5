"""From columns as the solver finds them to the rows with canonical signs that a basis holds."""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.core.basis import Triplets
from svdbank.core.specs import Side


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
