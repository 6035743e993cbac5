"""Who works on which shard: a claim is a lock of the operating system, so that it ends with its process and a successor takes over."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from svdbank.bank.layout import RECORDS, claim_file
from svdbank.core import disk
from svdbank.core.errors import LockedError
from svdbank.core.specs import ShardSpec


class Claims:
    """The claims of one worker below ``root``: at most one worker holds a shard's. Those still held at the end of the block are let go.

    Two writers in one shard lose data. Whoever has claimed a shard looks for its record before working on it: another may have been there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held: dict[ShardSpec, contextlib.ExitStack] = {}
        self._changing = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for shard in list(self._held):
            self.release(shard)

    def take(self, shard: ShardSpec) -> bool:
        """Claim a shard; False where another worker has it."""
        path = self._root / claim_file(shard.family, shard.index)
        disk.make_dirs(path.parent)
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(disk.claimed(path)):
                return False
            with self._changing:
                self._held[shard] = stack.pop_all()
        return True

    def release(self, shard: ShardSpec) -> None:
        """Let a claimed shard go; from any thread."""
        with self._changing:
            held = self._held.pop(shard)
        held.close()


def refuse_claimed(root: Path) -> None:
    """LockedError where a worker is at a shard of this bank. Claims that a dead process left bind nobody."""
    for path in sorted((root / RECORDS).glob("*/*.claim")):
        with disk.claimed(path) as free:
            if not free:
                raise LockedError(f"{root}: another process is working on {path.parent.name}", hint="wait for it, or stop it")
