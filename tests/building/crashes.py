"""A disk that forgets what was not fsynced, and a process that stops before any chosen operation."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class Crash(BaseException):
    """The process is gone. Not an Exception: no cleanup handler of a dead process runs."""


class FaultyDisk:
    """Observes svdbank's file operations, stops at one of them, and knows what a power cut would have left.

    ``stop_at`` is the number of the operation that does not happen (None: count only). After a :class:`Crash` every further
    operation crashes too; with ``error`` that one operation fails with it and the process goes on.
    """

    def __init__(self, root: Path, *, stop_at: int | None = None, error: OSError | None = None) -> None:
        self.root = root
        self.stop_at = stop_at
        self.error = error
        self.operations: list[str] = []
        self.crashed = False
        self._contents: dict[int, bytes] = {}  # inode → bytes as of its last fsync
        # inode of a folder, which a rename keeps → its entries as of its last fsync: name → (inode, is a folder)
        self._entries: dict[int, dict[str, tuple[int, bool]]] = {}
        self._created: Path | None = None
        self._one_at_a_time = threading.Lock()

    def __call__(self, operation: str, path: Path) -> None:
        with self._one_at_a_time:
            self._observe(operation, path)

    def _observe(self, operation: str, path: Path) -> None:
        if self.crashed:
            raise Crash
        self._settle()
        if len(self.operations) == self.stop_at:
            if self.error is not None:
                self.operations.append(f"{operation} failed")
                raise self.error
            self.crashed = True
            raise Crash
        self.operations.append(f"{operation} {path.name}")
        # What follows is true once the operation is done; nothing else happens in between.
        if operation in ("create", "mkdir"):
            self._created = path
        elif operation == "fsync":
            self._contents[path.stat().st_ino] = path.read_bytes()
        elif operation == "fsync-dir":
            self._entries[path.stat().st_ino] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}

    def _settle(self) -> None:
        if self._created is not None and self._created.exists():
            # A fresh inode may carry the number of something deleted earlier; its bytes or entries are not durable yet.
            inode = self._created.stat().st_ino
            self._contents.pop(inode, None)
            self._entries.pop(inode, None)
        self._created = None

    def after_power_cut(self, target: Path) -> None:
        """Write into ``target`` what is certain to be on the disk: fsynced bytes under fsynced names, torn files elsewhere."""
        self._settle()
        target.mkdir(parents=True, exist_ok=True)
        if self.root.exists():
            self._restore(self.root.stat().st_ino, target)

    def _restore(self, folder: int, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for name, (inode, is_folder) in self._entries.get(folder, {}).items():
            if is_folder:
                self._restore(inode, target / name)
            else:
                # The name survived, the bytes did not: half of a file is the worst a reader can meet.
                (target / name).write_bytes(self._contents.get(inode, b"\0torn\0"))
