"""Reading chunks of singular vectors straight from shard files.

The layout is Zarr's ``sharding_indexed`` (inner codecs bytes and crc32c, table of chunks at the end), so any Zarr reader sees the same
numbers. A lookup needs the first chunks of hundreds of files: read here, they cost two rounds of ``read_many`` and a checksum each
that is compared with the index, where zarr's machinery costs about a millisecond a file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import google_crc32c

from svdbank.bank.files import Files, Range
from svdbank.bank.layout import CRC_BYTES, INDEX_ENTRY, RANK_CHUNK, FileRecord, rank_extent
from svdbank.core.errors import DamageError

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


def read_chunks(files: Files, wanted: Sequence[ShardRead]) -> Iterator[list[bytes]]:
    """For each shard the chunks that hold what is wanted, row by row, each with its crc32c in the last four bytes.

    Each chunk's crc32c, computed here, is the one that the record holds for its place; anything else is a DamageError.
    """
    for batch in _batches(wanted):
        for shard in batch:
            _check_size(files, shard)
        places: list[int] = []
        ranges: list[Range] = []
        for shard, table in zip(batch, files.read_many([shard.table for shard in batch]), strict=True):
            for place in _places(files, shard, table):
                start = place * shard.record.chunk_bytes
                places.append(place)
                ranges.append((shard.file, start, start + shard.record.chunk_bytes))
        parts = iter(zip(places, files.read_many(ranges), strict=True))
        for shard in batch:
            checked = []
            for _ in range(len(shard.rows) * shard.chunks):
                place, data = next(parts)
                if checked_crc(data) != shard.record.chunks[place]:
                    raise DamageError(f"{files.place}/{shard.file}: chunk {place} is not the one recorded")
                checked.append(data)
            yield checked


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
