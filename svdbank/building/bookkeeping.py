"""What a build takes beside its solves, measured on small banks that are made for it: reading, hashing, writing, records, publish."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from svdbank.bank.claims import Claims
from svdbank.bank.writing import BankWriter
from svdbank.building.execution import lease_of
from svdbank.building.memory import give_back
from svdbank.building.preparation import PreparedBuild, prepare
from svdbank.building.publication import publish
from svdbank.building.rates import PublishRate
from svdbank.building.records import Solved, log, shard_record
from svdbank.building.request import build_request
from svdbank.building.shards import shard_works
from svdbank.checkpoint.source import Checkpoint, open_local
from svdbank.core.locks import locked
from svdbank.core.probe import taken
from svdbank.core.specs import ignore_progress
from svdbank.solver import minor_basis

_ROLES = ("query", "key", "value")

_REPEATS = 3


@dataclass(frozen=True)
class Books:
    """Bytes a second and seconds, as :class:`svdbank.building.rates.Rates` has them."""

    read: float
    hash: float
    disk: float | None
    write: float
    shard: float
    weight: float
    busy: float
    publish: PublishRate


@dataclass(frozen=True)
class _Bank:
    """A small bank that was made: how much of what, and seconds that each shard (median), all of them and the publish took."""

    families: int
    shards: int
    weights: int
    nbytes: int
    each: float
    seconds: float
    busy: float
    publish: float


def kept_books(folder: Path) -> Books:
    """Measure below an empty ``folder``; some seconds."""
    one = _made(folder / "one", (48, 48), count=10)
    more = _made(folder / "more", (48, 48), count=40)
    roles = _made(folder / "roles", (48, 48), count=5, families=3)
    shared = _made(folder / "shared", (48, 48), count=300)
    large = _made(folder / "large", (512, 4096), count=8, rank=128)
    shard = median((one.each, more.each, roles.each))
    seconds = large.each - shard
    read, hashed, cold = _reading(folder / "large" / "model")
    return Books(
        read=read,
        hash=hashed,
        disk=cold,
        write=large.nbytes / large.shards / max(seconds, 1e-4),
        shard=shard,
        weight=max(0.0, shared.seconds - shared.shards * shard) / shared.weights,
        busy=min(1.0, (one.busy + large.busy) / (one.seconds + large.seconds)),
        publish=_publish((one, more, roles, shared)),
    )


def _publish(banks: tuple[_Bank, ...]) -> PublishRate:
    """Seconds once, a family, a shard and a weight that come closest, none below 0."""
    counts = np.array([(1, bank.families, bank.shards, bank.weights) for bank in banks], dtype=float)
    found, *_ = np.linalg.lstsq(counts, np.array([bank.publish for bank in banks]), rcond=None)
    once, family, shard, weight = (max(0.0, float(value)) for value in found)
    return PublishRate(once=once, family=family, shard=shard, weight=weight)


def _made(folder: Path, shape: tuple[int, int], *, count: int, families: int = 1, rank: int = 16) -> _Bank:
    """Write a checkpoint and its bank, with the vectors of one solve for all weights."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    model = _checkpoint(folder / "model", matrix, count, families)
    basis, probe = minor_basis(matrix, rank), taken(matrix)
    with open_local(model) as checkpoint:
        prepared = _prepared(checkpoint, model, folder / "bank", rank)
        session = prepared.session
        assert session is not None
        writer = BankWriter(prepared.root, prepared.plan, generation=0, session=session)
        each, busy = [], time.process_time()
        with lease_of(session, "cpu") as lease, Claims(session, lease) as claims:
            for work in shard_works(prepared.plan, prepared.weights, prepared.todo):
                begun = time.perf_counter()
                claims.take(work.shard)
                solved = [Solved(weight, basis, "0" * 64, probe) for weight in work.weights]
                writer.write_shard(work.shard, [basis] * len(solved), shard_record(work, solved))
                claims.release(work.shard)
                give_back()
                log(prepared.root, "shard", family=work.family.name, index=work.shard.index)
                each.append(time.perf_counter() - begun)
        busy = time.process_time() - busy
        begun = time.perf_counter()
        with locked(prepared.root):
            manifest = publish(prepared.root, prepared.plan, 0, progress=ignore_progress)
        published = time.perf_counter() - begun
    weights, shards = count * families, len(prepared.todo)
    return _Bank(families, shards, weights, manifest.nbytes, median(each), sum(each), min(busy, sum(each)), published)


def _checkpoint(folder: Path, matrix: torch.Tensor, count: int, families: int) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    names = [f"encoder.layer.{layer}.attention.self.{role}.weight" for layer in range(count) for role in _ROLES[:families]]
    save_file({name: matrix.clone() for name in names}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return folder


def _prepared(checkpoint: Checkpoint, model: Path, bank: Path, rank: int) -> PreparedBuild:
    request = build_request(model, bank, rank=rank, device="cpu", jobs=1)
    with locked(bank):
        return prepare(checkpoint, request, device="cpu", progress=ignore_progress)


def _reading(model: Path) -> tuple[float, float, float | None]:
    """Bytes a second of one thread: copied out of memory; hashed, and read from the disk, beside that (None: it cannot be told)."""
    from svdbank.checkpoint.naming.selection import decomposable

    with open_local(model) as checkpoint:
        weights, _ = decomposable(checkpoint)
        nbytes = sum(weight.nbytes for weight in weights)

        def seconds(hashed: bool) -> float:
            begun = time.perf_counter()
            for weight in weights:
                checkpoint.read_hashed(weight) if hashed else checkpoint.read(weight)
            return time.perf_counter() - begun

        seconds(True)
        copied = median(seconds(False) for _ in range(_REPEATS))
        hashed = median(seconds(True) for _ in range(_REPEATS))
        cold = None
        if _forgotten(model / "model.safetensors"):
            cold = seconds(False) - copied
    # A disk as fast as memory is none that is waited for.
    return nbytes / copied, nbytes / max(hashed - copied, 1e-6), nbytes / cold if cold is not None and cold > 0 else None


def _forgotten(path: Path) -> bool:
    """Have the system forget what it keeps of a file in memory; False where it cannot be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
