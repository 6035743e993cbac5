"""The Zarr store through which a bank's arrays are written: every file is fsynced and hashed, a torn one is removed first.

Reading goes without zarr (``index.py``, ``chunks.py``).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from svdbank.bank.chunks import crc_before
from svdbank.bank.files import read_regular
from svdbank.bank.layout import CRC_BYTES, INDEX_ENTRY, FileRecord
from svdbank.bank.zarr_metadata import checked_metadata
from svdbank.core import disk
from svdbank.core.errors import DamageError


@dataclass(frozen=True)
class ShardGeometry:
    """How a data file of an array is cut: bytes of an inner chunk with its crc32c, and chunks in a full shard."""

    chunk_bytes: int
    chunks: int


class BankStore(Store):
    """A folder as a Zarr store to write to.

    ``written`` collects the records of what was written through this store; ``geometry`` gives the cut of each sharded array by its
    path. What ``names`` lists is written under another name: that of an attempt.
    """

    supports_writes = True
    supports_deletes = False
    supports_listing = True

    def __init__(self, root: Path, *, geometry: Mapping[str, ShardGeometry], read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.root = root
        self.geometry = geometry
        self.written: dict[str, FileRecord] = {}
        self.names: dict[str, str] = {}

    def with_read_only(self, read_only: bool = False) -> BankStore:
        return BankStore(self.root, geometry=self.geometry, read_only=read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BankStore) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __str__(self) -> str:
        return f"bank://{self.root}"

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        # zarr asks for metadata before it creates. Shards are replaced whole; it would merge a torn one that it finds into the new one.
        if "/c/" in key:
            return None
        try:
            data = read_regular(self.root / key)
        except FileNotFoundError:
            return None
        checked_metadata(data, where=str(self.root / key))
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread(self.write, key, value.to_bytes())

    def write(self, key: str, data: bytes) -> None:
        """Write a file durably, replacing a torn one, and remember its record."""
        path = self.root / self.names.get(key, key)
        array = key.split("/c/")[0]
        # A worker that was woken after its bank was deleted makes no folders where that was.
        disk.make_dirs(path.parent, below=self.root / array if "/c/" in key else None)
        if path.exists():
            disk.unlink(path)
        disk.write_new(path, data)
        disk.fsync_dir(path.parent)
        self.written[key] = file_record(data, self.geometry.get(array) if "/c/" in key else None)

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
