"""Carrying a plan out: read, hash, solve, certify, write, record, shard by shard, then publish."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from svdbank import fsio
from svdbank.bank import Bank, BankWriter, Manifest, ShardRecord, WeightRecord, base_digest
from svdbank.bank.layout import LOG
from svdbank.basis import Basis
from svdbank.checkpoint import Checkpoint
from svdbank.errors import NotFiniteError, SolverError, WrongBaseError
from svdbank.probe import probe_indices
from svdbank.solver import minor_basis, pinned_threads
from svdbank.specs import FamilySpec, Plan, Progress, ProgressCallback, ShardSpec, Side, WeightSpec


@dataclass(frozen=True)
class _Work:
    """A shard with what it is made of."""

    shard: ShardSpec
    family: FamilySpec
    weights: list[WeightSpec]


class Execution:
    """One run of a build: counts the weights it solves and reuses, reports progress in weights."""

    def __init__(self, checkpoint: Checkpoint, root: Path, device: torch.device, jobs: int, progress: ProgressCallback) -> None:
        self.checkpoint = checkpoint
        self.root = root
        self.device = device
        self.jobs = jobs
        self.progress = progress
        self.solved = 0
        self.reused = 0

    def check_base(self, bank: Bank, weights: Sequence[WeightSpec]) -> None:
        """Hash the weights a published bank holds; raise WrongBaseError for the first that is not what it was built from."""
        for done, weight in enumerate(weights):
            self._check_source(weight, bank[weight.name].source_sha256)
            self.progress(Progress("check base", done + 1, len(weights), "weights", weight.name))

    def execute(self, plan: Plan, weights: Sequence[WeightSpec], generation: int, earlier: Bank | None) -> Manifest:
        """Carry a plan out, keeping the shards that are already whole, and publish."""
        specs = {weight.name: weight for weight in weights}
        families = {family.name: family for family in plan.families}
        shards = [
            _Work(shard, families[shard.family], [specs[n] for n in families[shard.family].weights[shard.start : shard.stop]])
            for shard in plan.shards
        ]
        writer = BankWriter(self.root, plan, generation=generation)
        writer.begin()
        self._log("start", versions={"torch": torch.__version__, "python": platform.python_version()}, device=str(self.device))
        hashes = {} if earlier is None else {name: earlier[name].source_sha256 for name in earlier}
        todo = []
        for work in shards:
            if (record := writer.record(work.shard)) is None:
                todo.append(work)
                continue
            for weight, kept in zip(work.weights, record.weights, strict=True):
                self._check_source(weight, kept.source_sha256)
                hashes[weight.name] = kept.source_sha256
            self.reused += len(record.weights)
        total = sum(len(work.weights) for work in shards)
        self.progress(Progress("decompose", self.reused, total, "weights", ""))
        # One thread count at a time: two solves with different counts would fight over the processors.
        for threads, group in groupby(sorted(todo, key=lambda work: work.shard.threads), key=lambda work: work.shard.threads):
            with pinned_threads(threads):
                for record in self._solve_all(list(group), writer, at_once=self.jobs if threads == 1 else 1):
                    hashes.update({weight.name: weight.source_sha256 for weight in record.weights})
                    self.solved += len(record.weights)
                    self.progress(Progress("decompose", self.reused + self.solved, total, "weights", record.weights[-1].name))
        self.progress(Progress("publish", 0, 1, "bank", str(self.root)))
        manifest = writer.publish(
            base_digest=base_digest(hashes),
            earlier=earlier.manifest if earlier else None,
            earlier_index=earlier.index if earlier else None,
        )
        self._log("published", solved=self.solved, reused=self.reused)
        self.progress(Progress("publish", 1, 1, "bank", str(self.root)))
        return manifest

    def _solve_all(self, todo: Sequence[_Work], writer: BankWriter, *, at_once: int) -> Iterator[ShardRecord]:
        """Solve shards, ``at_once`` at a time, while one thread reads the next; yields records as they become durable."""
        with ThreadPoolExecutor(1, "svdbank-read") as reader, ThreadPoolExecutor(at_once, "svdbank-solve") as solvers:
            running: set[Future[ShardRecord]] = set()
            try:
                ahead = reader.submit(self._load, todo[0])
                for number, work in enumerate(todo):
                    loaded = ahead.result()
                    if number + 1 < len(todo):
                        ahead = reader.submit(self._load, todo[number + 1])
                    while len(running) >= at_once:
                        finished, running = wait(running, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in finished)
                    running.add(solvers.submit(self._solve_shard, work, loaded, writer))
                    del loaded
                while running:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            except BaseException:
                # The solves under way end and are recorded; nothing new starts.
                reader.shutdown(wait=False, cancel_futures=True)
                solvers.shutdown(wait=False, cancel_futures=True)
                raise

    def _load(self, work: _Work) -> list[tuple[WeightSpec, Tensor, str]]:
        """Each weight of a shard with the sha256 of its stored bytes."""
        return [(weight, *self.checkpoint.read_hashed(weight)) for weight in work.weights]

    def _solve_shard(self, work: _Work, loaded: list[tuple[WeightSpec, Tensor, str]], writer: BankWriter) -> ShardRecord:
        """Solve the weights of a shard, giving each up once it is solved, and write them."""
        started = time.perf_counter()
        bases: list[Basis] = []
        weights: list[WeightRecord] = []
        probes: list[tuple[float, ...]] = []
        with pinned_threads(work.shard.threads):
            while loaded:
                weight, matrix, sha256 = loaded.pop(0)
                bases.append(self._solve(weight, matrix, work, writer.plan.options.side))
                probes.append(sample(matrix))
                weights.append(
                    WeightRecord(
                        name=weight.name,
                        module=weight.module,
                        layer=weight.layer,
                        expert=weight.expert,
                        dtype=weight.dtype,
                        source_sha256=sha256,
                        certificate=bases[-1].certificate,
                    )
                )
        record = ShardRecord(
            family=work.family.name,
            index=work.shard.index,
            weights=tuple(weights),
            files={},
            sigma=tuple(tuple(basis.minor.sigma.tolist()) for basis in bases),
            principal_sigma=tuple(tuple(b.principal.sigma.tolist()) for b in bases if b.principal is not None),
            probe=tuple(probes),
        )
        record = writer.write_shard(work.shard, bases, record)
        self._log("shard", family=work.family.name, index=work.shard.index, seconds=round(time.perf_counter() - started, 4))
        return record

    def _solve(self, weight: WeightSpec, matrix: Tensor, work: _Work, side: Side) -> Basis:
        try:
            return minor_basis(
                matrix,
                work.family.rank,
                side=side,
                solver=work.shard.path,
                principal=work.family.principal,
                device=self.device,
            )
        except NotFiniteError as cause:
            raise NotFiniteError(
                f"{weight.name} in {weight.sources[0].file}: {cause}",
                hint="leave it out with --targets, or repair the checkpoint",
            ) from cause
        except SolverError as cause:
            raise SolverError(f"{weight.name}: {cause}", hint=cause.hint) from cause

    def _check_source(self, weight: WeightSpec, expected: str) -> None:
        _, found = self.checkpoint.read_hashed(weight)
        if found != expected:
            raise WrongBaseError(
                f"{self.root} was built from another model: {weight.name} of {self.checkpoint.name} has other bytes",
                hint="give the bank another place with -o, or delete it",
            )

    def _log(self, event: str, **facts: object) -> None:
        """Times and machine facts, outside everything that is hashed."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
        fsio.append(self.root / LOG, json.dumps(line).encode() + b"\n")


def sample(matrix: Tensor) -> tuple[float, ...]:
    """A weight's probe: its entries at :func:`svdbank.probe.probe_indices`, exact in float64."""
    out_features, in_features = matrix.shape
    index = torch.tensor(probe_indices(out_features, in_features), device=matrix.device)
    values: list[float] = matrix[index // in_features, index % in_features].to(torch.float64).tolist()
    return tuple(values)
