"""What each step of a build costs on a device of known rates: by shard, and of the publish at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svdbank.bank.layout import vector_arrays
from svdbank.building.planning import planned_path
from svdbank.building.rates import Estimate, Origin, Rates, solve_seconds
from svdbank.building.shards import ShardWork
from svdbank.building.space import family_bytes
from svdbank.core.specs import FamilySpec, Plan, Struct

#: Arrays that the seconds of a shard in a file of rates are for: left and right.
_ARRAYS = 2


@dataclass(frozen=True)
class ShardCost:
    """Of a shard: weights, bytes to read and in memory, and seconds of each step alone on its device."""

    weights: int
    nbytes: int
    loaded: int
    read: float
    hash: float
    disk: float
    upload: float
    solve: float
    write: float
    record: float


class SolveCost(Struct, frozen=True):
    """Seconds of a weight of a family, alone on the device (in a batch: for each), and how they are known."""

    family: str
    seconds: float
    basis: Origin


def solve_costs(plan: Plan, rates: Rates) -> dict[str, SolveCost]:
    """By family."""
    shards = {shard.family: shard for shard in plan.shards}
    found = {}
    for family in plan.families:
        shard = shards[family.name]
        if rates.kind == "cpu":
            estimate = _seconds(rates, family, shard.path, shard.threads, 1)
        else:
            how = planned_path(plan, family, rates.kind)
            estimate = _seconds(rates, family, how.path, 1, how.batch)
        found[family.name] = SolveCost(family.name, estimate.seconds, estimate.basis)
    return found


def shard_costs(
    plan: Plan, works: Sequence[ShardWork], rates: Rates, solves: dict[str, SolveCost]
) -> dict[tuple[str, int], ShardCost]:
    """By family and number of the shard."""
    each = {family.name: family_bytes(family, plan.options) // len(family.weights) for family in plan.families}
    found = {}
    for work in works:
        count, nbytes = len(work.weights), sum(weight.nbytes for weight in work.weights)
        loaded = sum(weight.loaded_nbytes for weight in work.weights)
        files = len(vector_arrays(work.family, plan.options.side))
        found[work.shard.family, work.shard.index] = ShardCost(
            weights=count,
            nbytes=nbytes,
            loaded=loaded,
            read=nbytes / rates.read,
            hash=nbytes / rates.hash,
            disk=nbytes / rates.disk if rates.disk is not None else 0.0,
            upload=loaded / rates.upload if rates.upload is not None else 0.0,
            solve=count * solves[work.shard.family].seconds,
            write=count * each[work.shard.family] / rates.write,
            record=rates.shard * files / _ARRAYS + count * rates.weight,
        )
    return found


def publish_seconds(plan: Plan, rates: Rates) -> float:
    """Of one publish at the end."""
    weights = sum(len(family.weights) for family in plan.families)
    own = rates.publish
    return own.once + own.family * len(plan.families) + own.shard * len(plan.shards) + own.weight * weights


def _seconds(rates: Rates, family: FamilySpec, path: str, threads: int, batch: int) -> Estimate:
    return solve_seconds(rates, family.out_features, family.in_features, family.rank, path=path, threads=threads, batch=batch)
