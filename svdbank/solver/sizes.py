"""How wide blocks, panels, tiles and batches are, from shape and rank alone: what the paths work with and a plan counts with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Kinds of device that a plan chooses paths for.
DeviceKind = Literal["cpu", "cuda", "cuda-low-float64"]

#: Entries between the end of a row and the start of the next: one cache line. Rows that start a multiple of 4 KiB apart, as those of most
#: weights do, fall into the same few sets of the cache, and products down their columns take two to three times as long.
PADDING = 8
#: Largest side of the diagonal tiles, which alone do double work, and into how many rows of them a small matrix is cut at least.
TILE, ROWS = 512, 4
#: Side up to which a GPU multiplies a matrix whole: less work in smaller pieces takes longer there.
WHOLE_ON_CUDA = 2048
#: float64 entries of a widened panel: 128 MiB; on a GPU 2 GiB, so that a weight is widened once and multiplied whole.
PANEL_ENTRIES = 2**24
DEVICE_PANEL_ENTRIES = {"cpu": PANEL_ENTRIES, "cuda": 2**28}
#: Columns of a block of the Cholesky factorisation: wide enough for GEMM's rate, narrow enough that the unblocked part stays small
#: (measured: 256 of 128, 256, 512).
CHOLESKY_BLOCK = 256
#: The filter's block: columns a vector wanted, and least number beyond them. Columns times products come out the same from 1.4 to 2
#: (measured); a narrow block has the smaller eigenproblem.
FILTER_WIDTH, LEAST_SPARE = 1.5, 32
#: float64 entries of a batch's widened weights, 2 GiB, and the most and the fewest weights in it.
BATCH_ENTRIES = 2**28
MOST_IN_BATCH, LEAST_IN_BATCH = 64, 4


def tile_side(k: int, device_type: str = "cpu") -> int:
    """Largest side of a diagonal tile of a (k, k) matrix."""
    if device_type != "cpu" and k <= WHOLE_ON_CUDA:
        return k
    return min(TILE, -(-k // ROWS))


def panel_width(k: int, n: int, entries: int = PANEL_ENTRIES) -> int:
    """Columns of a panel: as many as fit ``entries``, at least 64."""
    return min(n, max(64, entries // k))


def buffer_size(k: int, rank: int) -> int:
    """Vectors kept beyond ``rank`` during the projection.

    Inside the projected space Rayleigh–Ritz restores what the Gram matrix lost between neighbours, so the loss at the rank's own boundary
    depends on the gap to the first vector beyond the buffer.
    """
    return min(k - rank, max(8, rank // 8))


@dataclass(frozen=True)
class Shape:
    """Of a block Lanczos iteration: block width, where the basis is cut back, and how many Ritz vectors survive the cut."""

    block: int
    limit: int
    keep: int


def shape_for(k: int, wanted: int) -> Shape | None:
    """Sizes measured to be good for ``wanted`` pairs of a (k, k) operator; None where k leaves no room for an iteration."""
    block = 32 if wanted > 32 else 16 if wanted > 4 else 8
    block = min(block, max(1, k // 8))
    limit = -(-max(5 * wanted, wanted + 8 * block) // block) * block
    limit = min(limit, k - block)
    keep = min(max(3 * wanted, wanted + 2 * block), limit - 2 * block)
    return Shape(block, limit, keep) if keep >= wanted + 1 else None


def block_width(k: int, rank: int) -> int | None:
    """Columns of the filter's block for ``rank`` vectors of a (k, k) operator; None where k leaves no room for an iteration."""
    wanted = rank + buffer_size(k, rank)
    width = max(int(FILTER_WIDTH * rank), wanted + LEAST_SPARE)
    width = -(-width // 8) * 8
    return width if width <= k // 2 else None


def batch_size(out_features: int, in_features: int, count: int, kind: DeviceKind = "cuda") -> int:
    """How many of ``count`` weights (out, in) are solved at once on a ``kind`` of GPU: a static rule, 1 where no batch pays.

    Batches work in float64 throughout: not on a card that has little of it.
    """
    if kind != "cuda":
        return 1
    size = min(MOST_IN_BATCH, count, max(1, BATCH_ENTRIES // (out_features * in_features)))
    return size if size >= LEAST_IN_BATCH else 1
