"""What of a bank's folder goes to others: the files that it records, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from svdbank.bank.files import Folder
from svdbank.bank.index import data_files, parse_manifest
from svdbank.bank.layout import MANIFEST, FileRecord
from svdbank.bank.reading import Bank
from svdbank.core import disk
from svdbank.core.errors import BankError, DamageError, OptionError


@dataclass(frozen=True)
class LocalFile:
    """A file to be sent, with what tells whether it is still the one that was hashed."""

    name: str
    path: Path
    size: int
    sha256: str
    state: tuple[int, int, int]

    def check(self) -> None:
        """DamageError where the file is another one than was hashed."""
        if _state(self.path) != self.state:
            raise DamageError(
                f"{self.path}: changed while it was being sent", hint="run it again when nothing else writes to the bank"
            )


def inventory(bank: Bank) -> tuple[LocalFile, ...]:
    """Every recorded file of a bank on this disk, the manifest last. Locks, logs, times of use and unrecorded files are not among them."""
    root = folder_of(bank)
    return (*(_recorded(root, name, record) for name, record in _records(bank)), _manifest(root, bank))


def folder_of(bank: Bank) -> Path:
    """The folder of a bank on this disk; OptionError for one elsewhere."""
    if not isinstance(bank.files, Folder):
        raise OptionError(f"{bank.place} is not on this disk", hint=f"svdbank pull {bank.place}")
    return bank.files.root


def count_files(bank: Bank) -> int:
    """How many files :func:`inventory` has."""
    return sum(1 for _ in _records(bank)) + 1


def _records(bank: Bank) -> Iterator[tuple[str, FileRecord]]:
    yield from bank.manifest.files.items()
    for family in bank.index.families:
        yield from family.metadata.items()
        yield from data_files(family)


def _recorded(root: Path, name: str, record: FileRecord) -> LocalFile:
    path = disk.safe_join(root, name, error=DamageError)
    state = _state(path)
    if state[1] != record.size:
        raise BankError(f"{path}: not the file that was published", hint=f"svdbank verify {root} --data")
    return LocalFile(name, path, record.size, record.sha256, state)


def _manifest(root: Path, bank: Bank) -> LocalFile:
    path = root / MANIFEST
    state, data = _state(path), path.read_bytes()
    if parse_manifest(data, str(root)).digest != bank.manifest.digest:
        raise BankError(f"{root}: another bank was published here since it was opened", hint="run the same command again")
    return LocalFile(MANIFEST, path, len(data), hashlib.sha256(data).hexdigest(), state)


def _state(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_ino, status.st_size, status.st_mtime_ns
