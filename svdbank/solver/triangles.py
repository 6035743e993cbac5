"""Symmetric matrices by their lower triangle: torch has no syrk."""

from __future__ import annotations

import torch
from torch import Tensor

#: Side of the diagonal tiles, which alone do double work.
TILE = 512
#: Side of the tiles that are transposed.
TURNED = 256


def lower_tiles(start: int, stop: int) -> list[tuple[slice, slice]]:
    """The lower triangle of rows ``start`` to ``stop`` in (rows, columns) tiles, halved recursively: few, large and nearly square."""
    if stop - start <= TILE:
        return [(slice(start, stop), slice(start, stop))]
    middle = (start + stop) // 2
    return [(slice(middle, stop), slice(start, middle)), *lower_tiles(start, middle), *lower_tiles(middle, stop)]


def mirror(matrix: Tensor) -> None:
    """Copy the lower triangle of ``matrix`` (k, k) onto the upper one, in tiles that stay in the cache while they are turned."""
    k = matrix.shape[0]
    for start in range(0, k, TURNED):
        rows = slice(start, min(start + TURNED, k))
        tile = matrix[rows, rows]
        tile.copy_(torch.tril(tile) + torch.tril(tile, -1).mT)
        for before in range(0, start, TURNED):
            columns = slice(before, before + TURNED)
            matrix[columns, rows] = matrix[rows, columns].mT
