"""What a build writes down: the records of shards, and a log of times and machine facts, outside everything that is hashed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svdbank.bank.layout import LOG, ShardRecord, WeightRecord
from svdbank.building.shards import ShardWork
from svdbank.core import disk
from svdbank.core.basis import Basis
from svdbank.core.specs import WeightSpec


@dataclass(frozen=True)
class Solved:
    """A weight with its basis on the CPU, the sha256 of its stored bytes and its probe."""

    weight: WeightSpec
    basis: Basis
    sha256: str
    probe: Sequence[float]


def shard_record(work: ShardWork, solved: Sequence[Solved]) -> ShardRecord:
    """The record of a shard whose weights are ``solved``, in order; its files and attempt are added by who writes them."""
    return ShardRecord(
        family=work.family.name,
        index=work.shard.index,
        attempt="",
        weights=tuple(
            WeightRecord(
                name=one.weight.name,
                module=one.weight.module,
                layer=one.weight.layer,
                expert=one.weight.expert,
                dtype=one.weight.dtype,
                source_sha256=one.sha256,
                certificate=one.basis.certificate,
            )
            for one in solved
        ),
        files={},
        sigma=tuple(tuple(one.basis.minor.sigma.tolist()) for one in solved),
        principal_sigma=tuple(tuple(one.basis.principal.sigma.tolist()) for one in solved if one.basis.principal is not None),
        probe=tuple(tuple(one.probe) for one in solved),
    )


def log(root: Path, event: str, **facts: object) -> None:
    """Append an event to the log of a bank."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
    disk.append(root / LOG, json.dumps(line).encode() + b"\n")
