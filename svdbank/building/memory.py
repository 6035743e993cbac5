"""Freed memory goes back to the system between shards."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


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
