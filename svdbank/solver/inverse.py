"""The explicit inverse of a positive definite matrix by products: on a GPU a triangular solve costs ten of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Least side of the diagonal blocks that are inverted by substitution, all at once.
LEAST_BLOCK = 96
#: Rows of blocks that ``KᵀK`` is summed by, so that the zeros of K are not multiplied.
PANELS = 4


def inverse_factor(matrix: Tensor, shift: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """``(K, info)`` with ``K = L⁻¹`` and ``L Lᵀ = matrix - shift I`` for (…, k, k) and shifts (…); ``matrix`` is kept.

    ``info`` (…) is not 0 where that is not positive definite; K then means nothing. L is of the precision of ``matrix``, K of ``dtype``.
    """
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(shift.unsqueeze(-1))
    lower, info = torch.linalg.cholesky_ex(shifted)
    del shifted
    return inverse_lower(lower.to(dtype)), info


def inverse_lower(lower: Tensor) -> Tensor:
    """``L⁻¹`` for lower triangular (…, k, k): diagonal blocks by substitution, then pairs joined, all of a size in one product.

    ``[[P, 0], [Q, S]]⁻¹ = [[P⁻¹, 0], [-S⁻¹ Q P⁻¹, S⁻¹]]`` (Higham, *Accuracy and Stability*, 14.2: as stable as substitution).
    """
    k = lower.shape[-1]
    halvings = max(0, int(math.log2(max(1.0, k / LEAST_BLOCK))))
    block = -(-k // 2**halvings)
    size = block * 2**halvings
    leading = lower.shape[:-2]
    count = math.prod(leading)
    work = lower.reshape(count, k, k)
    if size > k:  # ones on the rest of the diagonal change nothing
        wide = torch.zeros(count, size, size, dtype=lower.dtype, device=lower.device)
        wide[:, :k, :k] = work
        wide[:, k:].diagonal(offset=k, dim1=1, dim2=2).fill_(1)
        work = wide
    result = torch.zeros(count, size, size, dtype=lower.dtype, device=lower.device)
    pieces = 2**halvings
    corners = _tiles(work, block, 0, 0, 1).reshape(count * pieces, block, block)
    unit = torch.eye(block, dtype=lower.dtype, device=lower.device)
    solved = torch.linalg.solve_triangular(corners, unit, upper=False)
    _tiles(result, block, 0, 0, 1).copy_(solved.reshape(count, pieces, block, block))
    side = block
    while side < size:
        pairs = size // (2 * side)
        first = _tiles(result, side, 0, 0, 2).reshape(count * pairs, side, side)
        second = _tiles(result, side, 1, 1, 2).reshape(count * pairs, side, side)
        below = _tiles(work, side, 1, 0, 2).reshape(count * pairs, side, side)
        _tiles(result, side, 1, 0, 2).copy_((second @ (below @ first)).neg_().reshape(count, pairs, side, side))
        side *= 2
    return result[:, :k, :k].reshape(*leading, k, k)


def _tiles(matrix: Tensor, side: int, row: int, column: int, step: int) -> Tensor:
    """A view (count, n, side, side): tile (``row`` + i ``step``, ``column`` + i ``step``) of each (size, size) matrix, i < n."""
    count, size, _ = matrix.shape
    whole, across, down = matrix.stride()
    n = size // (side * step)
    start = matrix.storage_offset() + side * (row * across + column * down)
    return matrix.as_strided((count, n, side, side), (whole, side * step * (across + down), across, down), start)


def gram_of_lower(lower: Tensor) -> Tensor:
    """``KᵀK`` for lower triangular K (…, k, k)."""
    k = lower.shape[-1]
    step = -(-k // PANELS)
    result = lower.new_zeros(lower.shape)
    for start in range(0, k, step):
        stop = min(k, start + step)
        rows = lower[..., start:stop, :stop]
        result[..., :stop, :stop] += rows.mT @ rows
    return result
