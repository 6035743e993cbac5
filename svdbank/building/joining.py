"""How a worker comes to the work, does its share, helps with the rest, and sees the bank published."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from svdbank.bank.claims import free_shards, living, session_over
from svdbank.bank.files import Folder
from svdbank.bank.index import read_manifest
from svdbank.bank.layout import MANIFEST, plan_name
from svdbank.bank.leases import Lease
from svdbank.bank.sessions import Session, current_session
from svdbank.building import shares
from svdbank.building.execution import WorkReport, refuse_few_processors, work
from svdbank.building.fetching import FetchOptions, plan_fetch
from svdbank.building.freezing import frozen_plan
from svdbank.building.preparation import PreparedBuild, prepare
from svdbank.building.publication import publish
from svdbank.building.request import BuildRequest
from svdbank.building.shards import ShardWork, shard_works
from svdbank.building.shares import Share
from svdbank.building.survey import is_asked, place
from svdbank.cache import refuse_foreign_folder
from svdbank.checkpoint.planned import open_planned
from svdbank.checkpoint.source import Checkpoint, open_checkpoint
from svdbank.core import disk
from svdbank.core.errors import LockedError, SvdbankError, WrongBaseError
from svdbank.core.locks import locked
from svdbank.core.places import OnHub, locate
from svdbank.core.specs import Plan, Progress, ProgressCallback, Sources

#: Seconds after which one that waits for others looks again: at first, and at most.
_LOOK_AGAIN, _LOOK_SELDOM = 0.02, 0.5


@dataclass(frozen=True)
class Workplace:
    """A worker at its place: the checkpoint as the plan has it, what is to be done, and its lease; None where nothing is."""

    checkpoint: Checkpoint
    prepared: PreparedBuild
    lease: Lease | None


@contextlib.contextmanager
def joined(
    request: BuildRequest,
    *,
    device: str,
    join: bool,
    on_cpu: bool,
    progress: ProgressCallback,
    opened: Checkpoint | None = None,
) -> Iterator[Workplace]:
    """Prepare a build, or with ``join`` take a place beside those at it. The bank's lock is held for that alone; the lease stays.

    The weights are those of the request's model, or of ``opened``, which stays open.

    Raises as :func:`svdbank.building.preparation.prepare`, and OptionError where the plan needs more processors than are here.
    """

    def waiting(who: str) -> None:
        progress(Progress("wait for the bank's lock", 0, 1, "locks", who))

    with contextlib.ExitStack() as stack:
        checkpoint = opened
        root = request.output
        if root is None:
            checkpoint = checkpoint or stack.enter_context(open_checkpoint(request.model))
            root = place(checkpoint, request)
        refuse_foreign_folder(root)
        with _nothing_left_of_a_refusal(root), locked(root, waiting=waiting if join else None):
            if checkpoint is None:
                checkpoint = stack.enter_context(_opened(request, root, join=join))
            prepared = prepare(checkpoint, request, device=device, progress=progress, join=join)
            if on_cpu:
                refuse_few_processors(prepared.plan, request.threads)
            session = prepared.session
            lease = None if session is None else stack.enter_context(Lease(session, device=device))
        yield Workplace(checkpoint, prepared, lease)


def _opened(request: BuildRequest, root: Path, *, join: bool) -> Checkpoint:
    """The model: as the frozen plan has it where that is what is asked for, else by its headers."""
    frozen = frozen_plan(root)
    if frozen is None or frozen.sources is None:
        return open_checkpoint(request.model)
    if is_asked(frozen, request) and (join or not (root / MANIFEST).exists()):
        try:
            return open_planned(request.model, frozen.sources, frozen.plan.base)
        except WrongBaseError:
            if living(root):
                raise
            # Files that were touched or mended: whether the work is of their bytes is looked at by hashing.
    return open_checkpoint(_pinned(request.model, frozen.sources))


def _pinned(model: str | os.PathLike[str], sources: Sources) -> str | os.PathLike[str]:
    """A model's name, at the plan's commit where it names the plan's repository and no other."""
    where = locate(model)
    if (
        isinstance(where, OnHub)
        and where.revision is None
        and (where.repository, True) == (sources.name, bool(sources.revision))
    ):
        return f"{where.repository}@{sources.revision}"
    return model


