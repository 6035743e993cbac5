"""Memory that blocks use one after the other: fresh pages cost as much as reading into them does."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

#: Bytes kept for blocks to come.
_KEPT = 64 << 20

#: The smallest buffer.
_SMALLEST = 1 << 16


class Buffers:
    """Arrays of any content, for any number of threads. What was given back last is lent first: the caches still have it."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._kept = 0
        self._lock = threading.Lock()

    def lend(self, nbytes: int) -> NDArray[np.uint8]:
        """One of at least ``nbytes``."""
        capacity = max(_SMALLEST, 1 << max(0, nbytes - 1).bit_length())
        with self._lock:
            if self._free[capacity]:
                self._kept -= capacity
                return self._free[capacity].pop()
        return np.empty(capacity, np.uint8)

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        """One that was lent, to which nothing refers any more."""
        with self._lock:
            if self._kept + len(buffer) <= _KEPT:
                self._free[len(buffer)].append(buffer)
                self._kept += len(buffer)
