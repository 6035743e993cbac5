"""Opening and reading weight files that a stranger may have prepared: no links out, no pipes, no change while we look."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from svdbank.core import disk
from svdbank.core.disk import NewFile
from svdbank.core.errors import CheckpointError

#: Bytes read, and hashed while they are in the processor's cache, at a time.
PIECE = 8 << 20

#: The model card, and how much of it is looked at.
CARD, MAX_CARD = "README.md", 100_000

_SNAPSHOT = re.compile(r"(?:models|datasets|spaces)--.+")
_SHARED = re.compile(r"[0-9a-f]{64}")


class WeightBytes(Protocol):
    """What a checkpoint needs of a weight file, wherever it lies."""

    @property
    def name(self) -> str: ...

    def read_into(self, buffer: memoryview, begin: int, digest: Any | None = None) -> None:
        """Fill ``buffer`` from offset ``begin``, feeding ``digest`` (a hashlib object) the bytes in order; from any thread."""

    def close(self) -> None:
        """No read may be under way; later ones raise CheckpointError."""


def blobs_of(folder: Path) -> Path | None:
    """``blobs/`` of the Hugging Face cache entry whose snapshot ``folder`` is; None for any other folder."""
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and _SNAPSHOT.fullmatch(repository.name):
        return repository / "blobs"
    return None


def member(folder: Path, name: str) -> Path:
    """Where the bytes of ``folder/name`` lie: the file itself, or the blob that a link of the Hugging Face cache leads to.

    ``folder`` must be resolved. A link that leads anywhere else is refused: a checkpoint could name any file of this machine.
    """
    path = folder / name
    try:
        linked = path.is_symlink()
        target = path.resolve(strict=True) if linked else path
    except (OSError, RuntimeError) as cause:
        raise CheckpointError(
            f"{path}: cannot be followed: {cause}", hint="the cache entry is damaged: download the model again"
        ) from cause
    if linked:
        blobs = blobs_of(folder)
        if blobs is None or not (target.parent == blobs.resolve() or _is_shared(target, blobs)):
            raise CheckpointError(
                f"{path}: a link to {target}; only the Hugging Face cache's links into its own blobs/ are followed",
                hint="if you trust it, put the file itself there: "
                f"cp --remove-destination {shlex.quote(str(target))} {shlex.quote(str(path))}",
            )
    return target


def blob_id(folder: Path, name: str) -> str | None:
    """The Hub's id of a file in a snapshot of the Hugging Face cache: what its blob is called. None for any other file."""
    path = folder / name
    if not path.is_symlink() or blobs_of(folder) is None:
        return None
    blob = Path(os.path.normpath(folder / path.readlink()))
    return blob.name if blob.parent.name == "blobs" else None


def _is_shared(target: Path, blobs: Path) -> bool:
    """True inside the store beside all repositories of a cache where the Hub client puts what several of them hold.

    A blob is then itself a link, to ``blobs/ab/abcd…`` of the cache's root.
    """
    store = blobs.parent.parent / "blobs"
    return (
        _SHARED.fullmatch(target.name) is not None
        and target.parent.name == target.name[:2]
        and target.parent.parent == store.resolve()
    )


def open_regular(path: Path) -> int:
    """A file descriptor for reading. Links, pipes, devices and folders are refused."""
    try:
        return disk.open_regular(path, error=CheckpointError)
    except FileNotFoundError as cause:
        raise CheckpointError(f"{path}: there is no such file") from cause


def read_document(path: Path, limit: int) -> bytes:
    """All bytes of a small file; CheckpointError if it holds more than ``limit``."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path}: more than {limit} bytes")
    return data


def read_card(folder: Path) -> str | None:
    """The beginning of the model card in a resolved folder; None where there is none that can be read."""
    try:
        with os.fdopen(open_regular(member(folder, CARD)), "rb") as file:
            return file.read(MAX_CARD).decode("utf-8", "replace")
    except (CheckpointError, OSError):
        return None


@dataclass(frozen=True)
class State:
    """What identifies the content of a file without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, fd: int) -> State:
        info = os.fstat(fd)
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


@dataclass
class WeightFile:
    """One weight file, opened at the first read and read at offsets by any number of threads."""

    name: str
    path: Path
    state: State
    _fd: int | None = field(default=None, repr=False)
    _closed: bool = field(default=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read_into(self, buffer: memoryview, begin: int, digest: Any | None = None) -> None:
        """Fill ``buffer`` from offset ``begin``, feeding ``digest`` (a hashlib object) on the way.

        Raises CheckpointError if the file ends early or is no longer the one that was opened.
        """
        fd = self._descriptor()
        position = 0
        while position < len(buffer):
            piece = buffer[position : position + PIECE]
            try:
                count = os.preadv(fd, [piece], begin + position)
            except OSError as cause:
                raise CheckpointError(f"{self.path}: reading at byte {begin + position} failed: {cause.strerror}") from cause
            if count <= 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {begin + position}, inside a tensor", hint="download it again"
                )
            if digest is not None:
                digest.update(piece[:count])
            position += count
        self._check(fd)

    def copy_into(self, target: NewFile, begin: int, end: int) -> None:
        """Append bytes [begin, end) to a file that is being written; raises as :meth:`read_into` does."""
        fd = self._descriptor()
        count = target.append_from(fd, begin, end - begin)
        if count < end - begin:
            raise CheckpointError(f"{self.path}: ends at byte {begin + count}, inside a tensor", hint="download it again")
        self._check(fd)

    def close(self) -> None:
        """Close the descriptor. No read may be under way."""
        with self._lock:
            self._closed = True
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _descriptor(self) -> int:
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{self.path}: the checkpoint was closed", hint="open it again")
            if self._fd is None:
                fd = open_regular(self.path)
                try:
                    self._check(fd)
                except CheckpointError:
                    os.close(fd)
                    raise
                self._fd = fd
            return self._fd

    def _check(self, fd: int) -> None:
        if State.of(fd) != self.state:
            raise CheckpointError(
                f"{self.path}: changed since the checkpoint was opened (its size, time or inode differs)",
                hint="run the command again on a checkpoint that nothing else writes to",
            )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a whole file."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
