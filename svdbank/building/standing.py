"""Where an unfinished build stands: what is recorded, what is left, and who is at it. Read from names, without a lock."""

from __future__ import annotations

import os
import time
from pathlib import Path

from svdbank.bank.index import lost_manifest
from svdbank.bank.layout import MANIFEST
from svdbank.bank.leases import workers
from svdbank.bank.sessions import Session, current_session
from svdbank.building.freezing import plan_under_way
from svdbank.core.places import OnDisk, locate, refuse_empty
from svdbank.core.specs import Plan, Struct


class LeftShard(Struct, frozen=True):
    """A shard that is not recorded, with its weights, and who holds it: None where nobody does who is alive."""

    family: str
    index: int
    weights: tuple[str, ...]
    held_by: str | None


class WorkerInfo(Struct, frozen=True):
    """A worker that is alive: where, on what, and the shards that it holds."""

    name: str
    host: str
    pid: int
    device: str
    shards: tuple[str, ...]


class UnfinishedInfo(Struct, frozen=True):
    """A build that has not been published. ``extends`` where what is published already is being extended.

    ``weights`` and ``shards`` are those of the plan, ``recorded`` and ``recorded_shards`` what of them is done; the rest is ``left``.
    """

    path: str
    model: str
    revision: str | None
    rank: int | str
    extends: bool
    weights: int
    recorded: int
    shards: int
    recorded_shards: int
    workers: tuple[WorkerInfo, ...]
    left: tuple[LeftShard, ...]


def unfinished_info(source: str | os.PathLike[str]) -> UnfinishedInfo | None:
    """What stands at a folder where a build or an extension is under way or was stopped; None for anything else."""
    refuse_empty(source, "the bank's name", "name a bank's folder or a model; svdbank ls shows the banks there are")
    place = locate(os.fspath(source))
    if not isinstance(place, OnDisk) or not (place.path / "plan.json").is_file():
        return None
    root = place.path
    if lost_manifest(root) or (found := plan_under_way(root)) is None:
        return None
    return _info(root, found[1])


def _info(root: Path, plan: Plan) -> UnfinishedInfo:
    session = current_session(root)
    recorded = session.recorded(plan) if session is not None else set()
    holders, alive = ({}, ()) if session is None else _who(session, plan)
    families = {family.name: family for family in plan.families}
    left = tuple(
        LeftShard(
            shard.family,
            shard.index,
            families[shard.family].weights[shard.start : shard.stop],
            holders.get((shard.family, shard.index)),
        )
        for shard in plan.shards
        if (shard.family, shard.index) not in recorded
    )
    total = sum(len(family.weights) for family in plan.families)
    return UnfinishedInfo(
        path=str(root),
        model=plan.base.name,
        revision=plan.base.revision,
        rank=plan.options.rank,
        extends=(root / MANIFEST).exists(),
        weights=total,
        recorded=total - sum(len(one.weights) for one in left),
        shards=len(plan.shards),
        recorded_shards=len(recorded),
        workers=alive,
        left=left,
    )


def _who(session: Session, plan: Plan) -> tuple[dict[tuple[str, int], str], tuple[WorkerInfo, ...]]:
    """Who of the living holds which shard, and all of the living."""
    living = {one.name: one.worker for one in workers(session, time.time()) if one.alive and one.worker is not None}
    holders = {}
    held: dict[str, list[str]] = {name: [] for name in living}
    for family, index in sorted(session.claimed(plan)):
        try:
            name = session.claim_path(family, index).read_text()
        except FileNotFoundError:
            continue
        if name in living:
            holders[family, index] = str(living[name])
            held[name].append(f"{family}/{index}")
    return holders, tuple(
        WorkerInfo(name, worker.host, worker.pid, worker.device, tuple(held[name])) for name, worker in living.items()
    )
