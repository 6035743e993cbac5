"""Carrying a plan out: read, hash, solve, certify, write, record, shard by shard, then publish."""

from __future__ import annotations

import contextlib
import json
import platform
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from svdbank.bank.index import base_digest
from svdbank.bank.layout import LOG, Manifest, ShardRecord, WeightRecord
from svdbank.bank.reading import Bank
from svdbank.bank.writing import STORED_TORCH, BankWriter
from svdbank.building.fetching import READ_AHEAD, FetchOptions, FetchPlan, FetchReport, fetched, files_of, plan_fetch
from svdbank.building.memory import give_back
from svdbank.building.planning import DEVICE_AHEAD, IN_FLIGHT, WRITERS, available_cpus, bank_bytes, planned_path
from svdbank.building.reading import Loaded, Reader
from svdbank.building.transfer import brought_home, uploaded
from svdbank.checkpoint import Checkpoint
from svdbank.core import disk
from svdbank.core.basis import Basis
from svdbank.core.errors import NotFiniteError, SolverError, WrongBaseError
from svdbank.core.probe import differing, taken
from svdbank.core.specs import BaseSpec, BuildOptions, FamilySpec, Plan, Progress, ProgressCallback, ShardSpec, Side, WeightSpec
from svdbank.solver import batch_bases, batch_peak_bytes, minor_basis, on_own_stream, peak_bytes, pinned_threads
from svdbank.solver.devices import give_back_device, kind_of
from svdbank.solver.sizes import DeviceKind

#: Threads that read weights over a network: many hide its latency. A disk is kept busy by one.
READERS = 8

#: Seconds after which one that waits for its turn looks whether memory has run out.
_LET_GO = 0.1

#: Seconds between progress reports while nothing is being solved.
_SHOW_EVERY = 1.0


@dataclass(frozen=True)
class _Work:
    """A shard with what it is made of."""

    shard: ShardSpec
    family: FamilySpec
    weights: list[WeightSpec]


