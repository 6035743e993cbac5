"""How large matrices lie in memory, and symmetric ones by their lower triangle: torch has no syrk."""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.solver.sizes import PADDING, tile_side

#: Side of the tiles that are transposed.
TURNED = 256


def padded_rows(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """An uninitialised (rows, columns) matrix whose rows lie apart by :data:`~svdbank.solver.sizes.PADDING` entries."""
    return torch.empty(rows, columns + PADDING, dtype=dtype, device=device)[:, :columns]


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
