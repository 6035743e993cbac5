"""Who works on which shard. A claim is a file that can be made once; it holds as long as its worker's lease does.

Claims save work and decide nothing: that two workers hold one shard for a moment, because one was stopped for longer than its lease or a
file system answers late, costs a solve. What counts is who records the shard, and that is one (:meth:`Session.add`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from svdbank.bank.leases import Lease, Seen, seen, workers
from svdbank.bank.sessions import Session, current_session
from svdbank.core import disk
from svdbank.core.errors import LockedError
from svdbank.core.specs import Plan, ShardSpec

#: Seconds in which a worker that has made a claim writes its name into it; one that is empty for longer is a dead worker's.
_NAMING = 5.0


class Claims:
    """The claims of one worker: at most one worker holds a shard's. Those still held at the end of the block are let go.

    Whoever has claimed a shard looks for its record before working on it: another may have been there.
    """

    def __init__(self, session: Session, lease: Lease) -> None:
        self._session = session
        self._lease = lease
        #: Whether each of them has our name in it. Noted before it is made: an interrupt may fall between any two steps.
        self._held: dict[ShardSpec, bool] = {}
        self._changing = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for shard in list(self._held):
            self.release(shard)

    def take(self, shard: ShardSpec) -> bool:
        """Claim a shard, also one that a dead worker holds; False where a living one has it. LockedError where the session is over."""
        path = self._session.claim_path(shard.family, shard.index)
        self._note(shard, named=False)
        try:
            taken = disk.create_mark(path, self._lease.name.encode()) or (
                self._freed(path) and disk.create_mark(path, self._lease.name.encode())
            )
        except FileNotFoundError as cause:
            raise session_over(self._session.root) from cause
        self._note(shard, named=True if taken else None)
        return taken

    def release(self, shard: ShardSpec) -> None:
        """Let a claimed shard go; from any thread. Nothing where another has taken it meanwhile."""
        named = self._held.get(shard, True)
        path = self._session.claim_path(shard.family, shard.index)
        with contextlib.suppress(FileNotFoundError):
            holder = path.read_text()
            if holder == self._lease.name or not (named or holder):
                disk.remove_mark(path)
        self._note(shard, named=None)

    def _note(self, shard: ShardSpec, *, named: bool | None) -> None:
        with self._changing:
            if named is None:
                self._held.pop(shard, None)
            else:
                self._held[shard] = named

    def _freed(self, path: Path) -> bool:
        """Take a dead worker's claim away; False where its worker is alive or another one is at the same."""
        try:
            holder, made = path.read_text(), path.stat().st_mtime
        except FileNotFoundError:
            return True
        if _is_held(self._session, holder, made, self._lease.now()):
            return False
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{disk.TEMPORARY}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return False
        mine = aside.read_text() == holder
        if not mine:  # another has been quicker, and this is its claim
            with contextlib.suppress(FileExistsError, OSError):
                os.link(aside, path)
        disk.remove_mark(aside)
        return mine


def free_shards(session: Session, plan: Plan, shards: Iterable[ShardSpec], lease: Lease) -> set[ShardSpec]:
    """Those of a plan's ``shards`` that nobody who is alive has claimed. LockedError where the session is over."""
    free = {(shard.family, shard.index): shard for shard in shards}
    try:
        now = lease.now()
    except FileNotFoundError as cause:
        raise session_over(session.root) from cause
    for key in session.claimed(plan) & free.keys():
        if not is_free(session, free[key], now):
            del free[key]
    return {*free.values()}


def is_free(session: Session, shard: ShardSpec, now: float) -> bool:
    """True where nobody who is alive at the time ``now`` of the file system has claimed a shard."""
    path = session.claim_path(shard.family, shard.index)
    try:
        return not _is_held(session, path.read_text(), path.stat().st_mtime, now)
    except FileNotFoundError:
        return True


def _is_held(session: Session, holder: str, made: float, now: float) -> bool:
    """True where the worker that a claim names is alive, or is about to write its name: a claim is empty before."""
    return seen(session, holder, now).alive if holder else now - made < _NAMING


def session_over(root: Path) -> LockedError:
    """The error of a worker that others took for dead, or whose bank is gone."""
    return LockedError(
        f"{root}: this worker was silent for longer than its lease, and the build has gone on without it, or the bank was removed",
        hint="what it recorded is kept: the same command joins the work again",
    )


def living(root: Path) -> list[Seen]:
    """The workers that are at a bank now. The caller holds the bank's lock."""
    session = current_session(root)
    if session is None:
        return []
    try:
        now = disk.stamped(root / ".lock")
    except FileNotFoundError:
        now = time.time()
    return [one for one in workers(session, now) if one.alive]


def refuse_claimed(root: Path) -> None:
    """LockedError where workers are at this bank. What a dead process left binds nobody. The caller holds the bank's lock."""
    if alive := living(root):
        who = f"{alive[0].worker}" + (f" and {len(alive) - 1} more" if len(alive) > 1 else "")
        raise LockedError(
            f"{root}: another process is working on it ({who})",
            hint="wait for it, stop it, or join it: svdbank build … --shard 2/2",
        )