@dataclass(frozen=True)
class _Batch:
    """Shards of one family that are solved together, on ``path``, ``size`` weights at a time (1: each by itself)."""

    works: tuple[_Work, ...]
    path: str
    size: int

    @property
    def weights(self) -> list[WeightSpec]:
        """All their weights, in order."""
        return [weight for work in self.works for weight in work.weights]

    @property
    def threads(self) -> int:
        """CPU threads of a solve, as planned."""
        return self.works[0].shard.threads

    def peak_bytes(self, kind: DeviceKind) -> int:
        """Memory of the device that solving takes, in bytes."""
        family, first = self.works[0].family, self.works[0].weights[0]
        itemsize = first.loaded_nbytes // max(1, first.out_features * first.in_features) or 1
        shape = family.out_features, family.in_features, family.rank
        single = peak_bytes(*shape, self.path, dtype_bytes=itemsize, kind=kind)
        solve = max(single, batch_peak_bytes(*shape, self.size, dtype_bytes=itemsize) if self.size > 1 else 0)
        return solve + self.size * first.loaded_nbytes  # one uploaded meanwhile


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
        self.kind = kind_of(device)
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._counting = threading.Lock()
        #: Turns on a GPU: who has one solves there.
        self._turns = 1
        self._slots = threading.Semaphore(1)
        self._taking_all = threading.Lock()
        #: Set once memory of the device has run out.
        self._scarce = False
        self._device_threads: ThreadPoolExecutor | None = None

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

    def stages(self) -> dict[str, float]:
        """Seconds by what they were spent on, summed over the threads that worked beside each other."""
        with self._counting:
            return {stage: round(seconds, 4) for stage, seconds in self._spent.items()}

    @contextlib.contextmanager
    def _spending(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._counting:
                self._spent[stage] += time.perf_counter() - begun

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
        values = torch.tensor(taken(matrix), dtype=torch.float64).to(matrix.dtype)
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
        for record in self._solve_all(self._batched(self._in_order(todo), plan), writer):
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

    def _batched(self, todo: Sequence[_Work], plan: Plan) -> list[_Batch]:
        """What is solved together: on a CPU each shard alone; on a GPU as the plan says, of single weights as many as a batch has."""
        if self.kind == "cpu":
            return [_Batch((work,), work.shard.path, 1) for work in todo]
        assert self.way is not None
        place = {file.name: number for number, file in enumerate(self.checkpoint.files)}
        groups: dict[tuple[int, str], list[_Work]] = {}
        for work in todo:
            # Files that come one by one go again one by one: what is solved together must lie in the same.
            last = max(place[name] for weight in work.weights for name in files_of(weight)) if self.way.way == "shards" else 0
            groups.setdefault((last, work.family.name), []).append(work)
        batches = []
        for works in groups.values():
            how = planned_path(plan, works[0].family, self.kind)
            step = max(1, how.batch // works[0].family.weights_per_shard)
            batches += [_Batch(tuple(works[i : i + step]), how.path, how.batch) for i in range(0, len(works), step)]
        return batches

    def _solve_all(self, todo: Sequence[_Batch], writer: BankWriter) -> Iterator[ShardRecord]:
        """Read and solve shards, yielding each record once it is durable."""
        assert self.way is not None
        groups = [batch.weights for batch in todo]
        remote = self.way.way in ("shards", "ranges")
        on_gpu = self.kind != "cpu"
        threads = READERS if remote else min(READERS, available_cpus()) if on_gpu else 1
        # Reads outlive downloads: a read that waits for a download is told to give up when that ends.
        with Reader(groups, threads=threads, ahead=DEVICE_AHEAD if on_gpu else READ_AHEAD if remote else 0) as reader:
            begun = time.perf_counter()
            weights = [weight for group in groups for weight in group]
            with fetched(self.checkpoint, weights, self.way, self.progress) as downloads:
                self.waited += time.perf_counter() - begun  # a whole download comes before everything else

                def read(weight: WeightSpec) -> tuple[Tensor, str]:
                    with self._spending("read and hash"):
                        result = self.checkpoint.read_hashed(weight)
                    downloads.done(files_of(weight))
                    return result

                reader.start(read)
                if on_gpu:
                    in_flight = self._in_flight(todo)
                    self._turns, self._slots = in_flight, threading.Semaphore(in_flight)
                    # What is solved is written while others are. Few threads use the device, since each brings the libraries'
                    # handles and workspaces with it: one more than solve, which uploads meanwhile.
                    with ThreadPoolExecutor(in_flight + 1, "svdbank-device") as self._device_threads, pinned_threads(1):
                        yield from self._solve_group(todo, reader, writer, at_once=in_flight + WRITERS)
                    return
                # One thread count at a time: two solves with different counts would fight over the processors.
                for threads, group in groupby(todo, key=lambda batch: batch.threads):
                    with pinned_threads(threads):
                        yield from self._solve_group(list(group), reader, writer, at_once=self.jobs if threads == 1 else 1)

    def _in_flight(self, todo: Sequence[_Batch]) -> int:
        """How many solves may share the GPU, by what is free of its memory; changes no byte of a result."""
        largest = max((batch.peak_bytes(self.kind) for batch in todo), default=0)
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(IN_FLIGHT, int(0.9 * free) // max(1, largest)))

    def _solve_group(
        self, todo: Sequence[_Batch], reader: Reader, writer: BankWriter, *, at_once: int
    ) -> Iterator[ShardRecord]:
        """Solve shards, ``at_once`` at a time, while the next are read."""
        with ThreadPoolExecutor(at_once, "svdbank-solve") as solvers:
            running: set[Future[list[ShardRecord]]] = set()
            try:
                for batch in todo:
                    while len(running) >= at_once:
                        finished, running = wait(running, return_when=FIRST_COMPLETED)
                        for future in finished:
                            yield from future.result()
                    begun = time.perf_counter()
                    while pending := reader.pending():
                        either: set[Future[Any]] = {*pending, *running}
                        wait(either, timeout=_SHOW_EVERY, return_when=FIRST_COMPLETED)
                        del either, pending  # they hold what was read
                        finished = {future for future in running if future.done()}
                        running -= finished
                        for future in finished:
                            yield from future.result()
                        if not running:
                            self._show_download()
                    self.waited += time.perf_counter() - begun
                    loaded = reader.take()
                    running.add(solvers.submit(self._solve_batch, batch, loaded, writer))
                    del loaded
                while running:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield from future.result()
            except BaseException:
                # The solves under way end and are recorded; nothing new starts.
                solvers.shutdown(wait=False, cancel_futures=True)
                raise

    def _show_download(self) -> None:
        """Nothing is being solved: say what is waited for."""
        if self.way is not None and self.way.nbytes and self.checkpoint.remote is not None:
            done = min(self.checkpoint.remote.traffic.nbytes, self.way.nbytes)
            self.progress(Progress("download", done, self.way.nbytes, "bytes"))

    def _solve_batch(self, batch: _Batch, loaded: Loaded, writer: BankWriter) -> list[ShardRecord]:
        """Solve the weights of a batch's shards, giving each up once it is solved, and write them."""
        started = time.perf_counter()
        bases: list[Basis] = []
        weights: list[WeightRecord] = []
        probes: list[tuple[float, ...]] = []
        with pinned_threads(batch.threads if self.kind == "cpu" else 1):
            for weight, basis, matrix, sha256 in self._solved(batch, loaded, writer.plan.options):
                bases.append(basis)
                probes.append(taken(matrix))
                weights.append(
                    WeightRecord(
                        name=weight.name,
                        module=weight.module,
                        layer=weight.layer,
                        expert=weight.expert,
                        dtype=weight.dtype,
                        source_sha256=sha256,
                        certificate=basis.certificate,
                    )
                )
                del matrix
        records = []
        for work in batch.works:
            count = len(work.weights)
            own, bases = bases[:count], bases[count:]
            described, weights = weights[:count], weights[count:]
            probed, probes = probes[:count], probes[count:]
            record = ShardRecord(
                family=work.family.name,
                index=work.shard.index,
                weights=tuple(described),
                files={},
                sigma=tuple(tuple(basis.minor.sigma.tolist()) for basis in own),
                principal_sigma=tuple(tuple(b.principal.sigma.tolist()) for b in own if b.principal is not None),
                probe=tuple(probed),
            )
            with self._spending("write and record"):
                records.append(writer.write_shard(work.shard, own, record))
            own.clear()
            give_back()
            seconds = round(time.perf_counter() - started, 4)
            self._log("shard", family=work.family.name, index=work.shard.index, seconds=seconds)
        return records

    def _solved(self, batch: _Batch, loaded: Loaded, options: BuildOptions) -> Iterator[tuple[WeightSpec, Basis, Tensor, str]]:
        """Each weight with its basis on the CPU, its matrix and its hash, in order; ``loaded`` is emptied."""
        if self.kind == "cpu":
            while loaded:
                weight, matrix, sha256 = loaded.pop(0)
                with self._spending("solve"):
                    basis = self._solve(weight, matrix, batch, options.side, self.device)
                yield weight, basis, matrix, sha256
            return
        assert self._device_threads is not None
        found = self._device_threads.submit(self._solved_there, batch, list(loaded), options).result()
        for basis in found:
            weight, matrix, sha256 = loaded.pop(0)
            yield weight, basis, matrix, sha256

    def _solved_there(self, batch: _Batch, loaded: Loaded, options: BuildOptions) -> list[Basis]:
        """Bases of a batch from the GPU, in the calling thread."""
        found = list[Basis]()
        for first in range(0, len(loaded), batch.size):
            found += self._solved_part(loaded[first : first + batch.size], batch, options)
        return found

    def _solved_part(self, part: Loaded, batch: _Batch, options: BuildOptions) -> list[Basis]:
        """Bases of one batch or weight. Where uploading or fetching finds no memory: again with the device to itself, then on the CPU.

        Weights are uploaded before their turn, while the device solves others; once memory has run out, in it.
        """
        matrices: list[Tensor] = []
        try:
            if not self._scarce:
                with self._spending("upload"):
                    matrices = on_own_stream(self.device, partial(self._upload, part))
            with self._spending("wait for a turn on the device"):
                while not self._slots.acquire(timeout=_LET_GO):
                    if self._scarce:
                        matrices = []
            try:
                with self._spending("upload"):
                    matrices = matrices or on_own_stream(self.device, partial(self._upload, part))
                with self._spending("solve and download"):
                    return on_own_stream(self.device, partial(self._solve_on_device, part, matrices, batch, options))
            finally:
                self._slots.release()
        except torch.OutOfMemoryError:
            matrices = []
        with self._whole_device():
            try:
                with self._spending("solve and download"):
                    matrices = on_own_stream(self.device, partial(self._upload, part))
                    return on_own_stream(self.device, partial(self._solve_on_device, part, matrices, batch, options))
            except torch.OutOfMemoryError:
                matrices = []
        before = (f"{batch.path}: out of memory on {self.device} for the weight itself",)
        with self._spending("solve on the CPU"):
            here = torch.device("cpu")
            return [
                brought_home(self._solve(weight, matrix, batch, options.side, here, before), STORED_TORCH[options.dtype])
                for weight, matrix, _ in part
            ]

    @contextlib.contextmanager
    def _whole_device(self) -> Iterator[None]:
        """Every turn on the device at once, by one thread at a time, with what torch keeps of its memory given back."""
        with self._taking_all:
            self._scarce = True
            for _ in range(self._turns):
                self._slots.acquire()
            try:
                time.sleep(2 * _LET_GO)  # those who wait with an uploaded weight let it go
                give_back_device(self.device)
                yield
            finally:
                for _ in range(self._turns):
                    self._slots.release()

    def _upload(self, part: Loaded) -> list[Tensor]:
        return [uploaded(matrix, self.device) for _, matrix, _ in part]

    def _solve_on_device(self, part: Loaded, matrices: list[Tensor], batch: _Batch, options: BuildOptions) -> list[Basis]:
        """Bases of a batch, or of one weight, brought home from the GPU in the dtype of the bank."""
        solved: list[Basis | str] = ["alone"] * len(part)
        if batch.size > 1:
            solved = batch_bases(matrices, batch.works[0].family.rank, batch.size, side=options.side)
        bases = []
        for (weight, _, _), matrix, basis in zip(part, matrices, solved, strict=True):
            if isinstance(basis, str):
                before = (f"batch: {basis}",) if batch.size > 1 else ()
                basis = self._solve(weight, matrix, batch, options.side, self.device, before)
            bases.append(brought_home(basis, STORED_TORCH[options.dtype]))
        return bases

    def _solve(
        self,
        weight: WeightSpec,
        matrix: Tensor,
        batch: _Batch,
        side: Side,
        device: torch.device,
        before: tuple[str, ...] = (),
    ) -> Basis:
        family = batch.works[0].family
        try:
            return minor_basis(
                matrix, family.rank, side=side, solver=batch.path, principal=family.principal, device=device, before=before
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
        disk.append(self.root / LOG, json.dumps(line).encode() + b"\n")
