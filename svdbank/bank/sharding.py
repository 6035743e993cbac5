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


def shard_bytes(rows: NDArray[np.generic], weights_per_shard: int, fill: object) -> tuple[bytes, FileRecord]:
    """A shard file and its record. ``rows`` (weights, rank, length) are its vectors, of up to ``weights_per_shard`` weights.

    Chunks lie in C order of (weight, rank); what the last one of a weight has beyond its rank holds ``fill``.
    """
    weights, rank, length = rows.shape
    extent = rank_extent(rank)
    if extent != rank:
        padded = np.full((weights, extent, length), fill, dtype=rows.dtype)
        padded[:, :rank] = rows
        rows = padded
    chunks = np.ascontiguousarray(rows).astype(rows.dtype.newbyteorder("<"), copy=False).reshape(-1, RANK_CHUNK * length)
    each = extent // RANK_CHUNK
    chunk_bytes = chunks.shape[1] * rows.dtype.itemsize + CRC_BYTES
    table = np.full((weights_per_shard * each, 2), _ABSENT, dtype="<u8")
    table[: len(chunks), 0] = np.arange(len(chunks), dtype=np.uint64) * np.uint64(chunk_bytes)
    table[: len(chunks), 1] = chunk_bytes
    parts: list[bytes] = []
    crcs: list[int] = []
    for chunk in chunks:
        data = chunk.tobytes()
        crcs.append(google_crc32c.value(data))
        parts += (data, crcs[-1].to_bytes(CRC_BYTES, "little"))
    listed = table.tobytes()
    index_crc = google_crc32c.value(listed)
    whole = b"".join((*parts, listed, index_crc.to_bytes(CRC_BYTES, "little")))
    return whole, FileRecord(len(whole), hashlib.sha256(whole).hexdigest(), chunk_bytes, tuple(crcs), index_crc)
