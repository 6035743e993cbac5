"""Blocks made by several threads ahead of the one that takes them in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import Generic, Self, TypeVar

from svdbank.checkpoint.writing.blocks import FileBlock

#: Bytes that all blocks under way may hold; a larger one goes alone.
_HELD = 64 << 20

T = TypeVar("T")


class Ahead(Generic[T]):
    """``make(block)`` of each block, by the pool, as far ahead as memory allows; :meth:`take` gives them in order.

    It begins on entering. Left early, what has not begun is dropped.
    """

    def __init__(self, pool: Executor, blocks: Iterable[FileBlock], make: Callable[[FileBlock], T]) -> None:
        self._pool = pool
        self._blocks = deque(blocks)
        self._make = make
        self._waiting: deque[tuple[Future[T], int]] = deque()
        self._held = 0

    def __enter__(self) -> Self:
        self._fill()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for future, _ in self._waiting:
            future.cancel()

    def take(self) -> T:
        """The next one. What is made of it counts as held until the one after it is taken."""
        self._fill()
        future, size = self._waiting.popleft()
        made = future.result()
        self._held -= size
        return made

    def _fill(self) -> None:
        while self._blocks and (not self._waiting or self._held + self._blocks[0].held <= _HELD):
            block = self._blocks.popleft()
            self._waiting.append((self._pool.submit(self._make, block), block.held))
            self._held += block.held
