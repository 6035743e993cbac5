"""Reading singular vectors straight from shard files.

The layout is Zarr's ``sharding_indexed`` (inner codecs bytes and crc32c, index at the end), so any Zarr reader sees the same numbers.
A lookup needs the first chunks of hundreds of files: read here, each costs two ``pread`` calls and one checksum that is compared
with the index, where zarr's machinery costs about a millisecond.
"""

from __future__ import annotations

import os
import stat
import struct
from math import ceil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from svdbank.bank.layout import CRC_BYTES, INDEX_ENTRY, RANK_CHUNK, FileRecord, rank_extent
from svdbank.core.errors import DamageError

#: A link could lead out of the bank, and opening a pipe would wait for its writer.
NO_LINKS_NO_WAITING = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def open_regular(path: Path, record: FileRecord | None) -> tuple[int, int]:
    """Descriptor and size of a bank's file. FileNotFoundError if it is not there; DamageError for a pipe, a link, another size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_LINKS_NO_WAITING)
    except (FileNotFoundError, NotADirectoryError) as cause:
        raise FileNotFoundError(str(path)) from cause
    except OSError as cause:
        raise DamageError(f"{path}: {cause.strerror}") from cause
    status = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(status.st_mode):
            raise DamageError(f"{path}: not a regular file")
        if record is not None and status.st_size != record.size:
            raise DamageError(f"{path}: {status.st_size} bytes, recorded were {record.size}")
    except DamageError:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def read_regular(path: Path, *, limit: int = 1 << 30) -> bytes:
    """A whole small file (manifest, index, plan, record). FileNotFoundError if it is not there, DamageError for no regular file."""
    descriptor, size = open_regular(path, None)
    try:
        if size > limit:
            raise DamageError(f"{path}: {size} bytes where a small file belongs")
        return read_exactly(descriptor, 0, size, path)
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, start: int, count: int, path: Path) -> bytes:
    """``count`` bytes from ``start``; DamageError where the file ends before."""
    data = os.pread(descriptor, count, start)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), start + len(data))
        if not more:
            raise DamageError(f"{path}: ends {count - len(data)} bytes early")
        data += more
    return data


def crc_before(data: bytes, end: int) -> int:
    """The crc32c stored in the four bytes before ``end``."""
    crc: int = struct.unpack_from("<I", data, end - CRC_BYTES)[0]
    return crc


def read_vectors(
    path: Path,
    record: FileRecord,
    rows: list[int],
    *,
    rank: int,
    stored_rank: int,
    length: int,
    weights_per_shard: int,
    dtype: str,
) -> NDArray[Any]:
    """The first ``rank`` vectors of the weights at ``rows`` of one shard, (rows, rank, length) in ``dtype``.

    Each byte returned belongs to a chunk whose crc32c, computed here, is the one that ``record`` holds for its place; anything else
    is a DamageError.
    """
    chunks = ceil(rank / RANK_CHUNK)
    values = np.empty((len(rows), chunks, RANK_CHUNK, length), dtype=dtype)
    try:
        descriptor, size = open_regular(path, record)
    except FileNotFoundError:
        raise DamageError(f"{path}: missing") from None
    try:
        along_rank = rank_extent(stored_rank) // RANK_CHUNK
        index_bytes = weights_per_shard * along_rank * INDEX_ENTRY
        index = read_exactly(descriptor, size - index_bytes - CRC_BYTES, index_bytes + CRC_BYTES, path)
        if {google_crc32c.value(index[:-CRC_BYTES]), crc_before(index, len(index))} != {record.index_crc32c}:
            raise DamageError(f"{path}: its shard index is not the one recorded")
        for position, row in enumerate(rows):
            for chunk in range(chunks):
                offset, nbytes = struct.unpack_from("<QQ", index, (row * along_rank + chunk) * INDEX_ENTRY)
                place, rest = divmod(offset, record.chunk_bytes)
                if rest or nbytes != record.chunk_bytes or place >= len(record.chunks):
                    raise DamageError(f"{path}: chunk {chunk} of weight {row} is not in its place")
                data = read_exactly(descriptor, offset, nbytes, path)
                vectors = memoryview(data)[:-CRC_BYTES]
                if {google_crc32c.value(bytes(vectors)), crc_before(data, nbytes)} != {record.chunks[place]}:
                    raise DamageError(f"{path}: chunk {place} is not the one recorded")
                values[position, chunk] = np.frombuffer(vectors, dtype=dtype).reshape(RANK_CHUNK, length)
    finally:
        os.close(descriptor)
    return values.reshape(len(rows), chunks * RANK_CHUNK, length)[:, :rank]
