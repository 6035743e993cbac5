"""Parts of banks that lie elsewhere, kept on this disk: chunks at the offsets they have in their files, and the small files.

A folder for each bank, named by its manifest's digest. Nothing in it is believed: whoever reads a part holds it to the index. It is no
Zarr hierarchy and no bank, and no reader takes it for one: no ``zarr.json``, no ``manifest.json``, no folder ``c``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import msgspec

from svdbank.bank.files import read_regular
from svdbank.bank.layout import FileRecord
from svdbank.core import disk
from svdbank.core.errors import DamageError
from svdbank.core.specs import Struct, from_json, to_json

#: What a part belongs to, the manifest as it was published, the folder of small files, and the one of vectors.
ORIGIN, PUBLISHED, SMALL, VECTORS = "origin.json", "published.json", "small", "vectors"

#: Bytes after which the space is looked at again, as a share of the limit.
_LOOK_AGAIN = 64


class Brought(Struct, frozen=True):
    """What ``pull`` was asked for: ranks up to ``rank`` of the minor end, of ``side``. ``whole`` once all of it was here."""

    rank: int
    side: str
    whole: bool


class PartsOrigin(Struct, frozen=True, omit_defaults=True):
    """Where a folder of parts comes from: the pinned address, and the manifest's digest. What was ``brought`` by name is not evicted."""

    place: str
    digest: str
    brought: tuple[Brought, ...] = ()


