"""Freed memory goes back to the system between shards; what a GPU solved comes back to the host."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from svdbank.basis import Basis, Triplets


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Hand free pages of the heap back (glibc's ``malloc_trim``); nothing where the C library has no such call.

    Once a large block was freed, glibc keeps blocks of that size in its heap, and their fragments add up over many weights.
    """
    if (trim := _trim()) is not None:
        trim(0)


def brought_home(basis: Basis, dtype: torch.dtype) -> Basis:
    """``basis`` on the CPU, its vectors in ``dtype``: rounded where they were computed, fetched into page-locked memory.

    They are there once the current stream is done.
    """

    def fetched(vectors: Tensor) -> Tensor:
        rounded = vectors.to(dtype)
        if rounded.device.type != "cuda":
            return rounded
        return torch.empty(rounded.shape, dtype=dtype, pin_memory=True).copy_(rounded, non_blocking=True)

    def end(triplets: Triplets) -> Triplets:
        right = None if triplets.right is None else fetched(triplets.right)
        return Triplets(fetched(triplets.left), right, triplets.sigma.to("cpu"))

    return Basis(end(basis.minor), basis.certificate, None if basis.principal is None else end(basis.principal))
