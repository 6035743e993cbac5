"""Products with a weight in float64, by panels, so that a large weight is never widened whole.

A float64 Gram matrix of bfloat16 or float32 data is nearly exact (Demmel & Veselić 1992 discuss what it costs: κ is squared).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: float64 entries of a widened panel: 128 MiB.
PANEL_ENTRIES = 2**24
#: Block rows of the Gram matrix: torch has no syrk; with eight, (8 + 1) / 16 of a full product's flops are done.
BLOCK_ROWS = 8


def panels(matrix: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(columns, matrix[:, columns] widened)`` in order; ``matrix`` is (k, n)."""
    k, n = matrix.shape
    width = panel_width(k, n)
    for start in range(0, n, width):
        columns = slice(start, min(start + width, n))
        yield columns, matrix[:, columns].to(dtype)


def panel_width(k: int, n: int) -> int:
    """Columns of a panel: as many as fit :data:`PANEL_ENTRIES`, at least 64."""
    return min(n, max(64, PANEL_ENTRIES // k))


def gram(matrix: Tensor) -> Tensor:
    """``M Mᵀ`` of a (k, n) matrix in float64: (k, k), symmetric to the last bit."""
    k = matrix.shape[0]
    result = torch.zeros(k, k, dtype=torch.float64, device=matrix.device)
    rows = block_rows(k)
    for _, panel in panels(matrix):
        for row in rows:
            result[row, : row.stop].addmm_(panel[row], panel[: row.stop].mT)
    for row in rows:
        result[: row.start, row] = result[row, : row.start].mT
        corner = result[row, row]
        corner.copy_(torch.tril(corner) + torch.tril(corner, -1).mT)
    return result


def block_rows(k: int) -> list[slice]:
    """The rows of a (k, k) matrix in at most :data:`BLOCK_ROWS` slices of at least 128."""
    height = max(128, -(-k // BLOCK_ROWS))
    return [slice(start, min(start + height, k)) for start in range(0, k, height)]


def transposed_product(matrix: Tensor, short: Tensor) -> Tensor:
    """``Mᵀ X`` for X (k, s): (n, s) in float64."""
    result = torch.empty(matrix.shape[1], short.shape[1], dtype=torch.float64, device=matrix.device)
    for columns, panel in panels(matrix):
        torch.mm(panel.mT, short, out=result[columns])
    return result


def product(matrix: Tensor, long: Tensor) -> Tensor:
    """``M Y`` for Y (n, s): (k, s) in float64."""
    result = torch.zeros(matrix.shape[0], long.shape[1], dtype=torch.float64, device=matrix.device)
    for columns, panel in panels(matrix):
        result.addmm_(panel, long[columns])
    return result
