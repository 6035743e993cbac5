"""Where the files of a bank are read: sizes and byte ranges by name, wherever they lie.

What reads a bank asks for nothing else, and checks what it gets against index and manifest.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from svdbank.core import disk
from svdbank.core.errors import DamageError

#: A part of a file: its name inside the bank, first byte, and the byte behind the last one.
Range = tuple[str, int, int]

#: A small file (manifest, index, plan, record, metadata) is read whole; what claims to be larger than this is none.
SMALL_FILE = 1 << 30


class Files(Protocol):
    """The files of one bank. Names are relative, with ``/``; whoever takes one from outside checks it first (``disk.safe_join``)."""

    @property
    def place(self) -> str:
        """The bank, for people: what messages put before a name."""

    def size(self, name: str) -> int:
        """Bytes of a file. FileNotFoundError if it is not there; DamageError for a folder, pipe or link."""

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, in order. FileNotFoundError for a missing file; DamageError for one that ends early or is none."""


class Folder:
    """A bank's files in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def place(self) -> str:
        return str(self.root)

    def size(self, name: str) -> int:
        path = f"{self.root}/{name}"
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError) as cause:
            raise FileNotFoundError(path) from cause
        except (OSError, ValueError) as cause:
            if getattr(cause, "errno", errno.ENAMETOOLONG) != errno.ENAMETOOLONG:
                raise
            raise DamageError(f"{path[:200]}: no name that a file can have") from cause
        if not stat.S_ISREG(status.st_mode):
            raise DamageError(f"{path}: not a regular file")
        return status.st_size

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        parts: list[bytes] = []
        for name, group in groupby(ranges, key=itemgetter(0)):
            parts += self._read(f"{self.root}/{name}", group)
        return parts

    def names(self) -> Iterator[tuple[str, bool]]:
        """Every entry that is no folder, and whether it is a regular file; at the top, names that begin with a dot are left out."""
        for folder, folders, names in os.walk(self.root):
            if Path(folder) == self.root:
                folders[:] = [name for name in folders if not name.startswith(".")]
                names = [name for name in names if not name.startswith(".")]
            for name in (*names, *folders):
                path = Path(folder, name)
                mode = path.lstat().st_mode
                if not stat.S_ISDIR(mode):
                    yield path.relative_to(self.root).as_posix(), stat.S_ISREG(mode)

    @staticmethod
    def _read(path: str, ranges: Iterator[Range]) -> list[bytes]:
        """The parts of one file."""
        descriptor = disk.open_regular(path, error=DamageError)
        try:
            return [_read_exactly(descriptor, start, stop - start, path) for _, start, stop in ranges]
        finally:
            os.close(descriptor)


def read_small(files: Files, name: str) -> bytes:
    """A whole small file. FileNotFoundError if it is not there, DamageError for no regular file or one of a gigabyte."""
    if (size := files.size(name)) > SMALL_FILE:
        raise DamageError(f"{files.place}/{name}: {size} bytes where a small file belongs")
    (data,) = files.read_many([(name, 0, size)])
    return data


def read_regular(path: Path) -> bytes:
    """A whole small file of a bank that is being built; errors as :func:`read_small`."""
    return read_small(Folder(path.parent), path.name)


def _read_exactly(descriptor: int, start: int, count: int, path: str) -> bytes:
    """``count`` bytes from ``start``; DamageError where the file ends before."""
    data = os.pread(descriptor, count, start)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), start + len(data))
        if not more:
            raise DamageError(f"{path}: ends {count - len(data)} bytes early")
        data += more
    return data
