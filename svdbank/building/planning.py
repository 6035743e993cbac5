"""What a build will do, worked out from headers alone."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from svdbank.bank.files import read_regular
from svdbank.bank.layout import MANIFEST, STORED, plan_name, rank_extent, record_file, vector_arrays, weights_per_shard
from svdbank.bank.reading import open_bank
from svdbank.building.devices import GPU_KINDS, planned_device
from svdbank.building.fetching import FETCHING, Fetch, FetchPlan, checked_fetch, plan_fetch
from svdbank.cache import default_output, output_folder, refuse_foreign_folder
from svdbank.checkpoint import Checkpoint, decomposable, open_checkpoint
from svdbank.core import disk
from svdbank.core.errors import BankError, OptionError
from svdbank.core.specs import (
    Alias,
    BaseSpec,
    BuildOptions,
    DevicePath,
    FamilySpec,
    Plan,
    ShardSpec,
    Side,
    Skip,
    StoredDtype,
    Struct,
    WeightSpec,
    from_json,
    quantised_formats,
)

if TYPE_CHECKING:
    pass

#: Weights whose short side is at most this are solved one a thread, several at a time; larger ones one at a time on all threads.
#: Below it a factorisation is too small to keep two threads busy (`python -m benchmarks.solver` shows 1×2 against 2×1).
ONE_THREAD_SHORT_SIDE = 1024

#: Written beside the vectors: index, metadata, coordinate arrays. Generous; for the check of free space.
_OVERHEAD_PER_WEIGHT = 64 << 10

#: Memory of the process itself once torch and zarr are loaded, bytes, and what CUDA with its libraries adds.
_RESIDENT = 450 << 20
_CUDA_RESIDENT = 3 << 30

#: With a GPU: solves that share it (each on a stream of its own), threads that write behind them, and bytes read ahead of them.
IN_FLIGHT = 3
WRITERS = 5
DEVICE_AHEAD = 1 << 30


#: Largest rank that may be asked for; no weight has more.
_LARGEST = 2**31 - 1

#: Most weights solved at a time: each takes a thread. More than processors only cost memory.
_MOST_JOBS = 1024


class FamilySummary(Struct, frozen=True):
    """One family in a plan, for showing. ``clamped`` is set where its weights allow less than the rank asked for."""

    name: str
    count: int
    out_features: int
    in_features: int
    rank: int
    clamped: bool
    path: str
    batch: int
    nbytes: int


class PlanReport(Struct, frozen=True):
    """A plan with what it will cost. Bytes, seconds; ``seconds`` is an estimate from one timed solve and fixes nothing.

    ``present`` weights are in the bank at ``output`` already and left out of everything else. ``fetch`` says what is downloaded and how;
    ``fetch_bytes`` are read from the checkpoint, ``write_bytes`` and ``files`` written to ``output``, ``peak_bytes`` the memory bound.
    ``quantised`` counts the weights stored as codes and scales, by format: the bank describes their dequantised values. ``device`` is the
    kind of device that paths, ``seconds`` and ``device_bytes`` (its memory, of one solve or batch at a time; None on a CPU) are of;
    ``seconds`` is None where there is none of that kind here to time a solve on.
    """

    model: str
    output: str
    device: str
    plan: Plan
    families: tuple[FamilySummary, ...]
    present: int
    fetch: FetchPlan
    fetch_bytes: int
    write_bytes: int
    files: int
    free_bytes: int
    peak_bytes: int
    device_bytes: int | None
    jobs: int
    seconds: float | None
    quantised: dict[str, int]


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
    device: str = "auto",
    jobs: int | None = None,
    fetch: Fetch = "auto",
    disk_budget: int | None = None,
    keep: bool | None = None,
) -> PlanReport:
    """What :func:`svdbank.build` with the same arguments would do now, to the bank that is at ``output`` or in an empty place.

    Reads configuration, index and headers only, of a model on the Hub too; writes no bank.

    Raises OptionError for options that cannot be meant, differ from those of the bank at ``output``, or do not fit the disk, and for
    targets that match nothing; CheckpointError for a checkpoint that cannot be read.
    """
    options = checked_options(rank=rank, side=side, dtype=dtype, solver=solver, principal=principal)
    fetching = checked_fetch(fetch=fetch, disk_budget=disk_budget, keep=keep)
    kind, found = planned_device(device)
    folder, at_once = output_folder(output), checked_jobs(jobs)
    with open_checkpoint(model) as checkpoint:
        asked, skips = decomposable(checkpoint, targets)
        root = folder or default_output(checkpoint, options)
        refuse_foreign_folder(root)
        published, recorded, generation = standing(root, options)
        new = [weight for weight in asked if weight.name not in published]
        left = [weight for weight in new if weight.name not in recorded]
        held = published | recorded
        known = [weight for weight in decomposable(checkpoint, (".*",))[0] if weight.name in held] if held else []
        whole = make_plan(checkpoint, new, skips, options, generation=generation, known=known)
        made = (
            make_plan(checkpoint, left, skips, options, generation=generation, known=known) if len(left) < len(new) else whole
        )
        return report(
            made,
            {weight.name: weight for weight in left},
            model=checkpoint.name,
            output=root,
            kind=kind,
            device=found,
            jobs=at_once,
            present=len(asked) - len(left),
            fetch=plan_fetch(checkpoint, left, fetching, root=root, bank_bytes=bank_bytes(root, whole)),
        )


def standing(root: Path, options: BuildOptions) -> tuple[frozenset[str], frozenset[str], int]:
    """What stands at ``root``: weights of the published bank, weights recorded by an unfinished build, and the generation to come.

    Files are looked at, not hashed: a build does that. Raises OptionError if the bank was made with other options.
    """
    published: frozenset[str] = frozenset()
    generation = 0
    if (root / MANIFEST).exists():
        bank = open_bank(root)
        refuse_other_options(root, bank.manifest.options, options)
        published, generation = frozenset(bank), len(bank.manifest.plans)
    frozen = root / plan_name(generation)
    if not frozen.exists():
        return published, frozenset(), generation
    unfinished = read_plan(frozen)
    refuse_other_options(root, unfinished.options, options)
    families = {family.name: family for family in unfinished.families}
    recorded: set[str] = set()
    for shard in unfinished.shards:
        if (root / record_file(shard.family, shard.index)).is_file():
            recorded.update(families[shard.family].weights[shard.start : shard.stop])
    return published, frozenset(recorded), generation


def read_plan(path: Path) -> Plan:
    """The frozen plan of an unfinished build; BankError for one that is not what was written."""
    try:
        return from_json(read_regular(path), Plan, where=str(path), error=BankError)
    except BankError as cause:
        raise BankError(str(cause), hint="the file is damaged: delete this bank, or choose another place with -o") from cause


def refuse_other_options(root: Path, theirs: BuildOptions, ours: BuildOptions) -> None:
    """OptionError naming the first option in which a bank differs from what is asked for."""
    for field in ("rank", "side", "dtype", "principal", "solver"):
        if getattr(theirs, field) != getattr(ours, field):
            raise OptionError(
                f"{root} is a bank with {field} {getattr(theirs, field)}; {getattr(ours, field)} was asked for",
                hint=f"another {field} is another bank: choose another -o, or delete this one",
            )


def checked_options(*, rank: int | Literal["all"], side: Side, dtype: StoredDtype, solver: str, principal: int) -> BuildOptions:
    """Build options, or OptionError naming the one that cannot be meant."""
    from svdbank.solver import PATHS

    if rank != "all" and not (type(rank) is int and 1 <= rank <= _LARGEST):
        raise OptionError(
            f"rank is a positive number up to {_LARGEST}, or 'all', not {rank!r}",
            hint="--rank 128 is the default, --rank all keeps every triplet",
        )
    if side not in ("both", "left"):
        raise OptionError(f"side is 'both' or 'left', not {side!r}")
    if dtype not in STORED:
        raise OptionError(f"dtype is one of {', '.join(STORED)}, not {dtype!r}")
    if solver != "auto" and solver not in PATHS:
        raise OptionError(f"solver is auto or one of {', '.join(PATHS)}, not {solver!r}")
    if not (type(principal) is int and 0 <= principal <= _LARGEST):
        raise OptionError(
            f"principal is a number of triplets up to {_LARGEST}, not {principal!r}",
            hint="--principal 0 keeps none, and is the default",
        )
    return BuildOptions(rank=rank, side=side, dtype=dtype, solver=solver, principal=principal)


def checked_jobs(jobs: int | None) -> int:
    """How many small weights are solved at a time: by default one a processor. OptionError for what cannot be meant."""
    if jobs is None:
        return available_cpus()
    if not (type(jobs) is int and 1 <= jobs <= _MOST_JOBS):
        raise OptionError(f"jobs is a number from 1 to {_MOST_JOBS}, not {jobs!r}", hint="leave --jobs out for one a processor")
    return jobs


def make_plan(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    skips: Sequence[Skip],
    options: BuildOptions,
    *,
    generation: int = 0,
    known: Sequence[WeightSpec] = (),
) -> Plan:
    """Group weights into families and shards and fix, by static rules, path and threads of each shard.

    ``known`` are weights that the bank to be extended holds: what is one of them with the sides exchanged is not stored again.
    """
    from svdbank.solver import choose_path

    grouped: dict[str, list[WeightSpec]] = {}
    aliases = exchanged_pairs(weights, known) if options.side == "both" else ()
    named = {alias.name for alias in aliases}
    for weight in weights:
        if weight.name in named:
            continue
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
    return Plan(
        format=1,
        base=base,
        options=options,
        families=tuple(families),
        shards=tuple(shards),
        skips=tuple(skips),
        aliases=tuple(aliases),
        devices={kind: {family.name: device_path(family, kind, options.solver) for family in families} for kind in GPU_KINDS},
    )


def device_path(family: FamilySpec, kind: str, solver: str) -> DevicePath:
    """How a ``kind`` of GPU solves the weights of a family, by shape, rank and number alone."""
    from svdbank.solver import batch_size, choose_path
    from svdbank.solver.sizes import DeviceKind

    where = cast(DeviceKind, kind)
    shape = family.out_features, family.in_features
    batch = 1 if family.principal else batch_size(*shape, len(family.weights), where)
    path = choose_path(*shape, family.rank, where, batch, family.principal) if solver == "auto" else solver
    return DevicePath(path=path, batch=batch if path == "filter" else 1)


def planned_path(plan: Plan, family: FamilySpec, kind: str) -> DevicePath:
    """What the plan says of a family on a kind of GPU; what it would say, where it was made before it said so."""
    from svdbank.solver import PATHS

    how = plan.devices.get(kind, {}).get(family.name) or device_path(family, kind, plan.options.solver)
    alone = how.path != "filter" or family.principal
    if how.path not in PATHS or not 1 <= how.batch <= _MOST_JOBS or (how.batch > 1 and alone):
        raise BankError(
            f"the plan of this unfinished build solves {family.name} on {kind} by {how.path!r}, {how.batch} at once, which cannot be meant",
            hint="the file is damaged: delete this bank, or choose another place with -o",
        )
    return how


def exchanged_pairs(weights: Sequence[WeightSpec], known: Sequence[WeightSpec] = ()) -> tuple[Alias, ...]:
    """Those of ``weights`` that are the transpose of another one or of a known one: tied embeddings and heads, one SVD for both."""
    stored = {weight.sources: weight for weight in (*weights, *known) if weight.kind == "embedding"}
    stored |= {weight.sources: weight for weight in known if weight.kind in ("embedding", "head")}
    return tuple(
        Alias(name=weight.name, module=weight.module, kind=weight.kind, of=other.name)
        for weight in weights
        if weight.kind in ("embedding", "head")
        and (other := stored.get(weight.sources)) is not None
        and {weight.operation, other.operation} == {"as_is", "transpose"}
    )


def report(
    plan: Plan,
    weights: dict[str, WeightSpec],
    *,
    model: str,
    output: Path,
    kind: str = "cpu",
    device: str | None = "cpu",
    jobs: int,
    present: int = 0,
    fetch: FetchPlan,
) -> PlanReport:
    """Costs of a plan on a ``kind`` of device. ``weights`` maps the names in it to their specs; ``device`` is None where none is here."""
    from svdbank.solver import flops

    if kind == "cpu":
        ways = {shard.family: DevicePath(path=shard.path, batch=1) for shard in plan.shards}
    else:
        ways = {family.name: planned_path(plan, family, kind) for family in plan.families}
    paths = {name: way.path for name, way in ways.items()}
    rate = None if device is None else solve_rate(device)
    summaries = tuple(
        FamilySummary(
            name=family.name,
            count=len(family.weights),
            out_features=family.out_features,
            in_features=family.in_features,
            rank=family.rank,
            clamped=plan.options.rank != "all" and family.rank < plan.options.rank,
            path=paths[family.name],
            batch=ways[family.name].batch,
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
        device=kind,
        plan=plan,
        families=summaries,
        present=present,
        fetch=fetch,
        fetch_bytes=sum(weights[name].nbytes for family in plan.families for name in family.weights),
        write_bytes=sum(summary.nbytes for summary in summaries),
        # Data files, then metadata and coordinate arrays of each family, then manifest, index, plan and root metadata.
        files=sum(arrays[shard.family] for shard in plan.shards) + sum(n + 23 for n in arrays.values()) + 4,
        free_bytes=disk.free_bytes(output),
        peak_bytes=peak_memory(plan, weights, jobs, kind) + (FETCHING if fetch.way in ("shards", "ranges") else 0),
        device_bytes=None if kind == "cpu" else device_memory(plan, weights, kind),
        jobs=jobs,
        seconds=None if rate is None else work / rate / (min(jobs, available_cpus()) if kind == "cpu" else 1),
        quantised=quantised_formats(weights[name].dtype for family in plan.families for name in family.weights),
    )


def family_bytes(family: FamilySpec, options: BuildOptions) -> int:
    """Bytes of a family's data files, the padding of the rank axis included."""
    itemsize = np.dtype(STORED[options.dtype][0]).itemsize
    each = sum(rank_extent(rank) * length * itemsize for rank, length in vector_arrays(family, options.side).values())
    return len(family.weights) * each


