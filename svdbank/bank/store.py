"""The Zarr store through which a bank's arrays are written: every file is fsynced and hashed, a torn one is removed first.

Reading goes without zarr (``index.py``, ``chunks.py``).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from svdbank.bank.files import read_regular
from svdbank.bank.layout import FileRecord
from svdbank.bank.zarr_metadata import checked_metadata
from svdbank.core import disk


class BankStore(Store):
    """A folder as a Zarr store to write to.

    ``written`` collects the records of what was written through this store: metadata and coordinate arrays.
    """

    supports_writes = True
    supports_deletes = False
    supports_listing = True

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.root = root
        self.written: dict[str, FileRecord] = {}

    def with_read_only(self, read_only: bool = False) -> BankStore:
        return BankStore(self.root, read_only=read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BankStore) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __str__(self) -> str:
        return f"bank://{self.root}"

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        # zarr asks for metadata before it creates; chunks are written whole.
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
        path = self.root / key
        disk.make_dirs(path.parent)
        if path.exists():
            disk.unlink(path)
        disk.write_new(path, data)
        disk.fsync_dir(path.parent)
        self.written[key] = file_record(data)

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


def file_record(data: bytes) -> FileRecord:
    """The record of a file that is no shard."""
    return FileRecord(len(data), hashlib.sha256(data).hexdigest(), 0, (), 0)
