"""The writer's lock of a folder: one process at a time, and whoever comes second is told who the first one is."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from svdbank.core import disk
from svdbank.core.errors import LockedError, OptionError

#: Seconds after which one that waits for a lock asks again.
_ASK_AGAIN = 0.1


class _Owner(msgspec.Struct):
    host: str
    pid: int


_OWNER = msgspec.json.Decoder(_Owner)


@contextlib.contextmanager
def locked(folder: Path, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the writer's lock of a folder.

    A file beside it names the owner, so that the error can say who. Raises :class:`LockedError`; with ``waiting`` it waits instead, and
    calls that with who has the lock, again and again.
    """
    owner_path = folder / ".lock.owner"
    while True:
        disk.make_dirs(folder)
        with _held(folder / ".lock", owner_path) as held:
            if held:
                _write_owner(owner_path)
                yield
                return
        if waiting is None:
            raise LockedError(
                f"{folder}: another process is writing here{_describe(owner_path)}", hint="wait for it, or stop it"
            )
        waiting(_describe(owner_path).strip(" ()"))
        time.sleep(_ASK_AGAIN)


@contextlib.contextmanager
def _held(path: Path, *beside: Path) -> Iterator[bool]:
    """Hold an operating system's lock, which ends with the process however that ends; False at once where another one holds it.

    Its file goes with it, and those ``beside`` it before. The block may end in another thread than it began in.
    """
    import filelock  # a twentieth of a second, which only writers should wait

    with contextlib.suppress(FileNotFoundError):  # one look: it may come and go between two
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OptionError(
                f"{path}: a link, pipe or folder where a lock belongs", hint="see who put it there, and remove it"
            )
    lock = filelock.FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
        ours = path.stat()
    except (filelock.Timeout, FileNotFoundError):  # not found: somebody is removing the folder
        lock.release()
        yield False
        return
    try:
        yield True
    finally:
        # All go while the lock is held: filelock lets nobody in through an unlinked file, and leaves the name alone on release.
        # Where the caller removed or renamed the folder, another process may have made and locked it anew.
        if _is_file(path, ours):
            for file in (*beside, path):
                file.unlink(missing_ok=True)
        lock.release()


def _is_file(path: Path, identity: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), identity)
    except FileNotFoundError:
        return False


def _write_owner(path: Path) -> None:
    """Say who holds the lock. What stands there, also a link to elsewhere, gives way."""
    with contextlib.suppress(OSError):  # it is for people alone
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            os.write(descriptor, msgspec.json.encode(_Owner(socket.gethostname(), os.getpid())))
        finally:
            os.close(descriptor)


def _describe(owner_path: Path) -> str:
    try:
        descriptor = disk.open_regular(owner_path, error=LockedError)
        try:
            owner = _OWNER.decode(os.read(descriptor, 1 << 12))
        finally:
            os.close(descriptor)
    except (OSError, LockedError, msgspec.DecodeError):
        return ""
    return f" (process {owner.pid} on {owner.host})"
