"""Every change svdbank makes to a disk goes through here.

Three reasons: what is written is fsynced and appears whole; a name from outside cannot lead out of its folder; and tests can stop
the program, or make it fail, before any single operation (:func:`observe`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from svdbank.core.errors import OptionError, SvdbankError

#: Called before each operation with its name and path; may raise. See :func:`observe`.
_observers: list[Callable[[str, Path], None]] = []

#: Bytes of a growing file that may wait in memory before the disk is asked to begin with them.
_WRITE_BEHIND = 16 << 20

#: What ``copy_file_range`` says where it cannot copy between these two files.
_NOT_INSIDE = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ETXTBSY})

#: What ``link`` says on a file system without hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK})

#: Suffix of files not yet renamed into place. Whoever finds one may delete it.
TEMPORARY = ".tmp"


@contextlib.contextmanager
def observe(observer: Callable[[str, Path], None]) -> Iterator[None]:
    """Call ``observer(operation, path)`` before every operation; what it raises stops that operation.

    Operations: ``create``, ``write``, ``fsync``, ``rename``, ``link``, ``exchange``, ``fsync-dir``, ``unlink``, ``mkdir``, ``rmtree``,
    ``rmdir``, ``chmod``.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _about_to(operation: str, path: Path) -> None:
    for observer in _observers:
        observer(operation, path)


def write_new(path: Path, data: bytes | memoryview) -> None:
    """Write a file that does not exist yet and fsync it. The caller fsyncs the folder and records the file."""
    _about_to("create", path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        _about_to("write", path)
        _write_all(descriptor, data, path)
        _about_to("fsync", path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | memoryview, path: Path) -> None:
    rest = memoryview(data).cast("B")
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as cause:
        cause.filename = str(path)  # the system names none for a descriptor
        raise


class NewFile:
    """A file that is written from its beginning, piece by piece; made by :func:`creating`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = 0
        #: Up to here the disk has been asked to write.
        self._asked = 0

    def append(self, data: bytes | memoryview) -> None:
        """Write all of ``data`` behind what is there."""
        _about_to("write", self._path)
        _write_all(self._descriptor, data, self._path)
        self._advance(len(data))

    def append_from(self, descriptor: int, begin: int, count: int) -> int:
        """Append ``count`` bytes of another open file from offset ``begin``, without a way through this process where the system can:
        file systems that share blocks between files (btrfs, xfs) then write nothing. Returns how many there were."""
        _about_to("write", self._path)
        copied = 0
        try:
            while copied < count:
                step = _copied_inside(descriptor, self._descriptor, count - copied, begin + copied)
                if step == 0:
                    break
                copied += step
        except OSError as cause:
            cause.filename = str(self._path)
            raise
        self._advance(copied)
        return copied

    def _advance(self, count: int) -> None:
        """Have the disk begin with what is there while more is made: the fsync at the end then has little to wait for."""
        self._size += count
        if self._size - self._asked >= _WRITE_BEHIND:
            _begin_writing(self._descriptor, self._asked, self._size - self._asked)
            self._asked = self._size


@contextlib.contextmanager
def creating(path: Path) -> Iterator[NewFile]:
    """A file that does not exist yet, written piece by piece and fsynced at the end."""
    _about_to("create", path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        yield NewFile(path, descriptor)
        _about_to("fsync", path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copied_inside(source: int, target: int, count: int, begin: int) -> int:
    """Some of ``count`` bytes from offset ``begin`` appended to ``target``; 0 at the end of ``source``."""
    copy = getattr(os, "copy_file_range", None)
    if copy is not None:
        try:
            return int(copy(source, target, count, begin))
        except OSError as cause:
            if cause.errno not in _NOT_INSIDE:
                raise
    data = os.pread(source, min(count, 1 << 20), begin)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]
    return len(data)


@functools.cache
def _system() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _begin_writing(descriptor: int, begin: int, count: int) -> None:
    """Start writing these bytes to the disk, and wait for nothing (Linux; elsewhere nothing). It promises nothing: fsync does."""
    start = getattr(_system(), "sync_file_range", None)
    if start is not None:
        start(ctypes.c_int(descriptor), ctypes.c_int64(begin), ctypes.c_int64(count), ctypes.c_uint(2))  # SYNC_FILE_RANGE_WRITE


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write or replace a file so that a crash leaves the old one or the new one, whole: temporary, fsync, rename, fsync folder."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        write_new(temporary, data)
        replace(temporary, path)
    except Exception:
        with contextlib.suppress(OSError):
            unlink(temporary)
        raise


def write_parts(path: Path, parts: Sequence[tuple[int, bytes]]) -> None:
    """Write bytes at their offsets into a file that may have holes, made where it is not there. Neither fsynced nor whole at once: for
    what is checked when it is read."""
    _about_to("write", path)
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        for begin, data in parts:
            rest = memoryview(data)
            while rest:
                written = os.pwrite(descriptor, rest, begin)
                rest, begin = rest[written:], begin + written
    finally:
        os.close(descriptor)


def write_once(path: Path, data: bytes | memoryview) -> bool:
    """Write a file whole and durably unless one of that name is there; False then, and nothing has changed.

    Of any number of processes on any number of machines one succeeds: a hard link is made or not. Where the file system has none,
    two that come at the same moment may both succeed, and the later file stands.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        write_new(temporary, data)
        _about_to("link", path)
        try:
            os.link(temporary, path)
        except FileExistsError:
            unlink(temporary)
            return False
        except OSError as cause:
            if cause.errno not in _NO_LINKS:
                raise
            if path.exists():
                unlink(temporary)
                return False
            replace(temporary, path)
            return True
        unlink(temporary)
        fsync_dir(path.parent)
    except Exception:
        with contextlib.suppress(OSError):
            unlink(temporary)
        raise
    return True


def create_mark(path: Path, data: bytes) -> bool:
    """Create a small file unless it is there, False then. It promises nothing after a crash, so it is neither fsynced nor observed."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
    return True


def remove_mark(path: Path) -> None:
    """Remove what :func:`create_mark` made, if it is there."""
    path.unlink(missing_ok=True)


def stamped(path: Path) -> float:
    """Give a file of ours the time that its file system has now, and return it: seconds on that clock, whoever's clock that is."""
    os.utime(path)
    return path.stat().st_mtime


def replace(source: Path, target: Path) -> None:
    """Rename within one file system, over an existing file, and fsync the folder."""
    rename(source, target)
    fsync_dir(target.parent)


def rename(source: Path, target: Path) -> None:
    """As :func:`replace`, but the caller fsyncs the folder, after many."""
    _about_to("rename", target)
    source.replace(target)


def exchange(one: Path, other: Path) -> bool:
    """Swap two entries of one folder in a single step and fsync the folder; False where the system or the file system cannot.

    Linux: ``renameat2`` with ``RENAME_EXCHANGE`` (ext4, xfs, btrfs, tmpfs, overlayfs and others).
    """
    rename = getattr(_system(), "renameat2", None)
    if rename is None:
        return False
    _about_to("exchange", other)
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), flag) != 0:
        return False
    for folder in {one.parent, other.parent}:
        fsync_dir(folder)
    return True