def bank_bytes(root: Path, plan: Plan) -> int:
    """Bytes that a build will still add below ``root``: what the plan comes to without what is there."""
    needed = sum(family_bytes(family, plan.options) + _OVERHEAD_PER_WEIGHT * len(family.weights) for family in plan.families)
    present = 0
    for family in plan.families:
        for file in (root / family.name).rglob("*"):
            # What a build under way writes and renames may be gone by now.
            with contextlib.suppress(FileNotFoundError):
                present += file.stat().st_size if file.is_file() else 0
    return needed - present


def peak_memory(plan: Plan, weights: dict[str, WeightSpec], jobs: int, kind: str = "cpu") -> int:
    """Bound on the build's memory: the solves that run at once, the weights read ahead, the vectors held until they are written.

    With a GPU what it solves lies there; on the host are the weights on their way to it and the vectors on theirs to the disk.
    """
    from svdbank.solver import peak_bytes

    if kind != "cpu":
        return _RESIDENT + _CUDA_RESIDENT + host_memory(plan, weights, kind)

    families = {family.name: family for family in plan.families}
    worst = 0
    for shard in plan.shards:
        family = families[shard.family]
        members = [weights[name] for name in family.weights[shard.start : shard.stop]]
        loaded = sum(weight.loaded_nbytes for weight in members)
        vectors = 3 * family_bytes(family, plan.options) * len(members) // len(family.weights)  # float64 and its cast
        itemsize = members[0].loaded_nbytes // max(1, members[0].out_features * members[0].in_features) or 1
        solve = peak_bytes(family.out_features, family.in_features, family.rank, shard.path, dtype_bytes=itemsize)
        at_once = jobs if shard.threads == 1 else 1
        worst = max(worst, at_once * (solve + vectors + loaded) + 2 * loaded)
    return _RESIDENT + worst


