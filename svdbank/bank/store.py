"""The Zarr store through which a bank's arrays are written and its small ones read.

Writing: every file is fsynced and hashed, a torn one is removed first. Reading: a missing file is an error where zarr would see fill
values, metadata is checked before zarr decodes it, and a file must be the one that the index recorded. Singular vectors are read
without zarr (``chunks.py``).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from svdbank.bank.chunks import crc_before, open_regular, read_exactly
from svdbank.bank.layout import CRC_BYTES, INDEX_ENTRY, FileRecord
from svdbank.bank.metadata import checked_metadata
from svdbank.core import disk
from svdbank.core.errors import DamageError


@dataclass(frozen=True)
class ShardGeometry:
    """How a data file of an array is cut: bytes of an inner chunk with its crc32c, and chunks in a full shard."""

    chunk_bytes: int
    chunks: int


class BankStore(Store):
    """A folder as a Zarr store.

    ``expected`` maps file names to records: those files are checked on every read. ``written`` collects the records of what was
    written through this store; ``geometry`` gives the cut of each sharded array by its path.
    """

    supports_writes = True
    supports_deletes = False
    supports_listing = True

    def __init__(
        self,
        root: Path,
        *,
        expected: Mapping[str, FileRecord] | None = None,
        geometry: Mapping[str, ShardGeometry] | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(read_only=read_only)
        self.root = root
        self.expected = expected or {}
        self.geometry = geometry or {}
        self.written: dict[str, FileRecord] = {}

    def with_read_only(self, read_only: bool = False) -> BankStore:
        return BankStore(self.root, expected=self.expected, geometry=self.geometry, read_only=read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BankStore) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __str__(self) -> str:
        return f"bank://{self.root}"

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        # A writer replaces shards whole; zarr would merge a torn one that it finds into the new one.
        data = self.read(key, byte_range) if self.read_only or "/c/" not in key else None
        return None if data is None else (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    def read(self, key: str, byte_range: ByteRequest | None = None) -> bytes | None:
        """Bytes of a file or a part of it, checked. None only for metadata that is not there (zarr asks before it creates)."""
        path = self.root / key
        record = self.expected.get(key)
        try:
            descriptor, size = open_regular(path, record)
        except FileNotFoundError:
            if record is None and key.endswith("zarr.json"):
                return None
            raise DamageError(f"{path}: missing") from None
        try:
            start, stop = _span(byte_range, size)
            data = read_exactly(descriptor, start, stop - start, path)
        finally:
            os.close(descriptor)
        if key.endswith("zarr.json"):
            checked_metadata(data, where=str(path))
        if record is not None and (len(data) != size or hashlib.sha256(data).hexdigest() != record.sha256):
            raise DamageError(f"{path}: not the bytes recorded")
        return data

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(self.write, key, value.to_bytes())

    def write(self, key: str, data: bytes) -> None:
        """Write a file durably, replacing a torn one, and remember its record."""
        path = self.root / key
        disk.make_dirs(path.parent)
        if path.exists():
            disk.unlink(path)
        disk.write_new(path, data)
        disk.fsync_dir(path.parent)
        self.written[key] = file_record(data, self.geometry.get(key.split("/c/")[0]) if "/c/" in key else None)

    async def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    async def delete(self, key: str) -> None:
        raise PermissionError(f"{key}: files of a bank are never deleted through zarr")

    async def list(self) -> AsyncIterator[str]:
        for path in sorted(self.root.rglob("*")):
            if path.is_file():
                yield path.relative_to(self.root).as_posix()

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = self.root / prefix
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                yield path.name


def file_record(data: bytes, geometry: ShardGeometry | None) -> FileRecord:
    """Size and sha256 of a file's bytes and, for a shard file, the crc32c of its inner chunks in file order."""
    if geometry is None:
        return FileRecord(len(data), hashlib.sha256(data).hexdigest(), 0, (), 0)
    # Zarr v3 sharding_indexed, index at the end: equal chunks from the start of the file, then (offset, length) of each, then a crc.
    length = geometry.chunk_bytes
    count, rest = divmod(len(data) - geometry.chunks * INDEX_ENTRY - CRC_BYTES, length)
    if rest or not 1 <= count <= geometry.chunks:
        raise DamageError(f"a shard of {len(data)} bytes does not hold chunks of {length}")
    crcs = tuple(crc_before(data, (i + 1) * length) for i in range(count))
    return FileRecord(len(data), hashlib.sha256(data).hexdigest(), length, crcs, crc_before(data, len(data)))


def _span(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    """Start and end of a request in a file of ``size`` bytes."""
    match byte_range:
        case None:
            return 0, size
        case RangeByteRequest(start, end):
            return min(start, size), min(end, size)
        case OffsetByteRequest(offset):
            return min(offset, size), size
        case SuffixByteRequest(suffix):
            return max(0, size - suffix), size
    raise TypeError(f"unknown byte request {byte_range!r}")