def append(path: Path, data: bytes) -> None:
    """Append to a log. Not fsynced: a log is outside what a bank promises."""
    _about_to("write", path)
    with path.open("ab") as file:
        file.write(data)


def share_mode(model: Path, path: Path) -> None:
    """Give a file, as another library wrote it, the permissions of one that was written here."""
    _about_to("chmod", path)
    path.chmod(model.stat().st_mode & 0o777)


def fsync_dir(path: Path) -> None:
    """Make the entries of a folder durable. Windows has no such operation; there this does nothing."""
    _about_to("fsync-dir", path)
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file and folder below ``folder``, and the folder, durable: for trees written by another library."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            _about_to("fsync", path)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_dir(Path(root))


def make_dirs(path: Path, *, below: Path | None = None) -> None:
    """Create a folder and its parents, durably. FileNotFoundError where ``below``, a folder above it, is not there: it is not made."""
    if path.is_dir():
        return
    if path == below:
        raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(path))
    make_dirs(path.parent, below=below)
    _about_to("mkdir", path)
    path.mkdir(exist_ok=True)
    fsync_dir(path.parent)


def unlink(path: Path) -> None:
    """Remove a file if it is there."""
    _about_to("unlink", path)
    path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it, links not followed. What another process removes meanwhile is gone too."""
    _about_to("rmtree", path)

    def tell(function: Callable[..., object], name: str, error: tuple[type[BaseException], BaseException, object]) -> None:
        if not isinstance(error[1], FileNotFoundError):
            raise error[1]

    shutil.rmtree(path, onerror=tell)


def remove_empty(path: Path) -> None:
    """Remove a folder unless something is, or somebody writes, in it."""
    _about_to("rmdir", path)
    with contextlib.suppress(OSError):
        path.rmdir()


def open_regular(path: str | os.PathLike[str], *, error: type[SvdbankError]) -> int:
    """A file descriptor for reading what a stranger may have put there: a link could lead out, and opening a pipe would wait.

    FileNotFoundError where there is no such file; ``error`` for a link, pipe, device or folder, and where it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError) as cause:
        raise FileNotFoundError(str(path)) from cause
    except OSError as cause:
        raise error(f"{path}: cannot be opened: {cause.strerror}") from cause
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: not a regular file")
    return descriptor


def read_document(path: Path, *, error: type[SvdbankError], largest: int = 1 << 28) -> bytes:
    """A file of a folder that people hand on, links followed, as the Hub's cache is made of them.

    FileNotFoundError where there is none; ``error`` for a pipe, device or folder, for more than ``largest`` bytes, and where it cannot be
    read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: not a regular file")
        if status.st_size > largest:
            raise error(f"{path}: {status.st_size} bytes, more than such a file has")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as cause:
        raise FileNotFoundError(str(path)) from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}") from cause


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_join(root: Path, name: str, *, error: type[SvdbankError] = OptionError) -> Path:
    """``root/name`` for a relative POSIX name from outside; refuses absolute names, drives, backslashes and ``..``."""
    parts = name.split("/")
    if (
        not name
        or any(part in ("", ".", "..") for part in parts)
        or any(ch in name for ch in "\\:\0")
        or PurePosixPath(name).is_absolute()
    ):
        raise error(f"{name!r} is not a plain relative file name")
    return root.joinpath(*parts)


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` and ``~user`` replaced; that of a user who is not there stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def free_bytes(path: Path) -> int:
    """Free space for an ordinary user on the file system that holds ``path`` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def same_disk(one: Path, other: Path) -> bool:
    """True where two paths, or their nearest existing parents, lie on the same file system."""
    devices = []
    for path in (one, other):
        while not path.exists():
            path = path.parent
        devices.append(path.stat().st_dev)
    return devices[0] == devices[1]
