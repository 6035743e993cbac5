"""Merging methods that look at single coefficients: TIES, DARE, magnitude pruning.

Each takes the coefficients of all adapters of one weight, ``C`` (m, n, in) with zeros where an adapter does not reach, and gives their
merge (n, in) in float64. An element here is a coefficient on a direction of the bank, not an entry of ΔW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def summed(C: Tensor, weights: Sequence[float]) -> Tensor:
    """``Σ wᵢ Cᵢ`` in float64 (task arithmetic, Ilharco et al., arXiv 2212.04089)."""
    total = torch.zeros(C.shape[1:], dtype=torch.float64)
    for part, weight in zip(C, weights, strict=True):
        total.add_(part, alpha=weight)
    return total


def elected(C: Tensor, weights: Sequence[float]) -> Tensor:
    """Sign election and disjoint mean of TIES (Yadav et al., arXiv 2306.01708, section 3) over the weighted coefficients.

    Each element keeps the sign with the larger total; the result is the mean over the adapters that have that sign, zeros not counted.
    """
    weighted = C.double() * torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1)
    sign = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = weighted * sign > 0
    return (weighted * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def trimmed(C: Tensor, rows: Sequence[int], density: float) -> Tensor:
    """The largest ``density`` of each adapter's own coefficients by magnitude, the rest zero (arXiv 2306.01708, "trim")."""
    kept = torch.zeros_like(C)
    for part, own, out in zip(C, rows, kept, strict=True):
        count = max(1, int(density * own * C.shape[2]))
        flat = part.flatten()
        if count >= own * C.shape[2]:
            out.copy_(part)
            continue
        chosen = flat.abs().topk(count, sorted=False).indices
        out.view(-1)[chosen] = flat[chosen]
    return kept


def dropped(C: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each coefficient kept with probability ``density`` and divided by it, so that the mean stays (DARE, Yu et al., arXiv 2311.03099)."""
    kept = torch.rand(C.shape, generator=generator) < density
    return C.double() * kept / density
