"""Weights read ahead of the solver, in order, a bounded number of bytes at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor

from svdbank.core.specs import WeightSpec

#: A matrix and the sha256 of its stored bytes.
Read = Callable[[WeightSpec], tuple[Tensor, str]]
Loaded = list[tuple[WeightSpec, Tensor, str]]
_Loading = Future[tuple[WeightSpec, Tensor, str]]


class Reader:
    """Hands out groups of weights in the order given, each weight with its matrix and the sha256 of its stored bytes.

    ``threads`` of them are read at once: one keeps a disk busy, many hide the latency of a network. One group is always read ahead
    of the solver, however large, and more up to ``ahead`` bytes.
    """

    def __init__(self, groups: Sequence[Sequence[WeightSpec]], *, threads: int, ahead: int) -> None:
        self._limit = ahead
        self._read: Read | None = None
        self._waiting = deque(groups)
        self._ahead: deque[list[_Loading]] = deque()
        self._sizes: deque[int] = deque()
        self._pool = ThreadPoolExecutor(threads, "svdbank-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, read: Read) -> None:
        """Begin to read; ``read`` is called from several threads."""
        self._read = read
        self._fill()

    def pending(self) -> set[_Loading]:
        """The reads that :meth:`take` would wait for."""
        return {read for read in self._ahead[0] if not read.done()}

    def take(self) -> Loaded:
        """The next group, once it is read; raises what a read raised."""
        reads = self._ahead.popleft()
        self._sizes.popleft()
        self._fill()
        return [read.result() for read in reads]

    def _fill(self) -> None:
        while self._waiting:
            size = sum(weight.loaded_nbytes for weight in self._waiting[0])
            if self._ahead and sum(self._sizes) + size > self._limit:
                return
            self._sizes.append(size)
            self._ahead.append([self._pool.submit(self._load, weight) for weight in self._waiting.popleft()])

    def _load(self, weight: WeightSpec) -> tuple[WeightSpec, Tensor, str]:
        assert self._read is not None
        return (weight, *self._read(weight))
