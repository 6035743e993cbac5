"""Weights read ahead of the solver, in order, a bounded number of bytes at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from torch import Tensor

from svdbank.building.shards import Batch
from svdbank.core.specs import WeightSpec

#: A matrix and the sha256 of its stored bytes.
Read = Callable[[WeightSpec], tuple[Tensor, str]]
Loaded = list[tuple[WeightSpec, Tensor, str]]
_Loading = Future[tuple[WeightSpec, Tensor, str]]


class Reader:
    """Hands out batches in the order given, each weight with its matrix and the sha256 of its stored bytes.

    ``threads`` weights are read at once: one keeps a disk busy, many hide the latency of a network. One batch is always read ahead
    of the solver, however large, and more up to ``ahead`` bytes. A batch is asked for when it is to be read, or the next.
    """

    def __init__(self, *, threads: int, ahead: int) -> None:
        self._limit = ahead
        self._read: Read | None = None
        self._waiting: Iterator[Batch] = iter(())
        self._drawn: Batch | None = None
        self._ahead: deque[tuple[Batch, list[_Loading]]] = deque()
        self._pool = ThreadPoolExecutor(threads, "svdbank-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, batches: Iterator[Batch], read: Read) -> None:
        """Begin to read; ``read`` is called from several threads."""
        self._waiting, self._read = batches, read
        self._fill()

    @property
    def next(self) -> Batch | None:
        """The batch that :meth:`take` gives; None at the end."""
        return self._ahead[0][0] if self._ahead else None

    def pending(self) -> _Loading | None:
        """The last of the reads that :meth:`take` would wait for; None where it would not. A shard may have tens of thousands."""
        return next((read for read in reversed(self._ahead[0][1]) if not read.done()), None)

    def take(self) -> Loaded:
        """The weights of the next batch, once they are read; raises what a read raised."""
        _, reads = self._ahead.popleft()
        self._fill()
        return [read.result() for read in reads]

    def _fill(self) -> None:
        while True:
            self._drawn = self._drawn or next(self._waiting, None)
            if self._drawn is None:
                return
            held = sum(batch.loaded_nbytes for batch, _ in self._ahead)
            if self._ahead and held + self._drawn.loaded_nbytes > self._limit:
                return
            self._ahead.append((self._drawn, [self._pool.submit(self._load, weight) for weight in self._drawn.weights]))
            self._drawn = None

    def _load(self, weight: WeightSpec) -> tuple[WeightSpec, Tensor, str]:
        assert self._read is not None
        return (weight, *self._read(weight))
