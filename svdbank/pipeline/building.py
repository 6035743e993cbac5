"""Building a bank: read, hash, solve, certify, write, record, shard by shard, then publish."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from svdbank import fsio
from svdbank.bank import (
    Bank,
    BankWriter,
    Index,
    Manifest,
    ShardRecord,
    WeightRecord,
    base_digest,
    clean,
    open_bank,
    read_manifest,
)
from svdbank.bank.layout import LOG, MANIFEST
from svdbank.basis import Basis
from svdbank.checkpoint import Checkpoint, decomposable, open_checkpoint
from svdbank.errors import BankError, NotFiniteError, OptionError, SolverError, WrongBaseError
from svdbank.pipeline.locating import default_output
from svdbank.pipeline.planning import available_cpus, bytes_to, checked_options, family_bytes, make_plan
from svdbank.probe import probe_indices
from svdbank.solver import minor_basis, pinned_threads
from svdbank.specs import (
    BuildOptions,
    Plan,
    Progress,
    ProgressCallback,
    ShardSpec,
    Side,
    StoredDtype,
    Struct,
    WeightSpec,
    from_json,
)

#: Written beside the vectors: index, metadata, coordinate arrays. Generous; for the check of free space.
_OVERHEAD_PER_WEIGHT = 64 << 10


class BuildReport(Struct, frozen=True):
    """What a build did. ``solved`` weights were decomposed now, ``reused`` were there already."""

    bank: str
    weights: int
    solved: int
    reused: int
    nbytes: int
    seconds: float
    largest_residual: float
    fallbacks: tuple[str, ...]


def build(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    rank: int | Literal["all"] = 128,
    targets: Sequence[str] = ("all-linear",),
    side: Side = "both",
    dtype: StoredDtype = "float32",
    solver: str = "auto",
    principal: int = 0,
    device: str = "auto",
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
    on_report: Callable[[BuildReport], None] | None = None,
) -> Bank:
    """Decompose a model's weights into a bank and open it.

    Parameters
    ----------
    model
        ``org/name[@revision]`` on the Hub, or a local folder or file of safetensors.
    output
        Bank folder; by default one in the cache, where :func:`svdbank.open` finds it by the model.
    rank
        Minor triplets to keep of each weight (clamped to ``min(out, in)``), or ``"all"``.
    targets
        Modules, in PEFT's language: suffixes of names, ``all-linear``, or one regular expression.
    side
        ``both``, or ``left`` to leave the right vectors out.
    dtype
        Storage of the vectors. They are computed in float64 whatever this says.
    solver, principal
        Solver path (``auto``: by shape and rank); triplets of the largest singular values to keep as well.
    device
        ``auto`` (CUDA if there), ``cpu``, ``cuda``, ``cuda:1`` …
    jobs
        Small weights solved at a time, by default one a processor. Does not change the bytes of the bank.
    progress, on_report
        Called with each step, and once with a summary.

    A build that was stopped resumes: finished shards are checked and kept. A published bank is extended by targets it lacks.

    Raises
    ------
    OptionError
        Options that cannot be meant, that differ from those of the bank at ``output``, or a folder there that is no bank.
    WrongBaseError
        The bank at ``output`` describes other weights; names the first that differs.
    NotFiniteError, SolverError, CheckpointError, LockedError
        As their names say. What was finished stays and is reused.
    """
    started = time.perf_counter()
    options = checked_options(rank=rank, side=side, dtype=dtype, solver=solver, principal=principal)
    with open_checkpoint(model, progress=bytes_to(progress)) as checkpoint:
        weights, skips = decomposable(checkpoint, targets)
        root = Path(output) if output is not None else default_output(checkpoint, options)
        _refuse_foreign_folder(root)
        with fsio.locked(root, purpose="build"):
            run = _Run(checkpoint, root, _device(device), jobs or available_cpus(), progress or _ignore)
            published = read_manifest(root) if (root / MANIFEST).exists() else None
            if published is not None:
                clean(root, published)
                _refuse_other_options(root, published.options, options)
                earlier = open_bank(root)
                weights_known = _known_weights(checkpoint, earlier, weights)
                run.check_base(earlier, weights_known)
                weights = [weight for weight in weights if weight.name not in earlier]
                reused = len(earlier)
                generation = len(published.plans)
                if weights:
                    plan = make_plan(checkpoint, weights, skips, options, generation=generation)
                    run.execute(plan, weights, generation, earlier.index, published.plans)
            else:
                reused = 0
                plan = make_plan(checkpoint, weights, skips, options)
                if (root / "plan.json").exists():
                    plan = _frozen_plan(root, plan)
                run.execute(plan, weights, 0, None, ())
            bank = open_bank(root)
    summary = BuildReport(
        bank=str(root),
        weights=len(bank),
        solved=run.solved,
        reused=reused + run.reused,
        nbytes=bank.manifest.nbytes,
        seconds=time.perf_counter() - started,
        largest_residual=max(bank[name].certificate.residual for name in bank),
        fallbacks=tuple(name for name in bank if bank[name].certificate.tried),
    )
    if on_report is not None:
        on_report(summary)
    return bank


class _Run:
    """One execution: counts what it does, reports progress in weights."""

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

    def execute(
        self, plan: Plan, weights: Sequence[WeightSpec], generation: int, earlier: Index | None, earlier_plans: tuple[str, ...]
    ) -> Manifest:
        """Carry a plan out, keeping the shards that are already whole, and publish."""
        specs = {weight.name: weight for weight in weights}
        writer = BankWriter(self.root, plan, generation=generation)
        families = {family.name: family for family in plan.families}

        def members(shard: ShardSpec) -> list[WeightSpec]:
            return [specs[name] for name in families[shard.family].weights[shard.start : shard.stop]]

        _refuse_full_disk(self.root, plan)
        writer.begin()
        self._log("start", versions={"torch": torch.__version__, "python": platform.python_version()}, device=str(self.device))
        hashes = {} if earlier is None else {w.name: w.source_sha256 for family in earlier.families for w in family.weights}
        todo = []
        for shard in plan.shards:
            record = writer.record(shard)
            if record is None:
                todo.append(shard)
                continue
            for weight, kept in zip(members(shard), record.weights, strict=True):
                self._check_source(weight, kept.source_sha256)
                hashes[weight.name] = kept.source_sha256
            self.reused += len(record.weights)
        total = sum(shard.stop - shard.start for shard in plan.shards)
        self.progress(Progress("decompose", self.reused, total, "weights", ""))
        # One thread count at a time: two solves with different counts would fight over the processors.
        for threads, shards in groupby(todo, key=lambda shard: shard.threads):
            with pinned_threads(threads):
                for record in self._solve_all(
                    list(shards), members, writer, plan=plan, at_once=self.jobs if threads == 1 else 1
                ):
                    hashes.update({weight.name: weight.source_sha256 for weight in record.weights})
                    self.solved += len(record.weights)
                    self.progress(Progress("decompose", self.reused + self.solved, total, "weights", record.weights[-1].name))
        self.progress(Progress("publish", 0, 1, "bank", str(self.root)))
        manifest = writer.publish(base_digest=base_digest(hashes), earlier=earlier, earlier_plans=earlier_plans)
        self._log("published", solved=self.solved, reused=self.reused)
        self.progress(Progress("publish", 1, 1, "bank", str(self.root)))
        return manifest

    def _solve_all(
        self,
        shards: Sequence[ShardSpec],
        members: Callable[[ShardSpec], list[WeightSpec]],
        writer: BankWriter,
        *,
        plan: Plan,
        at_once: int,
    ) -> Iterator[ShardRecord]:
        """Solve shards, ``at_once`` at a time, while one thread reads the next; yields records as they become durable."""
        families = {family.name: family for family in plan.families}

        def load(shard: ShardSpec) -> list[tuple[WeightSpec, Tensor, str]]:
            return [(weight, *self.checkpoint.read_hashed(weight)) for weight in members(shard)]

        def solve(shard: ShardSpec, loaded: list[tuple[WeightSpec, Tensor, str]]) -> ShardRecord:
            with pinned_threads(shard.threads):
                started = time.perf_counter()
                family = families[shard.family]
                bases, records, probes = [], [], []
                while loaded:
                    weight, matrix, sha256 = loaded.pop(0)
                    basis = self._solve(weight, matrix, family.rank, shard.path, plan.options.side, family.principal)
                    bases.append(basis)
                    probes.append(sample(matrix))
                    records.append(
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
                record = writer.write_shard(
                    shard,
                    bases,
                    ShardRecord(
                        family=shard.family,
                        index=shard.index,
                        weights=tuple(records),
                        files={},
                        sigma=tuple(tuple(basis.minor.sigma.tolist()) for basis in bases),
                        principal_sigma=tuple(tuple(b.principal.sigma.tolist()) for b in bases if b.principal is not None),
                        probe=tuple(probes),
                    ),
                )
                self._log("shard", family=shard.family, index=shard.index, seconds=round(time.perf_counter() - started, 4))
                return record

        with ThreadPoolExecutor(1, "svdbank-read") as reader, ThreadPoolExecutor(at_once, "svdbank-solve") as solvers:
            running: set[Future[ShardRecord]] = set()
            try:
                ahead = reader.submit(load, shards[0])
                for number, shard in enumerate(shards):
                    loaded = ahead.result()
                    if number + 1 < len(shards):
                        ahead = reader.submit(load, shards[number + 1])
                    while len(running) >= at_once:
                        finished, running = wait(running, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in finished)
                    running.add(solvers.submit(solve, shard, loaded))
                    del loaded
                while running:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            except BaseException:
                # The solves under way end and are recorded; nothing new starts.
                reader.shutdown(wait=False, cancel_futures=True)
                solvers.shutdown(wait=False, cancel_futures=True)
                raise

    def _solve(self, weight: WeightSpec, matrix: Tensor, rank: int, path: str, side: Side, principal: int) -> Basis:
        try:
            return minor_basis(matrix, rank, side=side, solver=path, principal=principal, device=self.device)
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


def _known_weights(checkpoint: Checkpoint, bank: Bank, asked: Sequence[WeightSpec]) -> list[WeightSpec]:
    """Where the weights of a published bank lie in the checkpoint; WrongBaseError for one that is not there with its shape."""
    specs = {weight.name: weight for weight in asked}
    if not all(name in specs for name in bank):
        everything, _ = decomposable(checkpoint, (".*",))
        specs = {weight.name: weight for weight in everything}
    known = []
    for name in bank:
        basis = bank[name]
        spec = specs.get(name)
        if spec is None or (spec.out_features, spec.in_features) != (basis.out_features, basis.in_features):
            raise WrongBaseError(
                f"{bank.path} was built from another model: {checkpoint.name} has no {name} of {basis.out_features}x{basis.in_features}",
                hint="give the bank another place with -o, or delete it",
            )
        known.append(spec)
    return known


def _frozen_plan(root: Path, plan: Plan) -> Plan:
    """The plan of an unfinished bank, which is carried out as it stands; OptionError names the first thing now asked otherwise."""
    frozen = from_json((root / "plan.json").read_bytes(), Plan, where=str(root / "plan.json"), error=BankError)
    _refuse_other_options(root, frozen.options, plan.options)
    if frozen.base.config_digest != plan.base.config_digest:
        raise WrongBaseError(
            f"{root} was begun for {frozen.base.name}, whose configuration is not that of {plan.base.name}",
            hint="give the bank another place with -o, or delete it",
        )
    if frozen.families != plan.families:
        ours = {name for family in plan.families for name in family.weights}
        theirs = {name for family in frozen.families for name in family.weights}
        differs = sorted(ours ^ theirs)[:3] or ["the shape of a family"]
        raise OptionError(
            f"{root} is an unfinished build of other targets ({len(theirs)} weights, now {len(ours)}; e.g. {', '.join(differs)})",
            hint="finish it with its own targets, then build again with more; or delete it",
        )
    return frozen


def _refuse_other_options(root: Path, theirs: BuildOptions, ours: BuildOptions) -> None:
    for field in ("rank", "side", "dtype", "principal", "solver"):
        if getattr(theirs, field) != getattr(ours, field):
            raise OptionError(
                f"{root} is a bank with {field} {getattr(theirs, field)}; {getattr(ours, field)} was asked for",
                hint=f"another {field} is another bank: choose another -o, or delete this one",
            )


def _refuse_foreign_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise OptionError(f"{root} is a file, not a folder for a bank")
    if root.is_dir() and not (root / MANIFEST).exists() and not (root / "plan.json").exists():
        strangers = sorted(path.name for path in root.iterdir() if not path.name.startswith(".") and path.name != LOG)
        if strangers:
            raise OptionError(
                f"{root} is not empty and no bank (it holds {', '.join(strangers[:3])})", hint="choose an empty folder with -o"
            )


def _refuse_full_disk(root: Path, plan: Plan) -> None:
    needed = sum(family_bytes(family, plan.options) + _OVERHEAD_PER_WEIGHT * len(family.weights) for family in plan.families)
    needed -= sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    if needed > (free := fsio.free_bytes(root)):
        raise OptionError(
            f"{root}: the bank needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free",
            hint="choose another disk with -o, a smaller --rank, --side left, or --dtype float16",
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise OptionError(f"no device is called {name!r}", hint="auto, cpu, cuda, cuda:0 …") from cause
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"device {name!r} was asked for, but torch sees no CUDA device", hint="svdbank env shows what it sees"
        )
    return device


def _ignore(progress: Progress) -> None:
    """Progress that nobody watches."""
