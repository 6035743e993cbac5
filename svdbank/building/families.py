"""The families of a plan as a device solves them, for showing."""

from __future__ import annotations

from svdbank.building.planning import planned_path
from svdbank.building.space import family_bytes
from svdbank.core.specs import DevicePath, Plan, Struct
from svdbank.solver.planning import flops


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


def family_summaries(plan: Plan, kind: str) -> tuple[FamilySummary, ...]:
    """The families of a plan as a ``kind`` of device solves them."""
    if kind == "cpu":
        ways = {shard.family: DevicePath(path=shard.path, batch=1) for shard in plan.shards}
    else:
        ways = {family.name: planned_path(plan, family, kind) for family in plan.families}
    return tuple(
        FamilySummary(
            name=family.name,
            count=len(family.weights),
            out_features=family.out_features,
            in_features=family.in_features,
            rank=family.rank,
            clamped=plan.options.rank != "all" and family.rank < plan.options.rank,
            path=ways[family.name].path,
            batch=ways[family.name].batch,
            nbytes=family_bytes(family, plan.options),
        )
        for family in plan.families
    )


def family_flops(family: FamilySummary) -> float:
    """Floating-point operations of all its solves."""
    return family.count * flops(family.out_features, family.in_features, family.rank, family.path)
