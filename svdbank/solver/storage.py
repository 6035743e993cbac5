"""How large float64 matrices lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

#: Entries between the end of a row and the start of the next: one cache line. Rows that start a multiple of 4 KiB apart, as those of most
#: weights do, fall into the same few sets of the cache, and products down their columns take two to three times as long.
PADDING = 8


def padded_rows(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """An uninitialised (rows, columns) matrix whose rows lie apart by :data:`PADDING` entries."""
    return torch.empty(rows, columns + PADDING, dtype=dtype, device=device)[:, :columns]
