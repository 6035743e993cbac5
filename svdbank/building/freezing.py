"""The frozen plan of a bank: what is to be done, and of which bytes. Written whole, once, before any work; read by whoever joins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from svdbank.bank.files import Folder, read_regular
from svdbank.bank.index import read_manifest
from svdbank.bank.layout import MANIFEST, plan_name, sources_name
from svdbank.building.fetching import files_of
from svdbank.checkpoint.source import Checkpoint
from svdbank.core import disk
from svdbank.core.errors import BankError
from svdbank.core.specs import Plan, Sources, WeightSpec, from_json, to_json

#: Threads of a solve, and features of a weight, that no machine and no model has more of.
_MOST_THREADS, _LARGEST = 1 << 16, 1 << 31

_SOURCES = re.compile(r"sources-[0-9a-f]{16}\.json")

_DAMAGED = "the file is damaged: delete this bank, or choose another place with -o"


@dataclass(frozen=True)
class Frozen:
    """The plan of an unfinished build or extension with its sources, as it stands at a bank's place.

    ``sources`` are None where they are gone, or were never there: an earlier svdbank froze none. Which bytes the plan is of is then known
    from what is recorded alone.
    """

    generation: int
    plan: Plan
    sources: Sources | None


def plan_under_way(root: Path) -> tuple[int, Plan] | None:
    """Generation and plan of an unfinished build or extension at ``root``; None where there is none. BankError where it cannot be read."""
    generation = len(read_manifest(Folder(root)).plans) if (root / MANIFEST).exists() else 0
    path = root / plan_name(generation)
    return (generation, read_plan(path)) if path.exists() else None


def frozen_plan(root: Path) -> Frozen | None:
    """What an unfinished build or extension at ``root`` has frozen; None where there is none. BankError where it cannot be read."""
    if (found := plan_under_way(root)) is None:
        return None
    generation, plan = found
    where = root / plan.sources
    if not plan.sources or "/" in plan.sources or not where.exists():
        return Frozen(generation, plan, None)
    data = read_regular(where)
    if sources_name(data) != plan.sources:
        raise BankError(f"{where}: not the bytes that its plan names", hint=_DAMAGED)
    try:
        return Frozen(generation, plan, from_json(data, Sources, where=str(where), error=BankError))
    except BankError as cause:
        raise BankError(str(cause), hint=_DAMAGED) from cause


def read_plan(path: Path) -> Plan:
    """A frozen plan; BankError where it cannot be read."""
    try:
        plan = from_json(read_regular(path), Plan, where=str(path), error=BankError)
        _check_consistent(plan, path)
        return plan
    except BankError as cause:
        raise BankError(str(cause), hint=_DAMAGED) from cause


def _check_consistent(plan: Plan, path: Path) -> None:
    """BankError unless every family is cut into the shards that its description says, of numbers that there can be."""
    if plan.sources and not _SOURCES.fullmatch(plan.sources):
        raise BankError(f"{path}: {plan.sources[:80]!r} is no file of sources")
    cut = {family.name: list[tuple[int, int, int]]() for family in plan.families}
    for shard in plan.shards:
        if shard.family not in cut or not 1 <= shard.threads <= _MOST_THREADS:
            raise BankError(f"{path}: shard {shard.index} of {shard.family!r} with {shard.threads} threads cannot be meant")
        cut[shard.family].append((shard.index, shard.start, shard.stop))
    for family in plan.families:
        count, step, full = len(family.weights), family.weights_per_shard, min(family.out_features, family.in_features)
        if not (1 <= step <= count and 1 <= family.rank <= full <= _LARGEST and 0 <= family.principal <= full):
            raise BankError(
                f"{path}: rank {family.rank} of {family.name!r}, {family.out_features}x{family.in_features}, cannot be meant"
            )
        wanted = [(number, start, min(start + step, count)) for number, start in enumerate(range(0, count, step))]
        if cut[family.name] != wanted:
            raise BankError(f"{path}: {family.name!r} is not cut into shards of {step} weights")


def with_sources(
    plan: Plan, checkpoint: Checkpoint, weights: Sequence[WeightSpec], targets: tuple[str, ...]
) -> tuple[Plan, Sources]:
    """A plan that names its sources, and those."""
    used = {name for weight in weights for name in files_of(weight)}
    sources = Sources(
        format=1,
        name=checkpoint.name,
        revision=checkpoint.revision,
        targets=targets,
        files=tuple(file for file in checkpoint.files if file.name in used),
        weights=tuple(weights),
    )
    return msgspec.structs.replace(plan, sources=sources_name(to_json(sources))), sources


def freeze(root: Path, generation: int, plan: Plan, sources: Sources, *, instead: bool = False) -> None:
    """Write a plan and its sources, each whole; the plan, whose name makes it count, last.

    ``instead`` replaces one whose recorded work was found to be of these bytes too. Otherwise BankError where one is there: the caller
    holds the bank's lock and has looked.
    """
    disk.write_bytes(root / plan.sources, to_json(sources))
    data = to_json(plan, indent=1)
    if instead:
        disk.write_bytes(root / plan_name(generation), data)
    elif not disk.write_once(root / plan_name(generation), data):
        raise BankError(
            f"{root}: another build has frozen its plan here meanwhile", hint="run the same command again: it joins"
        )
