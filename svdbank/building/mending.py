"""Shards of a damaged bank made whole: bases of what is harmed solved again from the weights, on the device asked for, the others kept."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import torch

from svdbank.bank.layout import FamilyIndex, ShardRecord, WeightRecord
from svdbank.bank.reading import Bank
from svdbank.building.devices import working_device
from svdbank.building.reading import Loaded
from svdbank.building.shards import Batch, ShardWork, batched
from svdbank.building.solving import CpuSolver, GpuSolver, batch_solver
from svdbank.building.stopwatch import Stopwatch
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.basis import Basis, Triplets
from svdbank.core.errors import WrongBaseError
from svdbank.core.probe import taken
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Plan, Progress, ProgressCallback, ShardSpec, WeightSpec
from svdbank.solver import pinned_threads
from svdbank.solver.devices import kind_of

#: A shard with its bases, and its record without files.
Mended = tuple[ShardSpec, list[Basis], ShardRecord]


def solving_device(name: str, before: Collection[WeightRecord]) -> torch.device:
    """The device called ``name``, checked; ``auto`` is the kind that solved the weights ``before``, since another gives other bytes: a CPU
    where one solved all of them, else a GPU if there is one."""
    if name == "auto" and all(weight.certificate.device == "cpu" for weight in before):
        name = "cpu"
    return working_device(name)


class Mender:
    """Makes records and bases of a bank's shards: of what is sound from the bank, of the ``wanted`` weights from the ``checkpoint``."""

    def __init__(
        self,
        bank: Bank,
        wanted: Collection[str],
        checkpoint: Checkpoint | None,
        specs: Mapping[str, WeightSpec],
        device: torch.device,
        progress: ProgressCallback,
    ) -> None:
        self.wanted = frozenset(wanted)
        self._bank = bank
        self._checkpoint = checkpoint
        self._specs = specs
        self._device = device
        self._progress = progress
        self._done = 0
        self._counting = threading.Lock()

    def made(self, plan: Plan, families: Mapping[str, FamilyIndex], shards: Sequence[ShardSpec]) -> Iterator[Mended]:
        """Shards with their bases, as many solved at a time as a build solves, on a GPU in its batches. Raises WrongBaseError for a
        checkpoint of other weights."""
        kind = kind_of(self._device)
        works = [self._work(families[shard.family], shard) for shard in shards]
        batches = [] if self._checkpoint is None else batched(works, plan, self._checkpoint, kind, by_file=False)
        with batch_solver(self._device, plan.options, Stopwatch(), batches) as solver:
            if isinstance(solver, GpuSolver):
                yield from self._beside_each_other(families, batches, solver, solver.turns + 1, threads=1)
                return
            by_threads: dict[int, list[Batch]] = {}
            for batch in batches:
                by_threads.setdefault(min(batch.threads, available_cpus()), []).append(batch)
            for threads, group in sorted(by_threads.items()):
                at_once = max(1, available_cpus() // threads)
                with solver.at_once(at_once):
                    yield from self._beside_each_other(families, group, solver, at_once, threads=threads)

    def _beside_each_other(
        self,
        families: Mapping[str, FamilyIndex],
        batches: Sequence[Batch],
        solver: CpuSolver | GpuSolver,
        at_once: int,
        *,
        threads: int,
    ) -> Iterator[Mended]:
        """Batches in their order, ``at_once`` at a time."""
        with pinned_threads(threads), ThreadPoolExecutor(at_once, "svdbank-repair") as pool:
            ahead: deque[Future[list[Mended]]] = deque()
            try:
                for batch in batches:
                    ahead.append(pool.submit(self._solved, batch, families[batch.family.name], solver, threads))
                    if len(ahead) > at_once:
                        yield from ahead.popleft().result()
                while ahead:
                    yield from ahead.popleft().result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _work(self, family: FamilyIndex, shard: ShardSpec) -> ShardWork:
        """The wanted weights of a shard."""
        names = [weight.name for weight in family.weights[shard.start : shard.stop] if weight.name in self.wanted]
        for name in names:
            if self._checkpoint is None or name not in self._specs:
                raise WrongBaseError(f"{self._bank.place}: the model has no {name}", hint=self._hint())
        return ShardWork(shard, family.spec, tuple(self._specs[name] for name in names))

    def _solved(self, batch: Batch, family: FamilyIndex, solver: CpuSolver | GpuSolver, threads: int) -> list[Mended]:
        recorded = {weight.name: weight for weight in family.weights}
        loaded: Loaded = [self._read(weight, recorded[weight.name]) for weight in batch.weights]
        solved: dict[str, tuple[Basis, tuple[float, ...]]] = {}
        with pinned_threads(threads):
            for spec, basis, matrix, _ in solver.solved(batch, loaded):
                solved[spec.name] = basis, taken(matrix)
                del matrix
                with self._counting:
                    self._done += 1
                    self._progress(Progress("solve again", self._done, len(self.wanted), "weights", spec.name))
        return [(work.shard, *self._whole(family, work.shard, solved)) for work in batch.works]

    def _read(self, spec: WeightSpec, record: WeightRecord) -> tuple[WeightSpec, torch.Tensor, str]:
        assert self._checkpoint is not None
        matrix, sha256 = self._checkpoint.read_hashed(spec)
        if sha256 != record.source_sha256:
            raise WrongBaseError(
                f"{self._bank.place} was built from another model: {spec.name} of {self._checkpoint.name} has other bytes",
                hint=self._hint(),
            )
        return spec, matrix, sha256

    def _hint(self) -> str:
        base = self._bank.manifest.base
        return (
            f"--source {base.name}@{base.revision}"
            if base.revision
            else f"--source names the folder that was called {base.name!r}"
        )

    def _whole(
        self, family: FamilyIndex, shard: ShardSpec, solved: Mapping[str, tuple[Basis, tuple[float, ...]]]
    ) -> tuple[list[Basis], ShardRecord]:
        """The bases of a shard's weights, stored or solved again, and its record without files."""
        bases, weights, probes = list[Basis](), list[WeightRecord](), list[tuple[float, ...]]()
        for row in range(shard.start, shard.stop):
            weight = family.weights[row]
            if weight.name in solved:
                basis, probe = solved[weight.name]
                weight = msgspec.structs.replace(weight, certificate=basis.certificate)
            else:
                basis, probe = self._stored(family, row), self._row(family, "probe", row)
            bases.append(basis)
            weights.append(weight)
            probes.append(probe)
        record = ShardRecord(
            family=family.spec.name,
            index=shard.index,
            attempt="",
            weights=tuple(weights),
            files={},
            sigma=tuple(tuple(basis.minor.sigma.tolist()) for basis in bases),
            principal_sigma=tuple(tuple(b.principal.sigma.tolist()) for b in bases if b.principal is not None),
            probe=tuple(probes),
        )
        return bases, record

    def kept(self, family: FamilyIndex, shard: ShardSpec) -> ShardRecord:
        """The record of a shard that is as it was published."""
        rows = range(shard.start, shard.stop)
        return ShardRecord(
            family=family.spec.name,
            index=shard.index,
            attempt="kept",
            weights=family.weights[shard.start : shard.stop],
            files={array: records[shard.index] for array, records in family.files.items()},
            sigma=tuple(self._row(family, "sigma", row) for row in rows),
            principal_sigma=tuple(self._row(family, "principal_sigma", row) for row in rows) if family.spec.principal else (),
            probe=tuple(self._row(family, "probe", row) for row in rows),
        )

    def _row(self, family: FamilyIndex, array: str, row: int) -> tuple[float, ...]:
        values = self._bank.coordinate(family.spec.name, array).tolist()  # type: ignore[arg-type]
        return tuple(values[row])  # type: ignore[arg-type]

    def _stored(self, family: FamilyIndex, row: int) -> Basis:
        weight = family.weights[row]
        ends = []
        for end in ("", "principal_") if family.spec.principal else ("",):
            sides = {
                side: self._bank.rows(f"{end}{side}", [weight.name])[weight.name] if f"{end}{side}" in family.files else None  # type: ignore[arg-type]
                for side in ("left", "right")
            }
            sigma = torch.tensor(self._row(family, f"{end}sigma", row), dtype=torch.float64)
            assert sides["left"] is not None
            ends.append(Triplets(sides["left"], sides["right"], sigma))
        return Basis(ends[0], weight.certificate, ends[1] if len(ends) > 1 else None)
