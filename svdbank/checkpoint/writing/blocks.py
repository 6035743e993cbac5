"""The weights of a checkpoint cut into blocks, each of which can be read, changed and written by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from svdbank.checkpoint.dtypes import FLOATING
from svdbank.core.specs import TensorSource, WeightSpec

#: Stored bytes of a block: enough that a block costs more than handing it over, little enough that many fit in the memory allowed.
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Piece:
    """A stored tensor or part of one that is part of a changed weight: source ``number`` of ``spec``, rows ``rows`` of its matrix."""

    spec: WeightSpec
    number: int
    source: TensorSource
    rows: slice


@dataclass(frozen=True)
class FileBlock:
    """Bytes [begin, end) of a file that are read as one.

    Attributes
    ----------
    source
        The tensor or part of one whose values they are; None where they are copied whatever they are.
    shape
        Of those values: rows ``first`` and following of the source, or all of it.
    piece
        The weight that they belong to, where it is changed.
    """

    file: str
    begin: int
    end: int
    source: TensorSource | None = None
    shape: tuple[int, ...] = ()
    first: int = 0
    piece: Piece | None = None

    @property
    def turned(self) -> bool:
        """True where rows of the file are columns of the matrix."""
        return self.piece is not None and self.piece.spec.operation == "transpose"

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns of the changed matrix (out, in) that the block holds."""
        assert self.piece is not None
        rows, spec = self.piece.rows, self.piece.spec
        if self.turned:
            return rows, slice(self.first, self.first + self.shape[0])
        begin = rows.start + self.first
        return slice(begin, begin + self.shape[0]), slice(0, spec.in_features)

    @property
    def held(self) -> int:
        """Bytes in memory while it is under way: as stored, and at most float32 of what comes of it."""
        if self.source is None or self.source.dtype not in FLOATING:
            return self.end - self.begin
        return self.end - self.begin + 4 * prod(self.shape)


def copied(file: str, begin: int, end: int) -> Iterator[FileBlock]:
    """Blocks of bytes whose meaning does not matter, cut where file systems that share blocks between files can share them."""
    while begin < end:
        stop = min(end, (begin // _BLOCK + 1) * _BLOCK)
        yield FileBlock(file, begin, stop)
        begin = stop


def cut(source: TensorSource, piece: Piece | None = None) -> Iterator[FileBlock]:
    """Blocks of whole rows of a stored tensor or part; one alone where it is quantised, since scales belong to more than a
    row, and where its rows are read in another order.
    """
    if source.quantisation is not None or source.order is not None or not source.shape:
        yield FileBlock(source.file, source.begin, source.end, source, source.shape, piece=piece)
        return
    rows = source.shape[0]
    width = (source.end - source.begin) // max(1, rows)
    step = max(1, _BLOCK // max(1, width))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        begin = source.begin + first * width
        yield FileBlock(source.file, begin, begin + count * width, source, (count, *source.shape[1:]), first, piece)