def work_through(
    here: Workplace,
    share: Share,
    *,
    device: torch.device,
    request: BuildRequest,
    progress: ProgressCallback,
    tick: Callable[[], None] = lambda: None,
) -> WorkReport:
    """Do a share of the work, then help the others from the ends of theirs, then wait until all is recorded.

    What a dead worker held is taken over; ``tick`` is called about once a second.
    Raises what :func:`svdbank.building.execution.work` raises.
    """
    prepared, checkpoint, lease = here.prepared, here.checkpoint, here.lease
    session = prepared.session
    if session is None or lease is None:
        return WorkReport(0, (), {}, 0.0)
    places = {file.name: number for number, file in enumerate(checkpoint.files)}
    works = shard_works(prepared.plan, prepared.weights, prepared.plan.shards)
    by_file = checkpoint.remote is not None and prepared.fetch.way == "shards"
    parts = shares.divided(works, share.count, places, by_file=by_file) if share.count > 1 else [works]
    turns = [parts[(share.index + number) % share.count] for number in range(share.count)]
    beside = (request.workers or 1) if device.type == "cpu" else 1
    total = len(prepared.weights)
    done, pause = WorkReport(0, (), {}, 0.0), _LOOK_AGAIN

    def round_of(todo: list[ShardWork], *, first: bool) -> WorkReport:
        fetch = None
        if not first or share.count > 1:
            # Whoever helps takes few shards of a file: whole files come only where all workers find them.
            shared = request.fetch.fetch == "shards" and request.fetch.keep
            options = request.fetch if first or shared else FetchOptions(fetch="ranges", disk_budget=None, keep=None)
            if not first and checkpoint.remote is not None:
                checkpoint.remote.look_again()
            weights = [weight for one in todo for weight in one.weights]
            fetch = plan_fetch(checkpoint, weights, options, root=prepared.root, bank_bytes=0)
        return work(
            prepared,
            [one.shard for one in todo],
            checkpoint=checkpoint,
            device=device,
            jobs=request.jobs * beside,
            beside=beside,
            progress=progress,
            lease=lease,
            fetch=fetch,
            as_given=not first,
            tick=tick,
        )

    try:
        done = _sum(done, round_of(_left(prepared.plan, session, turns[0]), first=True))
        others = [work for part in turns[1:] for work in reversed(part)]
        while left := _left(prepared.plan, session, works):
            free = free_shards(session, prepared.plan, [one.shard for one in left], lease)
            chosen = [one for one in others if one.shard in free] or [one for one in left if one.shard in free]
            if chosen:
                done = _sum(done, round_of(chosen, first=False))
                others, pause = [], _LOOK_AGAIN
            else:
                missing = sum(len(one.weights) for one in left)
                others_at = f"{len(left)} shards are with other workers"
                progress(Progress("wait for other workers", total - missing, total, "weights", others_at))
                tick()
                time.sleep(pause)
                pause = min(1.2 * pause, _LOOK_SELDOM)
            if current_session(prepared.root) != session:
                raise session_over(prepared.root)
    except LockedError:
        if not is_published(prepared):
            raise
    return done


def finished(prepared: PreparedBuild, *, progress: ProgressCallback, facts: Callable[[], Mapping[str, object]] = dict) -> None:
    """Publish, unless another has been quicker. Raises UnfinishedError where something is missing."""
    if prepared.session is None:
        return
    with locked(prepared.root, waiting=lambda who: progress(Progress("wait for the bank's lock", 0, 1, "locks", who))):
        if not is_published(prepared):
            publish(prepared.root, prepared.plan, prepared.generation, progress=progress, facts=facts())


def is_published(prepared: PreparedBuild) -> bool:
    """True where the plan of a build is published by now."""
    root = prepared.root
    return (root / MANIFEST).exists() and plan_name(prepared.generation) in read_manifest(Folder(root)).plans


def _left(plan: Plan, session: Session, works: list[ShardWork]) -> list[ShardWork]:
    recorded = session.recorded(plan)
    return [one for one in works if (one.shard.family, one.shard.index) not in recorded]


def _sum(one: WorkReport, other: WorkReport) -> WorkReport:
    stages = {name: one.stages.get(name, 0.0) + other.stages.get(name, 0.0) for name in {**one.stages, **other.stages}}
    return WorkReport(one.solved + other.solved, other.elsewhere, stages, one.waited + other.waited)


@contextlib.contextmanager
def _nothing_left_of_a_refusal(root: Path) -> Iterator[None]:
    """Folders that were made for a build which is then refused go again, as long as nothing is in them."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        yield
    except SvdbankError:
        for folder in made:
            disk.remove_empty(folder)
        raise
