"""What a build will do, worked out from headers alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from svdbank import fsio
from svdbank.bank.layout import STORED, rank_extent, vector_arrays, weights_per_shard
from svdbank.checkpoint import Checkpoint, decomposable, open_checkpoint
from svdbank.errors import OptionError
from svdbank.pipeline.locating import default_output
from svdbank.specs import (
    BaseSpec,
    BuildOptions,
    FamilySpec,
    Plan,
    Progress,
    ProgressCallback,
    ShardSpec,
    Side,
    Skip,
    StoredDtype,
    Struct,
    WeightSpec,
)

#: Weights whose short side is at most this are solved one a thread, several at a time; larger ones one at a time on all threads.
#: Below it a factorisation is too small to keep two threads busy (`python -m benchmarks.solver` shows 1×2 against 2×1).
ONE_THREAD_SHORT_SIDE = 1024

#: Memory of the process itself once torch and zarr are loaded, bytes.
_RESIDENT = 450 << 20


class FamilySummary(Struct, frozen=True):
    """One family in a plan, for showing. ``clamped`` is set where its weights allow less than the rank asked for."""

    name: str
    count: int
    out_features: int
    in_features: int
    rank: int
    clamped: bool
    path: str
    nbytes: int


class PlanReport(Struct, frozen=True):
    """A plan with what it will cost. Bytes, seconds; ``seconds`` is an estimate from one timed solve and fixes nothing.

    ``fetch_bytes`` are read from the checkpoint, ``write_bytes`` and ``files`` written to ``output``, ``peak_bytes`` the memory bound.
    """

    model: str
    output: str
    plan: Plan
    families: tuple[FamilySummary, ...]
    fetch_bytes: int
    write_bytes: int
    files: int
    free_bytes: int
    peak_bytes: int
    jobs: int
    seconds: float


def plan(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    rank: int | Literal["all"] = 128,
    targets: Sequence[str] = ("all-linear",),
    side: Side = "both",
    dtype: StoredDtype = "float32",
    solver: str = "auto",
    principal: int = 0,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> PlanReport:
    """What :func:`svdbank.build` with the same arguments would do in an empty place. Reads headers only; writes no bank.

    What a bank at ``output`` already holds is not subtracted. A model on the Hub is downloaded into the Hugging Face cache first.

    Raises OptionError for options that cannot be meant or targets that match nothing, CheckpointError for a checkpoint that cannot
    be read.
    """
    options = checked_options(rank=rank, side=side, dtype=dtype, solver=solver, principal=principal)
    with open_checkpoint(model, progress=bytes_to(progress)) as checkpoint:
        weights, skips = decomposable(checkpoint, targets)
        made = make_plan(checkpoint, weights, skips, options)
        root = Path(output) if output is not None else default_output(checkpoint, options)
        return report(made, {weight.name: weight for weight in weights}, model=checkpoint.name, output=root, jobs=jobs)


def checked_options(*, rank: int | Literal["all"], side: Side, dtype: StoredDtype, solver: str, principal: int) -> BuildOptions:
    """Build options, or OptionError naming the one that cannot be meant."""
    from svdbank.solver import PATHS

    if rank != "all" and (not isinstance(rank, int) or rank < 1):
        raise OptionError(f"rank is a positive number or 'all', not {rank!r}")
    if side not in ("both", "left"):
        raise OptionError(f"side is 'both' or 'left', not {side!r}")
    if dtype not in STORED:
        raise OptionError(f"dtype is one of {', '.join(STORED)}, not {dtype!r}")
    if solver != "auto" and solver not in PATHS:
        raise OptionError(f"solver is auto or one of {', '.join(PATHS)}, not {solver!r}")
    if principal < 0:
        raise OptionError(f"principal is a number of triplets, not {principal}")
    return BuildOptions(rank=rank, side=side, dtype=dtype, solver=solver, principal=principal)


def make_plan(
    checkpoint: Checkpoint, weights: Sequence[WeightSpec], skips: Sequence[Skip], options: BuildOptions, *, generation: int = 0
) -> Plan:
    """Group weights into families and shards and fix, by static rules, path and threads of each shard."""
    from svdbank.solver import choose_path

    grouped: dict[str, list[WeightSpec]] = {}
    for weight in weights:
        grouped.setdefault(weight.family, []).append(weight)
    cpus = available_cpus()
    itemsize = np.dtype(STORED[options.dtype][0]).itemsize
    families, shards = [], []
    for slug, members in sorted(grouped.items()):
        first = members[0]
        full = first.rank_full
        rank = full if options.rank == "all" else min(options.rank, full)
        family = FamilySpec(
            name=slug if generation == 0 else f"{slug}-x{generation}",
            kind=first.kind,
            out_features=first.out_features,
            in_features=first.in_features,
            rank=rank,
            principal=min(options.principal, full),
            weights_per_shard=weights_per_shard(
                len(members), out_features=first.out_features, in_features=first.in_features, rank=rank, itemsize=itemsize
            ),
            weights=tuple(weight.name for weight in members),
        )
        families.append(family)
        path = choose_path(first.out_features, first.in_features, rank) if options.solver == "auto" else options.solver
        step = family.weights_per_shard
        shards += [
            ShardSpec(
                family=family.name,
                index=number,
                start=start,
                stop=min(start + step, len(members)),
                path=path,
                threads=1 if full <= ONE_THREAD_SHORT_SIDE else cpus,
            )
            for number, start in enumerate(range(0, len(members), step))
        ]
    base = BaseSpec(name=checkpoint.name, revision=checkpoint.revision, config_digest=checkpoint.config_digest)
    return Plan(format=1, base=base, options=options, families=tuple(families), shards=tuple(shards), skips=tuple(skips))


def report(plan: Plan, weights: dict[str, WeightSpec], *, model: str, output: Path, jobs: int | None = None) -> PlanReport:
    """Costs of a plan. ``weights`` maps the names in it to their specs."""
    from svdbank.solver import flops

    jobs = jobs or available_cpus()
    paths = {shard.family: shard.path for shard in plan.shards}
    summaries = tuple(
        FamilySummary(
            name=family.name,
            count=len(family.weights),
            out_features=family.out_features,
            in_features=family.in_features,
            rank=family.rank,
            clamped=plan.options.rank != "all" and family.rank < plan.options.rank,
            path=paths[family.name],
            nbytes=family_bytes(family, plan.options),
        )
        for family in plan.families
    )
    work = sum(
        len(family.weights) * flops(family.out_features, family.in_features, family.rank, paths[family.name])
        for family in plan.families
    )
    arrays = {family.name: len(vector_arrays(family, plan.options.side)) for family in plan.families}
    return PlanReport(
        model=model,
        output=str(output),
        plan=plan,
        families=summaries,
        fetch_bytes=sum(weights[name].nbytes for family in plan.families for name in family.weights),
        write_bytes=sum(summary.nbytes for summary in summaries),
        # Data files, then metadata and coordinate arrays of each family, then manifest, index, plan and root metadata.
        files=sum(arrays[shard.family] for shard in plan.shards) + sum(n + 23 for n in arrays.values()) + 4,
        free_bytes=fsio.free_bytes(output),
        peak_bytes=peak_memory(plan, weights, jobs),
        jobs=jobs,
        seconds=work / _solve_rate() / min(jobs, available_cpus()),
    )


def family_bytes(family: FamilySpec, options: BuildOptions) -> int:
    """Bytes of a family's data files, the padding of the rank axis included."""
    itemsize = np.dtype(STORED[options.dtype][0]).itemsize
    each = sum(rank_extent(rank) * length * itemsize for rank, length in vector_arrays(family, options.side).values())
    return len(family.weights) * each


