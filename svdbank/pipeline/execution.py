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
from typing import Any

import msgspec
import torch
from torch import Tensor

from svdbank import fsio
from svdbank.adapter.recognition import differing
from svdbank.bank import Bank, BankWriter, Manifest, ShardRecord, WeightRecord, base_digest
from svdbank.bank.layout import LOG
from svdbank.basis import Basis
from svdbank.checkpoint import Checkpoint
from svdbank.errors import NotFiniteError, SolverError, WrongBaseError
from svdbank.pipeline.fetching import READ_AHEAD, FetchOptions, FetchPlan, FetchReport, fetched, files_of, plan_fetch
from svdbank.pipeline.memory import give_back
from svdbank.pipeline.planning import bank_bytes
from svdbank.pipeline.reading import Loaded, Reader
from svdbank.probe import probe_indices
from svdbank.solver import minor_basis, pinned_threads
from svdbank.specs import BaseSpec, FamilySpec, Plan, Progress, ProgressCallback, ShardSpec, Side, WeightSpec

#: Threads that read weights over a network: many hide its latency. A disk is kept busy by one.
READERS = 8

#: Seconds between progress reports while nothing is being solved.
_SHOW_EVERY = 1.0


@dataclass(frozen=True)
class _Work:
    """A shard with what it is made of."""

    shard: ShardSpec
    family: FamilySpec
    weights: list[WeightSpec]


