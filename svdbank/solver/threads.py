"""One place that sets how many threads a solve may use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svdbank.core.errors import OptionError

_lock = threading.Lock()
_pins: list[tuple[object, int]] = []
_unpinned = 1


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Give torch (and the BLAS under it) exactly ``threads`` intra-op threads, and restore the former count afterwards.

    Holds in the calling thread and in every Python thread started inside the block; a thread that existed before enters its own
    block. OpenMP keeps the count per thread while MKL keeps one for the process, so an inner block that ends while others are
    still open returns to the youngest open count, never to the unpinned one: a worker that finishes early must not hand its
    siblings more threads than they were given.
    """
    global _unpinned
    if threads < 1:
        raise OptionError(f"a solve needs at least one thread, not {threads}")
    pin = (object(), threads)
    with _lock:
        if not _pins:
            _unpinned = torch.get_num_threads()
        _pins.append(pin)
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        with _lock:
            _pins.remove(pin)
            torch.set_num_threads(_pins[-1][1] if _pins else _unpinned)
