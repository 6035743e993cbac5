"""The plan of a build from headers alone: families, shards and, by static rules, how each device solves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from svdbank.bank.layout import STORED, weights_per_shard
from svdbank.building.devices import GPU_KINDS
from svdbank.building.request import MOST_JOBS
from svdbank.checkpoint.naming.matrices import matrices
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import BankError
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Alias, BaseSpec, BuildOptions, DevicePath, FamilySpec, Plan, ShardSpec, Skip, WeightSpec
from svdbank.solver.planning import PATHS, choose_path
from svdbank.solver.sizes import DeviceKind, batch_size

#: Weights whose short side is at most this are solved one a thread, several at a time; larger ones one at a time on all threads.
#: Below it a factorisation is too small to keep two threads busy (`python -m benchmarks.solver` shows 1×2 against 2×1).
ONE_THREAD_SHORT_SIDE = 1024


def make_plan(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    skips: Sequence[Skip],
    options: BuildOptions,
    *,
    threads: int | None = None,
    generation: int = 0,
    known: Sequence[WeightSpec] = (),
) -> Plan:
    """Group weights into families and shards and fix, by static rules, path and threads of each shard.

    A solve of a large weight takes ``threads``, by default all processors there are.
    ``known`` are weights that the bank to be extended holds: what is one of them with the sides exchanged is not stored again.
    """
    grouped: dict[str, list[WeightSpec]] = {}
    aliases = _exchanged_pairs(weights, known) if options.side == "both" else ()
    named = {alias.name for alias in aliases}
    for weight in weights:
        if weight.name in named:
            continue
        grouped.setdefault(weight.family, []).append(weight)
    families, shards = [], []
    for slug, members in sorted(grouped.items()):
        family = _family(slug if generation == 0 else f"{slug}-x{generation}", members, options)
        families.append(family)
        shards += shards_of(family, options, threads=threads or available_cpus())
    knew = matrices(checkpoint)
    base = BaseSpec(name=checkpoint.name, revision=checkpoint.revision, config_digest=checkpoint.config_digest)
    return Plan(
        format=1,
        base=base,
        options=options,
        families=tuple(families),
        shards=tuple(shards),
        skips=tuple(skips),
        aliases=tuple(aliases),
        devices={kind: {family.name: _device_path(family, kind, options.solver) for family in families} for kind in GPU_KINDS},
        decided=knew.decided,
        doubt=knew.doubt,
    )


def _family(name: str, members: Sequence[WeightSpec], options: BuildOptions) -> FamilySpec:
    first = members[0]
    full = first.rank_full
    rank = full if options.rank == "all" else min(options.rank, full)
    return FamilySpec(
        name=name,
        kind=first.kind,
        out_features=first.out_features,
        in_features=first.in_features,
        rank=rank,
        principal=min(options.principal, full),
        weights_per_shard=weights_per_shard(
            len(members),
            out_features=first.out_features,
            in_features=first.in_features,
            rank=rank,
            itemsize=np.dtype(STORED[options.dtype][0]).itemsize,
        ),
        weights=tuple(weight.name for weight in members),
    )


def shards_of(family: FamilySpec, options: BuildOptions, *, threads: int) -> list[ShardSpec]:
    """The shards of a family, each with the path and threads that the rule gives it; ``threads`` are those of a large weight."""
    shape = family.out_features, family.in_features
    path = choose_path(*shape, family.rank) if options.solver == "auto" else options.solver
    step, count = family.weights_per_shard, len(family.weights)
    return [
        ShardSpec(
            family=family.name,
            index=number,
            start=start,
            stop=min(start + step, count),
            path=path,
            threads=1 if min(shape) <= ONE_THREAD_SHORT_SIDE else threads,
        )
        for number, start in enumerate(range(0, count, step))
    ]


def _device_path(family: FamilySpec, kind: str, solver: str) -> DevicePath:
    """How a ``kind`` of GPU solves the weights of a family, by shape, rank and number alone."""
    where = cast(DeviceKind, kind)
    shape = family.out_features, family.in_features
    batch = 1 if family.principal else batch_size(*shape, len(family.weights), where)
    path = choose_path(*shape, family.rank, where, batch, family.principal) if solver == "auto" else solver
    return DevicePath(path=path, batch=batch if path == "filter" else 1)


def planned_path(plan: Plan, family: FamilySpec, kind: str) -> DevicePath:
    """What the plan says of a family on a kind of GPU; what it would say, where it was made before it said so."""
    how = plan.devices.get(kind, {}).get(family.name) or _device_path(family, kind, plan.options.solver)
    alone = how.path != "filter" or family.principal
    if how.path not in PATHS or not 1 <= how.batch <= MOST_JOBS or (how.batch > 1 and alone):
        raise BankError(
            f"the plan of this unfinished build solves {family.name} on {kind} by {how.path!r}, {how.batch} at once, which cannot be meant",
            hint="the file is damaged: delete this bank, or choose another place with -o",
        )
    return how


def _exchanged_pairs(weights: Sequence[WeightSpec], known: Sequence[WeightSpec] = ()) -> tuple[Alias, ...]:
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