class Execution:
    """One run of a build: counts the weights it solves and reuses, reports progress in weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        root: Path,
        device: torch.device,
        jobs: int,
        fetch: FetchOptions,
        progress: ProgressCallback,
    ) -> None:
        self.checkpoint = checkpoint
        self.root = root
        self.device = device
        self.jobs = jobs
        self.fetch = fetch
        self.progress = progress
        self.solved = 0
        self.reused = 0
        self.waited = 0.0
        self.way: FetchPlan | None = None

    def fetch_report(self) -> FetchReport:
        """How the bytes of the weights came, so far."""
        traffic = self.checkpoint.remote.traffic if self.checkpoint.remote is not None else None
        return FetchReport(
            way=self.way.way if self.way is not None else "local",
            checked=self.way is not None and self.way.checked,
            nbytes=traffic.nbytes if traffic is not None else 0,
            requests=traffic.requests if traffic is not None else 0,
            retries=traffic.retries if traffic is not None else 0,
            waiting_seconds=round(self.waited, 4),
        )

    def check_base(self, bank: Bank, weights: Sequence[WeightSpec]) -> bool:
        """Hash the weights a published bank holds; True when all are what it was built from, to the byte.

        False when all of them, by their probes, hold the same values in another dtype: a base that was saved again. WrongBaseError
        for the first that is neither.
        """
        same = True
        for done, weight in enumerate(weights):
            same &= self._check_base_weight(bank, weight)
            self.progress(Progress("check base", done + 1, len(weights), "weights", weight.name))
        return same

    def _check_base_weight(self, bank: Bank, weight: WeightSpec) -> bool:
        basis = bank[weight.name]
        if self._is_pinned(weight, bank.manifest.base):
            return True
        matrix, found = self.checkpoint.read_hashed(weight)
        if found == basis.source_sha256:
            return True
        values = torch.tensor(sample(matrix), dtype=torch.float64).to(matrix.dtype)
        if weight.dtype == basis.dtype or differing([values], [basis.probe()]):
            raise self._wrong_base(weight)
        return False

    def execute(self, plan: Plan, weights: Sequence[WeightSpec], generation: int, earlier: Bank | None) -> Manifest:
        """Carry a plan out, keeping the shards that are already whole, and publish."""
        specs = {weight.name: weight for weight in weights}
        families = {family.name: family for family in plan.families}
        shards = [
            _Work(shard, families[shard.family], [specs[n] for n in families[shard.family].weights[shard.start : shard.stop]])
            for shard in plan.shards
        ]
        writer = BankWriter(self.root, plan, generation=generation)
        kept = {work.shard: record for work in shards if (record := writer.record(work.shard)) is not None}
        todo = [work for work in shards if work.shard not in kept]
        ahead = [weight for work in todo for weight in work.weights]
        missing = bank_bytes(self.root, plan)
        self.way = plan_fetch(self.checkpoint, ahead, self.fetch, root=self.root, bank_bytes=missing)
        writer.begin()
        self._log("start", versions={"torch": torch.__version__, "python": platform.python_version()}, device=str(self.device))
        hashes = {} if earlier is None else {name: earlier[name].source_sha256 for name in earlier}
        for work in shards:
            if (done := kept.get(work.shard)) is not None:
                for weight, recorded in zip(work.weights, done.weights, strict=True):
                    self._check_source(weight, recorded.source_sha256, plan.base)
                    hashes[weight.name] = recorded.source_sha256
                self.reused += len(done.weights)
        total = sum(len(work.weights) for work in shards)
        self.progress(Progress("decompose", self.reused, total, "weights", ""))
        for record in self._solve_all(self._in_order(todo), writer):
            hashes.update({weight.name: weight.source_sha256 for weight in record.weights})
            self.solved += len(record.weights)
            self.progress(Progress("decompose", self.reused + self.solved, total, "weights", record.weights[-1].name))
        hashes.update({alias.name: hashes[alias.of] for alias in plan.aliases})
        self.progress(Progress("publish", 0, 1, "bank", str(self.root)))
        manifest = writer.publish(
            base_digest=base_digest(hashes),
            earlier=earlier.manifest if earlier else None,
            earlier_index=earlier.index if earlier else None,
        )
        self._log("published", solved=self.solved, reused=self.reused, fetch=msgspec.to_builtins(self.fetch_report()))
        self.progress(Progress("publish", 1, 1, "bank", str(self.root)))
        return manifest

    def _in_order(self, todo: Sequence[_Work]) -> list[_Work]:
        """Work of one thread count together; where files come one by one, each file's work together before that.

        Work on a file waits until the last of its files is there and then comes first, so that earlier files can go.
        """
        assert self.way is not None
        if self.way.way != "shards":
            return sorted(todo, key=lambda work: work.shard.threads)
        place = {file.name: number for number, file in enumerate(self.checkpoint.files)}

        def order(work: _Work) -> tuple[int, int, int]:
            places = [place[name] for weight in work.weights for name in files_of(weight)]
            return max(places), min(places), work.shard.threads

        return sorted(todo, key=order)

    def _solve_all(self, todo: Sequence[_Work], writer: BankWriter) -> Iterator[ShardRecord]:
        """Read and solve shards, yielding each record once it is durable."""
        assert self.way is not None
        groups = [work.weights for work in todo]
        remote = self.way.way in ("shards", "ranges")
        # Reads outlive downloads: a read that waits for a download is told to give up when that ends.
        with Reader(groups, threads=READERS if remote else 1, ahead=READ_AHEAD if remote else 0) as reader:
            begun = time.perf_counter()
            weights = [weight for group in groups for weight in group]
            with fetched(self.checkpoint, weights, self.way, self.progress) as downloads:
                self.waited += time.perf_counter() - begun  # a whole download comes before everything else

                def read(weight: WeightSpec) -> tuple[Tensor, str]:
                    result = self.checkpoint.read_hashed(weight)
                    downloads.done(files_of(weight))
                    return result

                reader.start(read)
                # One thread count at a time: two solves with different counts would fight over the processors.
                for threads, group in groupby(todo, key=lambda work: work.shard.threads):
                    with pinned_threads(threads):
                        yield from self._solve_group(list(group), reader, writer, at_once=self.jobs if threads == 1 else 1)

    def _solve_group(self, todo: Sequence[_Work], reader: Reader, writer: BankWriter, *, at_once: int) -> Iterator[ShardRecord]:
        """Solve shards, ``at_once`` at a time, while the next are read."""
        with ThreadPoolExecutor(at_once, "svdbank-solve") as solvers:
            running: set[Future[ShardRecord]] = set()
            try:
                for work in todo:
                    while len(running) >= at_once:
                        finished, running = wait(running, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in finished)
                    begun = time.perf_counter()
                    while pending := reader.pending():
                        either: set[Future[Any]] = {*pending, *running}
                        wait(either, timeout=_SHOW_EVERY, return_when=FIRST_COMPLETED)
                        del either, pending  # they hold what was read
                        finished = {future for future in running if future.done()}
                        running -= finished
                        yield from (future.result() for future in finished)
                        if not running:
                            self._show_download()
                    self.waited += time.perf_counter() - begun
                    loaded = reader.take()
                    running.add(solvers.submit(self._solve_shard, work, loaded, writer))
                    del loaded
                while running:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            except BaseException:
                # The solves under way end and are recorded; nothing new starts.
                solvers.shutdown(wait=False, cancel_futures=True)
                raise

    def _show_download(self) -> None:
        """Nothing is being solved: say what is waited for."""
        if self.way is not None and self.way.nbytes and self.checkpoint.remote is not None:
            done = min(self.checkpoint.remote.traffic.nbytes, self.way.nbytes)
            self.progress(Progress("download", done, self.way.nbytes, "bytes"))

    def _solve_shard(self, work: _Work, loaded: Loaded, writer: BankWriter) -> ShardRecord:
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
        bases.clear()
        give_back()
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

    def _check_source(self, weight: WeightSpec, expected: str, base: BaseSpec) -> None:
        if self._is_pinned(weight, base):
            return
        _, found = self.checkpoint.read_hashed(weight)
        if found != expected:
            raise self._wrong_base(weight)

    def _wrong_base(self, weight: WeightSpec) -> WrongBaseError:
        return WrongBaseError(
            f"{self.root} was built from another model: {weight.name} of {self.checkpoint.name} has other bytes",
            hint="give the bank another place with -o, or delete it",
        )

    def _is_pinned(self, weight: WeightSpec, base: BaseSpec) -> bool:
        """True for what is not on this machine and is, by name and commit, what the bank was made from: not fetched to be hashed."""
        remote = self.checkpoint.remote
        return (
            remote is not None
            and (self.checkpoint.name, self.checkpoint.revision) == (base.name, base.revision)
            and any(name in remote.files for name in files_of(weight))
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
