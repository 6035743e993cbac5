"""Merging methods that look at single coefficients: TIES, DARE, magnitude pruning.

Each takes the coefficients of all adapters of one weight, ``C`` (m, n, in) with zeros where an adapter does not reach, and gives their
merge (n, in). An element here is a coefficient on a direction of the bank, not an entry of ΔW.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
    In the dtype of ``C``: numbers of one sign are added, so nothing cancels.
    """
    weighted = C * torch.tensor(weights, dtype=C.dtype).view(-1, 1, 1)
    sign = weighted.sum(dim=0).sign_()
    agreeing = weighted.mul_(sign).clamp_(min=0)
    return agreeing.sum(dim=0).div_(agreeing.sign().sum(dim=0).clamp_(min=1)).mul_(sign)


def trimmed(C: Tensor, rows: Sequence[int], density: float) -> Tensor:
    """The largest ``density`` of each adapter's own coefficients by magnitude, the rest zero (arXiv 2306.01708, "trim").

    Coefficients as large as the smallest one kept are kept too.
    """
    kept = []
    for part, own in zip(C, rows, strict=True):
        size = own * C.shape[2]
        count = max(1, int(density * size))
        if count < size:
            magnitudes = part.abs().flatten().numpy()
            smallest = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
            # It keeps what is larger than its argument.
            part = torch.nn.functional.hardshrink(part, float(np.nextafter(smallest, magnitudes.dtype.type(-1))))
        kept.append(part)
    return torch.stack(kept)


def dropped(C: Tensor, density: float, generator: np.random.Generator) -> Tensor:
    """Each coefficient kept with probability ``density`` and divided by it, so that the mean stays (DARE, Yu et al., arXiv 2311.03099)."""
    kept = torch.from_numpy(generator.random(tuple(C.shape), dtype=np.float32) < density)
    return kept.to(C.dtype).mul_(C).div_(density)
