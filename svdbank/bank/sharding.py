"""The bytes of a shard file, as Zarr's ``sharding_indexed`` has them: chunks with their checksums, and the table of chunks.

Written here, because zarr takes about half a millisecond a chunk, and a bank has eight and more of them for each side of each weight. Any
Zarr reader reads them; so do the tests.
"""

from __future__ import annotations

import hashlib

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from svdbank.bank.layout import CRC_BYTES, RANK_CHUNK, FileRecord, rank_extent

#: Offset and length of a chunk that is not there.
_ABSENT = 2**64 - 1


def shard_bytes(rows: NDArray[np.generic], weights_per_shard: int, fill: object) -> tuple[memoryview, FileRecord]:
    """A shard file and its record. ``rows`` (weights, rank, length) are its vectors, of up to ``weights_per_shard`` weights.

    Chunks lie in C order of (weight, rank); what the last one of a weight has beyond its rank holds ``fill``.
    """
    weights, rank, length = rows.shape
    extent = rank_extent(rank)
    if extent != rank:
        padded = np.full((weights, extent, length), fill, dtype=rows.dtype)
        padded[:, :rank] = rows
        rows = padded
    each = extent // RANK_CHUNK
    count, little = weights * each, rows.dtype.newbyteorder("<")
    chunk_bytes = RANK_CHUNK * length * little.itemsize + CRC_BYTES
    table = np.full((weights_per_shard * each, 2), _ABSENT, dtype="<u8")
    table[:count, 0] = np.arange(count, dtype=np.uint64) * np.uint64(chunk_bytes)
    table[:count, 1] = chunk_bytes
    # The values are copied once, to where they lie in the file.
    whole = np.empty(count * chunk_bytes + table.nbytes + CRC_BYTES, dtype=np.uint8)
    chunks = whole[: count * chunk_bytes].reshape(count, chunk_bytes)
    chunks[:, :-CRC_BYTES].view(little)[:] = rows.reshape(count, RANK_CHUNK * length)
    crcs = [google_crc32c.value(chunk[:-CRC_BYTES]) for chunk in chunks]
    chunks[:, -CRC_BYTES:].view("<u4")[:, 0] = crcs
    listed = table.tobytes()
    index_crc = google_crc32c.value(listed)
    whole[count * chunk_bytes :] = np.frombuffer(listed + index_crc.to_bytes(CRC_BYTES, "little"), dtype=np.uint8)
    data = whole.data
    return data, FileRecord(len(data), hashlib.sha256(data).hexdigest(), chunk_bytes, tuple(crcs), index_crc)