def device_memory(plan: Plan, weights: dict[str, WeightSpec], kind: str) -> int:
    """Memory of the GPU that the largest solve or batch takes; up to :data:`IN_FLIGHT` of them share it, by what is free."""
    from svdbank.solver import batch_peak_bytes, peak_bytes
    from svdbank.solver.sizes import DeviceKind

    worst = 0
    for family in plan.families:
        way = planned_path(plan, family, kind)
        first = weights[family.weights[0]]
        itemsize = first.loaded_nbytes // max(1, first.out_features * first.in_features) or 1
        shape = family.out_features, family.in_features, family.rank
        single = peak_bytes(*shape, way.path, dtype_bytes=itemsize, kind=cast(DeviceKind, kind))
        batch = batch_peak_bytes(*shape, way.batch, dtype_bytes=itemsize) if way.batch > 1 else 0
        worst = max(worst, single, batch)
    return worst


def host_memory(plan: Plan, weights: dict[str, WeightSpec], kind: str) -> int:
    """Host memory of weights read ahead, of those being solved and of vectors being written, in bytes."""
    largest, vectors = 0, 0
    for family in plan.families:
        batch = planned_path(plan, family, kind).batch
        members = max(batch, family.weights_per_shard)
        largest = max(largest, members * weights[family.weights[0]].loaded_nbytes)
        # Three times: as they come, stacked, and as bytes.
        vectors = max(vectors, 3 * members * family_bytes(family, plan.options) // len(family.weights))
    return DEVICE_AHEAD + (IN_FLIGHT + WRITERS + 1) * (largest + vectors)


def available_cpus() -> int:
    """Processors this process may use (its affinity, not the machine's count); ``SVDBANK_THREADS`` overrides."""
    asked = os.environ.get("SVDBANK_THREADS", "")
    if asked.isdecimal() and asked.isascii() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def solve_rate(device: str = "cpu") -> float:
    """Flops per second of one solve, small and on one thread on a CPU, larger on a GPU; timed here and now."""
    import torch

    from svdbank.solver import choose_path, flops, minor_basis, pinned_threads
    from svdbank.solver.devices import kind_of

    kind = kind_of(torch.device(device))
    out_features, in_features, rank = (512, 1024, 64) if kind == "cpu" else (2048, 4096, 64)
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(device)
    with pinned_threads(1):
        if kind != "cpu":
            minor_basis(weight, rank)  # the first loads what CUDA needs
        start = time.perf_counter()
        minor_basis(weight, rank)
        elapsed = time.perf_counter() - start
    return flops(out_features, in_features, rank, choose_path(out_features, in_features, rank, kind)) / elapsed
