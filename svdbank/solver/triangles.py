"""Symmetric matrices by their lower triangle: torch has no syrk."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest side of the diagonal tiles, which alone do double work, and into how many rows of them a small matrix is cut at least.
TILE, ROWS = 512, 4
#: Side of the tiles that are transposed.
TURNED = 256


#: Side up to which a GPU multiplies a matrix whole: less work in smaller pieces takes longer there.
WHOLE_ON_CUDA = 2048


def tile_side(k: int, device_type: str = "cpu") -> int:
    """Largest side of a diagonal tile of a (k, k) matrix."""
    if device_type != "cpu" and k <= WHOLE_ON_CUDA:
        return k
    return min(TILE, -(-k // ROWS))


def lower_tiles(k: int, device_type: str = "cpu") -> list[tuple[slice, slice]]:
    """The lower triangle of a (k, k) matrix in (rows, columns) tiles, halved recursively: few, large and nearly square."""
    return _halved(0, k, tile_side(k, device_type))


def _halved(start: int, stop: int, side: int) -> list[tuple[slice, slice]]:
    if stop - start <= side:
        return [(slice(start, stop), slice(start, stop))]
    middle = (start + stop) // 2
    return [(slice(middle, stop), slice(start, middle)), *_halved(start, middle, side), *_halved(middle, stop, side)]


def mirror(matrix: Tensor) -> None:
    """Copy the lower triangle of ``matrix`` (k, k) onto the upper one, in tiles that stay in the cache while they are turned."""
    if matrix.is_cuda:  # a launch a tile would take longer than the whole
        matrix.copy_(torch.tril(matrix) + torch.tril(matrix, -1).mT)
        return
    k = matrix.shape[0]
    for start in range(0, k, TURNED):
        rows = slice(start, min(start + TURNED, k))
        tile = matrix[rows, rows]
        tile.copy_(torch.tril(tile) + torch.tril(tile, -1).mT)
        for before in range(0, start, TURNED):
            columns = slice(before, before + TURNED)
            matrix[columns, rows] = matrix[rows, columns].mT
