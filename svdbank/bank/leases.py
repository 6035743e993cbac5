"""Leases: how a worker shows that it is alive, to workers on the same machine and on others.

A worker has one file in its session. It touches the file a few times a lease, and holds an operating system's lock on it as long as
it lives. On the same machine the lock tells at once that a worker is dead; from other machines, where locks may not reach, and of a
worker that is stopped, the age of the file tells. Ages are differences of times of one file system: no machine's clock is asked.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from svdbank.bank.sessions import WORKERS, Session
from svdbank.core import disk

_fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows: ages alone
    import fcntl

    _fcntl = fcntl

#: Seconds without a sign of life after which a worker counts as dead; ``SVDBANK_LEASE`` overrides.
LEASE = 60.0

#: Signs of life in a lease.
_BEATS = 6


class Worker(msgspec.Struct, frozen=True):
    """What a worker says of itself: where it runs, on what, and after how many seconds of silence it is to be taken for dead."""

    host: str
    pid: int
    boot: str
    device: str
    seconds: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Seen:
    """A worker as others see it: its name, what it says of itself (None: not readable) and whether it counts as alive."""

    name: str
    worker: Worker | None
    alive: bool


_WORKER = msgspec.json.Decoder(Worker)


class Lease:
    """A worker's lease; begins and ends with the block. ``lost`` once others have taken the worker for dead and swept it away."""

    def __init__(self, session: Session, *, device: str = "", seconds: float | None = None) -> None:
        self.session = session
        self.name = secrets.token_hex(8)
        self.lost = False
        self._seconds = seconds if seconds is not None else lease_seconds()
        self._device = device
        self._path = session.folder / WORKERS / self.name
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="svdbank-lease", daemon=True)
        self._descriptor = -1

    def __enter__(self) -> Self:
        me = Worker(socket.gethostname(), os.getpid(), _boot(), self._device, self._seconds)
        temporary = self._path.with_name(f".{self.name}{disk.TEMPORARY}")
        # Under another name until it is locked: nobody may find it unlocked and take its worker for dead.
        disk.create_mark(temporary, msgspec.json.encode(me))
        self._descriptor = os.open(temporary, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        if _fcntl is not None:
            with contextlib.suppress(OSError):  # no locks on this file system: the age alone tells
                _fcntl.flock(self._descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        temporary.replace(self._path)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            disk.remove_mark(self._path)

    def now(self) -> float:
        """The file system's time, got by a sign of life."""
        try:
            return disk.stamped(self._path)
        except FileNotFoundError:
            self.lost = True
            raise

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / _BEATS):
            try:
                self.now()
            except FileNotFoundError:
                return
            except OSError:
                continue  # a server that is away for a moment


def lease_seconds() -> float:
    """Length of a lease: ``SVDBANK_LEASE`` seconds, or :data:`LEASE`."""
    try:
        asked = float(os.environ.get("SVDBANK_LEASE", ""))
    except ValueError:
        return LEASE
    return asked if 0.1 <= asked <= 86400 else LEASE


def workers(session: Session, now: float) -> list[Seen]:
    """The workers of a session at the time ``now`` of its file system, dead ones too as long as nobody has swept them away."""
    with contextlib.suppress(FileNotFoundError):
        names = sorted(path.name for path in (session.folder / WORKERS).iterdir())
        return [seen(session, name, now) for name in names if not name.startswith(".")]
    return []


def seen(session: Session, name: str, now: float) -> Seen:
    """The worker of a name at the time ``now`` of the file system."""
    try:
        descriptor = os.open(session.folder / WORKERS / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except (FileNotFoundError, NotADirectoryError):
        return Seen(name, None, False)
    try:
        try:
            worker = _WORKER.decode(os.read(descriptor, 4096))
        except msgspec.DecodeError:
            return Seen(name, None, False)
        silent = now - os.fstat(descriptor).st_mtime
        alive = silent <= worker.seconds and not (worker.boot == _boot() and _is_unlocked(descriptor))
        return Seen(name, worker, alive)
    finally:
        os.close(descriptor)


def _is_unlocked(descriptor: int) -> bool:
    """True where nobody holds the lock of a file, as far as this machine can tell."""
    if _fcntl is None:
        return False
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_SH | _fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@functools.cache
def _boot() -> str:
    """What this machine calls itself since it was started: locks of processes that say the same can be trusted."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