def peak_memory(plan: Plan, weights: dict[str, WeightSpec], jobs: int) -> int:
    """Bound on the build's memory: the solves that run at once, the weights read ahead, the vectors held until they are written."""
    from svdbank.solver import peak_bytes

    families = {family.name: family for family in plan.families}
    worst = 0
    for shard in plan.shards:
        family = families[shard.family]
        members = [weights[name] for name in family.weights[shard.start : shard.stop]]
        loaded = sum(weight.nbytes for weight in members)
        vectors = 3 * family_bytes(family, plan.options) * len(members) // len(family.weights)  # float64 and its cast
        itemsize = members[0].nbytes // max(1, members[0].out_features * members[0].in_features) or 1
        solve = peak_bytes(family.out_features, family.in_features, family.rank, shard.path, dtype_bytes=itemsize)
        at_once = jobs if shard.threads == 1 else 1
        worst = max(worst, at_once * (solve + vectors + loaded) + 2 * loaded)
    return _RESIDENT + worst


def available_cpus() -> int:
    """Processors this process may use (its affinity, not the machine's count); ``SVDBANK_THREADS`` overrides."""
    asked = os.environ.get("SVDBANK_THREADS", "")
    if asked.isdecimal() and asked.isascii() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bytes_to(progress: ProgressCallback | None) -> Callable[[str, int, int], None] | None:
    """A checkpoint's progress in bytes, passed on."""
    return None if progress is None else lambda stage, done, total: progress(Progress(stage, done, total, "bytes"))


def _solve_rate() -> float:
    """Flops per second of one small solve on one thread, timed here and now."""
    import torch

    from svdbank.solver import choose_path, flops, minor_basis, pinned_threads

    out_features, in_features, rank = 512, 1024, 64
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    with pinned_threads(1):
        start = time.perf_counter()
        minor_basis(weight, rank)
        elapsed = time.perf_counter() - start
    return flops(out_features, in_features, rank, choose_path(out_features, in_features, rank)) / elapsed
