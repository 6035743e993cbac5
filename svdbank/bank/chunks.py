"""Reading chunks of singular vectors straight from shard files.

The layout is Zarr's ``sharding_indexed`` (inner codecs bytes and crc32c, table of chunks at the end), so any Zarr reader sees the same
numbers. A lookup needs the first chunks of hundreds of files: read here, they cost two rounds of ``read_many`` and a checksum each
that is compared with the index, where zarr's machinery costs about a millisecond a file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import google_crc32c

from svdbank.bank.files import Files, Range
from svdbank.bank.layout import CRC_BYTES, INDEX_ENTRY, RANK_CHUNK, FileRecord, rank_extent
from svdbank.core.errors import DamageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Bytes of chunks asked for at once: enough to hide the latency of a far place, little beside what a lookup returns.
BATCH_BYTES = 64 << 20

#: crc32c of any data followed by its own crc32c in little-endian.
_RESIDUE = 0x48674BC7


@dataclass(frozen=True)
class ShardRead:
    """What is wanted of one shard file: the first ``rank`` vectors of some of its weights, by their rows within the shard."""

    file: str
    record: FileRecord
    rows: tuple[int, ...]
    rank: int
    weights_per_shard: int
    stored_rank: int

    @property
    def chunks_per_weight(self) -> int:
        """Inner chunks along the rank axis."""
        return rank_extent(self.stored_rank) // RANK_CHUNK

    @property
    def chunks(self) -> int:
        """Inner chunks wanted of each weight."""
        return ceil(self.rank / RANK_CHUNK)

    @property
    def table(self) -> Range:
        """Where its table of chunks lies: offset and length of each, then a crc32c."""
        nbytes = self.weights_per_shard * self.chunks_per_weight * INDEX_ENTRY + CRC_BYTES
        return self.file, self.record.size - nbytes, self.record.size


def crc_before(data: bytes, end: int) -> int:
    """The crc32c stored in the four bytes before ``end``."""
    crc: int = struct.unpack_from("<I", data, end - CRC_BYTES)[0]
    return crc


def checked_crc(data: bytes) -> int | None:
    """The crc32c in the last four bytes if it is that of the bytes before it, else None."""
    return crc_before(data, len(data)) if google_crc32c.value(data) == _RESIDUE else None


def read_chunks(files: Files, wanted: Sequence[ShardRead]) -> Iterator[list[NDArray[np.uint8]]]:
    """For each shard the bytes of the chunks that hold what is wanted, row by row, without their checksums.

    Each chunk's crc32c, computed here, is the one that the record holds for its place; anything else is a DamageError.
    """
    for batch in _batches(wanted):
        for shard in batch:
            _check_size(files, shard)
        tables = files.read_many([shard.table for shard in batch])
        runs = [list(_runs(_places(files, shard, table))) for shard, table in zip(batch, tables, strict=True)]
        ranges = [
            (shard.file, first * shard.record.chunk_bytes, stop * shard.record.chunk_bytes)
            for shard, own in zip(batch, runs, strict=True)
            for first, stop in own
        ]
        parts = iter(files.read_many(ranges))
        for shard, own in zip(batch, runs, strict=True):
            yield [chunk for run in own for chunk in _checked(files, shard, next(parts), *run)]


def _checked(files: Files, shard: ShardRead, data: bytes, first: int, stop: int) -> Iterator[NDArray[np.uint8]]:
    """The chunks of a run, each compared with what is recorded for its place."""
    import numpy as np

    length = shard.record.chunk_bytes
    values = np.frombuffer(data, np.uint8)
    for place in range(first, stop):
        end = (place - first + 1) * length
        chunk = values[end - length : end]
        if google_crc32c.value(chunk) != _RESIDUE or crc_before(data, end) != shard.record.chunks[place]:
            raise DamageError(f"{files.place}/{shard.file}: chunk {place} is not the one recorded")
        yield chunk[:-CRC_BYTES]


def _runs(places: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Neighbours in the file as one half-open interval, in the order asked for."""
    first = stop = 0
    for place in places:
        if place != stop and stop > first:
            yield first, stop
        if place != stop or stop == first:
            first = place
        stop = place + 1
    if stop > first:
        yield first, stop


def _batches(wanted: Sequence[ShardRead]) -> Iterator[list[ShardRead]]:
    """Neighbours together as far as ``BATCH_BYTES`` go, at least one."""
    batch: list[ShardRead] = []
    nbytes = 0
    for shard in wanted:
        if batch and nbytes >= BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(shard)
        nbytes += len(shard.rows) * shard.chunks * shard.record.chunk_bytes
    if batch:
        yield batch


def _check_size(files: Files, shard: ShardRead) -> None:
    try:
        size = files.size(shard.file)
    except FileNotFoundError:
        raise DamageError(f"{files.place}/{shard.file}: missing") from None
    if size != shard.record.size:
        raise DamageError(f"{files.place}/{shard.file}: {size} bytes, recorded were {shard.record.size}")


def _places(files: Files, shard: ShardRead, table: bytes) -> Iterator[int]:
    """The number in the file of each wanted chunk, by the shard's table."""
    if checked_crc(table) != shard.record.index_crc32c:
        raise DamageError(f"{files.place}/{shard.file}: its shard index is not the one recorded")
    for row in shard.rows:
        for chunk in range(shard.chunks):
            offset, nbytes = struct.unpack_from("<QQ", table, (row * shard.chunks_per_weight + chunk) * INDEX_ENTRY)
            place, rest = divmod(offset, shard.record.chunk_bytes)
            if rest or nbytes != shard.record.chunk_bytes or place >= len(shard.record.chunks):
                raise DamageError(f"{files.place}/{shard.file}: chunk {chunk} of weight {row} is not in its place")
            yield place