class Parts:
    """The parts of one bank. ``limit``: bytes of all banks' parts beside this one, in folders of the same parent, that may stay."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self.limit = limit
        #: Small files and chunks that were not what the index records, and were removed or written again.
        self.damaged: list[str] = []
        self._written = limit  # look at the first write

    def begin(self, place: str, manifest: bytes, digest: str) -> PartsOrigin:
        """Note where the parts come from, and the manifest; what was brought before stays noted."""
        before = read_origin(self.root)
        brought = before.brought if before is not None and before.digest == digest else ()
        origin = PartsOrigin(place, digest, brought)
        with contextlib.suppress(OSError):
            disk.make_dirs(self.root)
            self._replace(PUBLISHED, manifest)
            self._replace(ORIGIN, to_json(origin))
        return origin

    def manifest(self) -> bytes | None:
        """The manifest's bytes, unchecked; None where they are not here."""
        return self._small(PUBLISHED)

    def note(self, wanted: Brought) -> None:
        """Note that these ranks are brought by name: before, so that nothing of them is evicted meanwhile, and when all are here."""
        origin = read_origin(self.root)
        if origin is None:
            raise DamageError(f"{self.root}: its {ORIGIN} is lost", hint="run the same svdbank pull again")
        kept = [one for one in origin.brought if not _covers(wanted, one)]
        if not any(one.whole and _covers(one, wanted) for one in kept):
            kept.append(wanted)
        if wanted.whole:
            disk.fsync_tree(self.root)
        disk.write_bytes(self.root / ORIGIN, to_json(msgspec.structs.replace(origin, brought=tuple(kept))))

    def small(self, record: FileRecord) -> bytes | None:
        """A small file by its record; None where it is not here. One that is not those bytes is removed."""
        name = f"{SMALL}/{record.sha256}"
        data = self._small(name)
        if data is not None and (len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256):
            self.damaged.append(name)
            with contextlib.suppress(OSError):
                disk.unlink(self.root / name)
            return None
        if data is not None:
            with contextlib.suppress(OSError):
                os.utime(self.root / name)
        return data

    def keep_small(self, record: FileRecord, data: bytes) -> None:
        """Keep a small file that was checked."""
        disk.make_dirs(self.root / SMALL)
        self._replace(f"{SMALL}/{record.sha256}", data)
        self._written += len(data)

    def read(self, file: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """What stands at (start, stop) of a file of vectors, unchecked: empty where nothing is, zeros in holes, fewer bytes at the end."""
        path = self.vectors(file)
        try:
            descriptor = disk.open_regular(path, error=DamageError)
        except FileNotFoundError:
            return [b""] * len(places)
        except DamageError:
            self.damaged.append(file)
            return [b""] * len(places)
        try:
            with contextlib.suppress(OSError):
                os.utime(descriptor)
            return [os.pread(descriptor, stop - start, start) for start, stop in places]
        except OSError:  # a disk that fails under the file: what is here is not to be had
            self.damaged.append(file)
            return [b""] * len(places)
        finally:
            os.close(descriptor)

    def keep(self, file: str, parts: Sequence[tuple[int, bytes]]) -> None:
        """Keep checked chunks of a file of vectors at their offsets."""
        path = self.vectors(file)
        disk.make_dirs(path.parent)
        disk.write_parts(path, parts)
        self._written += sum(len(data) for _, data in parts)

    def vectors(self, file: str) -> Path:
        """Where the chunks of a file of the bank lie: ``<family>/<array>/c/<shard>/0/0`` becomes ``vectors/<family>/<array>/<shard>``."""
        family, array, _, shard, *_ = file.split("/")
        return self.root / VECTORS / family / array / shard

    def forget(self, file: str) -> None:
        """Drop what is here of a file of vectors."""
        with contextlib.suppress(OSError):
            disk.unlink(self.vectors(file))

    def trim(self) -> None:
        """Remove the files, small ones and those of vectors, that were used longest ago, of whichever bank, until the rest is within the
        limit.

        Banks of which something was brought by name are left alone and do not count.
        """
        if self._written <= self.limit // _LOOK_AGAIN and self.limit:
            return
        self._written = 0
        found: list[tuple[float, int, Path]] = []
        for root in _folders(self.root.parent):
            if (origin := read_origin(root)) is not None and origin.brought:
                continue
            for place, _, names in chain(os.walk(root / SMALL), os.walk(root / VECTORS)):
                for name in names:
                    with contextlib.suppress(OSError):
                        status = os.lstat(f"{place}/{name}")
                        found.append((status.st_mtime, allocated(status), Path(place, name)))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                disk.unlink(path)
                total -= size

    def _small(self, name: str) -> bytes | None:
        try:
            return read_regular(self.root / name)
        except FileNotFoundError:
            return None
        except DamageError:
            self.damaged.append(name)
            return None

    def _replace(self, name: str, data: bytes) -> None:
        """Write a file that is checked when it is read, so that nobody sees half of it; a crash may lose it."""
        disk.write_bytes(self.root / name, data)


def _covers(one: Brought, other: Brought) -> bool:
    """True where whoever has the one has the other."""
    return one.rank >= other.rank and one.side in ("both", other.side)


def read_origin(root: Path) -> PartsOrigin | None:
    """What a folder of parts says of itself; None for any other folder."""
    try:
        return from_json(read_regular(root / ORIGIN), PartsOrigin, where=str(root / ORIGIN), error=DamageError)
    except (FileNotFoundError, DamageError, OSError):
        return None


def part_folders(home: Path) -> list[Path]:
    """The folders of parts below ``home``, of whichever banks, also those that lost what they say of themselves."""
    return _folders(home)


def _folders(home: Path) -> list[Path]:
    try:
        return sorted(
            path for path in home.iterdir() if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
        )
    except OSError:
        return []


def allocated(status: os.stat_result) -> int:
    """Bytes that a file takes on the disk: of one with holes, only what was written."""
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(blocks * 512, status.st_size)


def remembered(home: Path, address: str) -> tuple[str, str] | None:
    """What an address meant when it was last looked at: the pinned place and the manifest's digest."""
    try:
        origin = from_json(read_regular(_name(home, address)), PartsOrigin, where=address, error=DamageError)
    except (FileNotFoundError, DamageError, OSError):
        return None
    return (origin.place, origin.digest) if len(origin.digest) == 64 and origin.digest.isalnum() else None


def remember(home: Path, address: str, place: str, digest: str) -> None:
    """Note what an address means now."""
    path = _name(home, address)
    with contextlib.suppress(OSError):
        disk.make_dirs(path.parent)
        disk.write_bytes(path, to_json(PartsOrigin(place, digest)))


def _name(home: Path, address: str) -> Path:
    return home / ".names" / f"{hashlib.sha256(address.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
