"""What a solve will cost, from shape and rank alone: the rule that a plan freezes."""

from __future__ import annotations

from svdbank.core.errors import OptionError
from svdbank.solver.sizes import (
    CHOLESKY_BLOCK,
    DEVICE_PANEL_ENTRIES,
    PADDING,
    DeviceKind,
    block_width,
    buffer_size,
    panel_width,
    shape_for,
    tile_side,
)

#: Names a caller may force; ``auto`` follows :func:`choose_path`.
PATHS = ("shift-invert", "filter", "dense", "lq", "svd")
#: Short side from which the iteration can pay at all, and its least ratio to the rank. Measured on LLM-like weights twice as long
#: as wide, on one thread and on two: up to k = 1024 the dense path is faster or equal at every rank, at 1536 they meet at k = 12 R, at
#: 2048 and 12 R the iteration is 1.3 to 1.4 times faster, at 8 R slower or equal.
ITERATE_FROM = 1280
ITERATE_RATIO = 12
#: The same for the filter on a GPU. Measured on an H200 on weights three times as long as wide: at k = 768 the dense path is a fifth
#: faster, at 1024 and 8 R they meet, at 1536 and 6 R the filter is a tenth faster. In a batch it is from 256 on, wherever its block fits.
FILTER_FROM, FILTER_RATIO = 1024, 6
BATCH_FROM = 256


def choose_path(
    out_features: int, in_features: int, rank: int, kind: DeviceKind = "cpu", batch: int = 1, principal: int = 0
) -> str:
    """The method for a weight (out, in) at ``rank`` on a ``kind`` of device, where ``batch`` of them may be solved at once.

    A static rule, so that the same plan gives the same bytes. Where ``principal`` triplets are wanted too, a GPU takes the dense path: the
    filter's count of what it gained is right below the bulk of a spectrum and far too hopeful above it.
    """
    check_rank(out_features, in_features, rank)
    k = min(out_features, in_features)
    if kind != "cpu":
        if principal:
            return "dense"
        if batch > 1 and k >= BATCH_FROM and block_width(k, rank) is not None:
            return "filter"
        return "filter" if k >= FILTER_FROM and k >= FILTER_RATIO * rank else "dense"
    return "shift-invert" if k >= ITERATE_FROM and k >= ITERATE_RATIO * rank else "dense"


def check_rank(out_features: int, in_features: int, rank: int) -> None:
    """Raise OptionError unless ``1 ≤ rank ≤ min(out, in)``."""
    most = min(out_features, in_features)
    if not 1 <= rank <= most:
        raise OptionError(f"rank {rank} is outside 1..{most}, what a {out_features}×{in_features} weight has")


def flops(out_features: int, in_features: int, rank: int, path: str) -> float:
    """Floating-point operations of a solve that passes at the first attempt, gates included; the iteration's share is an estimate."""
    k, n = sorted((out_features, in_features))
    size = rank + buffer_size(k, rank)
    # Rayleigh–Ritz product, both residuals; two QR-like passes over the long vectors.
    thin = 2.0 * k * n * (size + 2 * rank) + 8.0 * n * size**2
    gram = (1 + tile_side(k) / k) * k * k * n
    if path == "shift-invert":
        columns = 8.0 * rank + 100.0
        iteration = columns * (2.0 * k * k + 8.0 * k * 4 * size) + 3 * 9.0 * (5 * size) ** 3
        return gram + 2 * k**3 / 3 + iteration + thin
    if path == "filter":
        # Two factors, inverses of factors and their squares; some thirty products with the block, six orthonormalisations.
        width = block_width(k, rank) or k
        inverses = 2 * (k**3 / 3 + 2 * k**3 / 3 + k**3)
        return gram + inverses + 30 * 2.0 * k * k * width + 6 * 6.0 * k * width**2 + 9.0 * width**3 + thin
    if path == "dense":
        return gram + 9.0 * k**3 + thin
    if path == "lq":
        return 4.0 * k * k * n + 22.0 * k**3 + thin
    if path == "svd":
        return 8.0 * k * k * n + 22.0 * k**3 + thin
    raise OptionError(f"no solver path is called {path!r}")


def peak_bytes(out_features: int, in_features: int, rank: int, path: str, *, dtype_bytes: int, kind: DeviceKind = "cpu") -> int:
    """Upper bound of the memory that a solve on ``path`` holds, in bytes, the weight itself (``dtype_bytes`` an entry) included.

    Holds for that path; one that fails a gate hands over to ``lq``, whose own bound then counts. The interpreter with torch
    loaded, and the BLAS's per-thread buffers, come on top.
    """
    k, n = sorted((out_features, in_features))
    entry = 8
    held = k * n * dtype_bytes
    size = min(k, rank + buffer_size(k, rank))
    square = entry * k * k
    entries = DEVICE_PANEL_ENTRIES["cpu" if kind == "cpu" else "cuda"]
    panel = 2 * entry * (k + PADDING) * (panel_width(k, n, entries) + PADDING)  # one in use while the next is made
    # Widest moment, a Newton step: triplets with their buffer, product, difference, QR's copy and result, signed vectors, defects.
    thin = entry * (8 * n + 8 * k) * size
    if path == "shift-invert":
        shape = shape_for(k, size)
        rows = 0 if shape is None else 2 * shape.limit + 4 * shape.block
        return held + 2 * square + panel + max(thin, entry * (k + PADDING) * rows) + entry * 3 * k * CHOLESKY_BLOCK
    if path == "filter":
        # Widened weight; G, a shifted copy, L, its inverse's work and result; the block six times, then T, its parts and the thin ones.
        width = block_width(k, rank) or k
        return held + panel // 2 + 5 * square + entry * (6 * k + 3 * n) * width + thin
    if path == "dense":
        # G, its eigenvectors, and syevd's workspace of 2 k² entries.
        return held + 5 * square + panel + thin
    if path == "lq":
        # The widened weight and Q while factorising; Q, the factor, U, V, a copy and gesdd's 4 k² after it.
        return held + max(2 * entry * k * n + 2 * square, entry * k * n + 9 * square) + thin
    if path == "svd":
        return held + 3 * entry * k * n + 7 * square + thin
    raise OptionError(f"no solver path is called {path!r}")


def batch_peak_bytes(out_features: int, in_features: int, rank: int, batch: int, *, dtype_bytes: int) -> int:
    """Upper bound of the device memory that a batch on the ``filter`` path holds, in bytes, its weights (stacked too) included."""
    k, n = sorted((out_features, in_features))
    width = block_width(k, rank) or k
    size = rank + buffer_size(k, rank)
    # Widened, and G, a shifted copy, L, K's work and result; the block six times, T and its parts; triplets, defects and corrections.
    each = 2 * dtype_bytes * k * n + 8 * (k * n + 5 * k * k + (6 * k + 2 * n) * width + 6 * (n + k) * size)
    return batch * each
