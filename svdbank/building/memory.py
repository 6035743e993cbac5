"""Memory of a build: bounds from the plan alone, and freed pages given back between shards."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import cast

from svdbank.building.planning import planned_path
from svdbank.building.space import family_bytes
from svdbank.core.specs import FamilySpec, Plan, WeightSpec
from svdbank.solver.planning import batch_peak_bytes, peak_bytes
from svdbank.solver.sizes import DeviceKind

#: Memory of the process itself once torch and zarr are loaded, bytes, and what CUDA with its libraries adds.
_RESIDENT = 450 << 20
_CUDA_RESIDENT = 3 << 30

#: With a GPU: solves that share it (each on a stream of its own), threads that write behind them, and bytes read ahead of them.
IN_FLIGHT = 3
WRITERS = 5
DEVICE_AHEAD = 1 << 30


def peak_memory(plan: Plan, weights: dict[str, WeightSpec], jobs: int, kind: str = "cpu") -> int:
    """Bound on the build's memory: the solves that run at once, the weights read ahead, the vectors held until they are written.

    With a GPU what it solves lies there; on the host are the weights on their way to it and the vectors on theirs to the disk.
    """
    if kind != "cpu":
        return _RESIDENT + _CUDA_RESIDENT + _host_memory(plan, weights, kind)

    families = {family.name: family for family in plan.families}
    worst = 0
    for shard in plan.shards:
        family = families[shard.family]
        members = [weights[name] for name in family.weights[shard.start : shard.stop]]
        loaded = sum(weight.loaded_nbytes for weight in members)
        vectors = 3 * family_bytes(family, plan.options) * len(members) // len(family.weights)  # float64 and its cast
        solve = solve_bytes(family, members[0], shard.path, 1, "cpu")
        at_once = jobs if shard.threads == 1 else 1
        worst = max(worst, at_once * solve + shards_in_flight(at_once, len(members)) * (vectors + loaded) + 2 * loaded)
    return _RESIDENT + worst


def shards_in_flight(at_once: int, weights: int) -> int:
    """Shards of so many weights that a CPU has under way where ``at_once`` weights are solved: enough, also while one is written."""
    return min(at_once, max(2, -(-2 * at_once // weights)))


def device_memory(plan: Plan, weights: dict[str, WeightSpec], kind: str) -> int:
    """Memory of the GPU that the largest solve or batch takes; up to :data:`IN_FLIGHT` of them share it, by what is free."""
    worst = 0
    for family in plan.families:
        way = planned_path(plan, family, kind)
        worst = max(worst, solve_bytes(family, weights[family.weights[0]], way.path, way.batch, kind))
    return worst


def solve_bytes(family: FamilySpec, first: WeightSpec, path: str, batch: int, kind: str) -> int:
    """Bytes of memory that solving ``batch`` weights of a family takes on a ``kind`` of device; ``first`` is one of them."""
    itemsize = first.loaded_nbytes // max(1, first.out_features * first.in_features) or 1
    shape = family.out_features, family.in_features, family.rank
    single = peak_bytes(*shape, path, dtype_bytes=itemsize, kind=cast(DeviceKind, kind))
    return max(single, batch_peak_bytes(*shape, batch, dtype_bytes=itemsize) if batch > 1 else 0)


def _host_memory(plan: Plan, weights: dict[str, WeightSpec], kind: str) -> int:
    """Host memory of weights read ahead, of those being solved and of vectors being written, in bytes."""
    largest, vectors = 0, 0
    for family in plan.families:
        batch = planned_path(plan, family, kind).batch
        members = max(batch, family.weights_per_shard)
        largest = max(largest, members * weights[family.weights[0]].loaded_nbytes)
        # Three times: as they come, stacked, and as bytes.
        vectors = max(vectors, 3 * members * family_bytes(family, plan.options) // len(family.weights))
    return DEVICE_AHEAD + (IN_FLIGHT + WRITERS + 1) * (largest + vectors)


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Hand free pages of the heap back (glibc's ``malloc_trim``); nothing where the C library has no such call.

    Once a large block was freed, glibc keeps blocks of that size in its heap, and their fragments add up over many weights.
    """
    if (trim := _trim()) is not None:
        trim(0)
