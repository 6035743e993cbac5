"""Sessions: what the workers at one frozen plan share below ``records/``, and what shuts out those of before.

A session is a folder of a random name. Whoever begins one while no worker is alive renames the folder of the last: records are kept, and
whoever still writes into the old name, woken after hours or of a bank that was deleted meanwhile, finds no such folder.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from svdbank.bank.files import read_regular
from svdbank.bank.layout import RECORDS, ShardRecord
from svdbank.core import disk
from svdbank.core.errors import DamageError
from svdbank.core.specs import Plan, from_json, to_json

#: Folder of the workers' signs of life. No family's name begins with a dot.
WORKERS = ".workers"

_NAME = re.compile(r"[0-9a-f]{16}")

#: A shard: its family and its number there.
Key = tuple[str, int]


@dataclass(frozen=True)
class Session:
    """The folder of one session; its files may come and go at any time."""

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.root / RECORDS / self.name

    def record_path(self, family: str, index: int) -> Path:
        """Where the record of a shard is, once it is done."""
        return self.folder / family / f"{index}.json"

    def claim_path(self, family: str, index: int) -> Path:
        """Where the name of whoever works on a shard stands."""
        return self.folder / family / f"{index}.claim"

    def recorded(self, plan: Plan) -> set[Key]:
        """The shards of a plan that are recorded, by looking at names."""
        return {key for key, kind in self._marks(plan) if kind == "json"}

    def claimed(self, plan: Plan) -> set[Key]:
        """The shards of a plan that somebody has claimed, alive or not."""
        return {key for key, kind in self._marks(plan) if kind == "claim"}

    def read(self, family: str, index: int) -> ShardRecord | None:
        """The record of a shard; None where there is none, or none that can be read."""
        path = self.record_path(family, index)
        try:
            return from_json(read_regular(path), ShardRecord, where=str(path), error=DamageError)
        except (FileNotFoundError, DamageError):
            return None

    def add(self, record: ShardRecord) -> bool:
        """Record a shard, unless it is recorded: then False. FileNotFoundError where the session is over."""
        return disk.write_once(self.record_path(record.family, record.index), to_json(record))

    def forget(self, family: str, index: int) -> None:
        """Remove a record that does not hold."""
        disk.unlink(self.record_path(family, index))

    def _marks(self, plan: Plan) -> Iterator[tuple[Key, str]]:
        for family in dict.fromkeys(shard.family for shard in plan.shards):
            for name in _names(self.folder / family):
                number, _, kind = name.partition(".")
                if number.isdecimal():
                    yield (family, int(number)), kind


def current_session(root: Path) -> Session | None:
    """The session at the unfinished build of a bank; None where none has begun."""
    names = sorted(name for name in _names(root / RECORDS) if _NAME.fullmatch(name))
    return Session(root, names[0]) if names else None


def begin_session(root: Path, families: Iterable[str]) -> Session:
    """A session with the records of the last one and nothing else of it. The caller holds the bank's lock, and no worker is alive."""
    last, session = current_session(root), Session(root, secrets.token_hex(8))
    disk.make_dirs(root / RECORDS)
    if last is not None:
        disk.replace(last.folder, session.folder)
    for name in _names(root / RECORDS):
        if name != session.name:
            disk.remove_tree(root / RECORDS / name)
    for family in (WORKERS, *families):
        disk.make_dirs(session.folder / family)
        for name in _names(session.folder / family):
            if not name.endswith(".json") or name.startswith("."):
                disk.remove_mark(session.folder / family / name)
    return session


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
