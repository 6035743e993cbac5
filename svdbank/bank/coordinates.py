"""The small arrays along the weights of a family, gathered from its records one after another.

The wide ones (σ, probes) go to the disk row by row: of 200,000 weights the probes alone are 400 MB.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from svdbank.bank.layout import CRC_BYTES, FileRecord, ShardRecord
from svdbank.core import disk
from svdbank.core.specs import FamilySpec

_CERTIFICATE = ("sigma_max", "sigma_min", "sigma_next", "orthogonality", "residual", "angle_bound")

#: Wide arrays and what their second dimension is.
_WIDE = {"sigma": "rank", "probe": "sample", "principal_sigma": "principal_rank"}


class CoordinateColumns:
    """What a family's coordinate arrays hold. None is stored as NaN, or −1 in integers.

    A context manager: chunk files of the wide arrays are below ``folder``, the family's, whole and durable at the end of the block.
    """

    def __init__(self, family: FamilySpec, folder: Path) -> None:
        count = len(family.weights)
        self._folder = folder
        self._at = 0
        self._count = count
        self._files = ExitStack()
        self._wide: dict[str, _Rows] = {}
        self._hashes = np.zeros((count, 32), dtype=np.uint8)
        self._integers = {name: np.empty(count, dtype=np.int32) for name in ("layer", "expert")}
        self._floats = {name: np.empty(count, dtype=np.float64) for name in _CERTIFICATE}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            for rows in self._wide.values():
                rows.end()
        self._files.__exit__(kind, value, trace)
        if kind is None:
            for rows in self._wide.values():
                disk.fsync_dir(rows.path.parent)

    def add(self, record: ShardRecord) -> None:
        """Take the next shard's weights."""
        for name in _WIDE:
            if values := getattr(record, name):
                if name not in self._wide:
                    self._wide[name] = _Rows(self._folder / name / "c" / "0" / "0", self._files)
                self._wide[name].add(np.array(values, dtype="<f8"))
        for at, weight in enumerate(record.weights, self._at):
            self._hashes[at] = np.frombuffer(bytes.fromhex(weight.source_sha256), dtype=np.uint8)
            for name, integers in self._integers.items():
                number = getattr(weight, name)
                integers[at] = -1 if number is None else number
            for name, floats in self._floats.items():
                value = getattr(weight.certificate, name)
                floats[at] = np.nan if value is None else value
        self._at += len(record.weights)

    def wide(self) -> dict[str, tuple[tuple[int, int], tuple[str, ...], FileRecord]]:
        """Shape and dimensions of the wide arrays, and the records of their only chunks; after the block."""
        return {
            name: ((self._count, rows.columns), ("weight", _WIDE[name]), rows.record()) for name, rows in self._wide.items()
        }

    def arrays(self) -> dict[str, tuple[NDArray[Any], tuple[str, ...]]]:
        """The others with their dimensions."""
        found: dict[str, tuple[NDArray[Any], tuple[str, ...]]] = {"source_sha256": (self._hashes, ("weight", "byte"))}
        found |= {name: (values, ("weight",)) for name, values in self._integers.items()}
        found |= {name: (values, ("weight",)) for name, values in self._floats.items()}
        return found


class _Rows:
    """The only chunk of an array of float64, as Zarr's codecs bytes and crc32c have it, written as its rows come."""

    def __init__(self, path: Path, files: ExitStack) -> None:
        self.path = path
        self.columns = 0
        self._size, self._crc, self._sha256 = 0, 0, hashlib.sha256()
        disk.make_dirs(path.parent)
        if path.exists():  # of a publish that was stopped
            disk.unlink(path)
        self._file = files.enter_context(disk.creating(path))

    def add(self, rows: NDArray[np.float64]) -> None:
        self.columns = rows.shape[1]
        data = rows.tobytes()
        self._crc = google_crc32c.extend(self._crc, data)
        self._append(data)

    def end(self) -> None:
        self._append(self._crc.to_bytes(CRC_BYTES, "little"))

    def record(self) -> FileRecord:
        return FileRecord(self._size, self._sha256.hexdigest(), 0, (), 0)

    def _append(self, data: bytes) -> None:
        self._sha256.update(data)
        self._file.append(data)
        self._size += len(data)
