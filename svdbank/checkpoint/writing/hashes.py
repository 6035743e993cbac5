"""sha256 over the stored bytes of weights whose blocks several threads read."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from svdbank.checkpoint.source import Checkpoint
from svdbank.checkpoint.writing.blocks import FileBlock
from svdbank.core.specs import WeightSpec

#: The number of a source, and the byte of it that is meant.
_Place = tuple[int, int]


@dataclass
class _Weight:
    digest: Any = field(default_factory=hashlib.sha256)
    lock: threading.Lock = field(default_factory=threading.Lock)
    next: _Place = (0, 0)
    #: Blocks that are read before their turn.
    waiting: dict[_Place, tuple[FileBlock, memoryview]] = field(default_factory=dict)
    #: True while a thread hashes.
    busy: bool = False


class Hashes:
    """Of each weight in ``wanted``, while ``blocks`` are read, in whatever order threads come to it.

    A weight whose sources do not lie in the order in which they are hashed is left for :meth:`final`.
    """

    def __init__(self, wanted: Iterable[str], blocks: Iterable[FileBlock]) -> None:
        weights = {name: _Weight() for name in wanted}
        for block in blocks:
            if block.piece is not None and (name := block.piece.spec.name) in weights:
                if _place(block) == weights[name].next:
                    weights[name].next = _after(block)
                else:
                    del weights[name]
        self._wanted = weights
        for weight in weights.values():
            weight.next = (0, 0)

    def wants(self, block: FileBlock) -> bool:
        """True where :meth:`feed` or :meth:`whole` is to be called for it."""
        return block.piece is not None and block.piece.spec.name in self._wanted

    def feed(self, block: FileBlock, stored: memoryview) -> None:
        """Hash the bytes of a block, and those that had to wait for it; or leave it to the thread that does so for this weight.

        Once this was called for all blocks up to one in the order of the files, that one's bytes are no longer needed.
        """
        assert block.piece is not None
        weight = self._wanted[block.piece.spec.name]
        with weight.lock:
            weight.waiting[_place(block)] = (block, stored)
            if weight.busy:
                return
            weight.busy = True
        while True:
            with weight.lock:
                turn = weight.waiting.pop(weight.next, None)
                if turn is None:
                    weight.busy = False
                    return
            weight.digest.update(turn[1])
            weight.next = _after(turn[0])

    def whole(self, block: FileBlock, digest: Any) -> None:
        """Of a source that was read and hashed as one block."""
        assert block.piece is not None
        weight = self._wanted[block.piece.spec.name]
        if len(block.piece.spec.sources) == 1:
            weight.digest, weight.next = digest, _after(block)

    def final(self, spec: WeightSpec, checkpoint: Checkpoint) -> str:
        """Hex digest; what could not be hashed on the way is read again."""
        weight = self._wanted.get(spec.name)
        if weight is not None and weight.next == (len(spec.sources), 0):
            return str(weight.digest.hexdigest())
        return checkpoint.read_hashed(spec)[1]


def _place(block: FileBlock) -> _Place:
    assert block.piece is not None
    return block.piece.number, block.begin - block.piece.source.begin


def _after(block: FileBlock) -> _Place:
    assert block.piece is not None
    source = block.piece.source
    return (block.piece.number, block.end - source.begin) if block.end < source.end else (block.piece.number + 1, 0)
