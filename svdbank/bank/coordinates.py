"""The small arrays along the weights of a family, gathered from its records one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdbank.bank.layout import ShardRecord
from svdbank.core.specs import FamilySpec

_CERTIFICATE = ("sigma_max", "sigma_min", "sigma_next", "orthogonality", "residual", "angle_bound")


class CoordinateColumns:
    """What a family's coordinate arrays hold. None is stored as NaN, or −1 in integers."""

    def __init__(self, family: FamilySpec) -> None:
        count = len(family.weights)
        self._at = 0
        self._count = count
        self._wide: dict[str, NDArray[np.float64]] = {}
        self._hashes = np.zeros((count, 32), dtype=np.uint8)
        self._integers = {name: np.empty(count, dtype=np.int32) for name in ("layer", "expert")}
        self._floats = {name: np.empty(count, dtype=np.float64) for name in _CERTIFICATE}

    def add(self, record: ShardRecord) -> None:
        """Take the next shard's weights."""
        stop = self._at + len(record.weights)
        rows = {"sigma": record.sigma, "probe": record.probe}
        if record.principal_sigma:
            rows["principal_sigma"] = record.principal_sigma
        for name, values in rows.items():
            if name not in self._wide:
                self._wide[name] = np.empty((self._count, len(values[0])), dtype=np.float64)
            self._wide[name][self._at : stop] = values
        for at, weight in enumerate(record.weights, self._at):
            self._hashes[at] = np.frombuffer(bytes.fromhex(weight.source_sha256), dtype=np.uint8)
            for name, integers in self._integers.items():
                number = getattr(weight, name)
                integers[at] = -1 if number is None else number
            for name, floats in self._floats.items():
                value = getattr(weight.certificate, name)
                floats[at] = np.nan if value is None else value
        self._at = stop

    def arrays(self) -> dict[str, tuple[NDArray[Any], tuple[str, ...]]]:
        """The arrays with their dimensions."""
        second = {"sigma": "rank", "probe": "sample", "principal_sigma": "principal_rank"}
        found: dict[str, tuple[NDArray[Any], tuple[str, ...]]] = {
            name: (values, ("weight", second[name])) for name, values in self._wide.items()
        }
        found["source_sha256"] = (self._hashes, ("weight", "byte"))
        found |= {name: (values, ("weight",)) for name, values in self._integers.items()}
        found |= {name: (values, ("weight",)) for name, values in self._floats.items()}
        return found
