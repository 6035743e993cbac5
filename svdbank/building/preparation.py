"""``prepare``: the first of the three steps of a build. What is to be done is fixed and frozen into the bank, or found frozen there."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from svdbank.bank.claims import living, refuse_claimed, session_over
from svdbank.bank.layout import ShardRecord
from svdbank.bank.sessions import Session, begin_session, current_session
from svdbank.bank.writing import BankWriter, clean
from svdbank.building.base import check_recorded, same_bytes
from svdbank.building.checking import examine, repair_command
from svdbank.building.fetching import FetchOptions, FetchPlan, plan_fetch
from svdbank.building.freezing import freeze, with_sources
from svdbank.building.records import log
from svdbank.building.request import BuildRequest
from svdbank.building.shards import ShardWork, shard_works
from svdbank.building.space import bank_bytes, refuse_full_disk
from svdbank.building.survey import Survey, place, survey
from svdbank.checkpoint.planned import other_files
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import DamageError, WrongBaseError
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Plan, Progress, ProgressCallback, ShardSpec, WeightSpec


@dataclass(frozen=True)
class PreparedBuild:
    """A frozen plan and what is left of it. Holds nothing open, so it may be sent to another process.

    Attributes
    ----------
    root, plan, generation
        The bank and the plan that is carried out there. A plan of no families where the bank holds all that was asked for.
    session
        Where the workers at the plan meet; None where there is nothing to do.
    weights
        The specs of the plan's weights by name.
    todo
        The shards that have no record yet.
    published, recorded
        Weights that were there before: in the published bank, and in shards that are recorded.
    fetch
        How the weights of ``todo`` come.
    same_bytes
        False where the published bank was built from the same values, saved in another dtype.
    decided_before
        Who knew which matrices there are for what is published, where that is another than for the plan.
    """

    root: Path
    plan: Plan
    generation: int
    session: Session | None
    weights: dict[str, WeightSpec]
    todo: tuple[ShardSpec, ...]
    published: int
    recorded: int
    fetch: FetchPlan
    same_bytes: bool
    decided_before: tuple[str, ...]

    @property
    def is_published(self) -> bool:
        """True where the bank holds all that was asked for: there is nothing to do."""
        return self.session is None


def prepare(
    checkpoint: Checkpoint, request: BuildRequest, *, device: str, progress: ProgressCallback, join: bool = False
) -> PreparedBuild:
    """Look at what stands at the place of ``request``, check it against the model, and freeze the plan of what it lacks.

    The caller holds the bank's lock. Where no worker is alive, what is recorded is checked by hashing and arrays are made; ``join``
    takes a place beside workers who are at it and changes nothing. Raises what :func:`svdbank.building.survey.survey` raises, DamageError
    for a published bank that is not whole, WrongBaseError for weights of other bytes, OptionError for a disk without room, and
    LockedError where workers are at it and ``join`` is not given. ``device`` is for the log.
    """
    root = place(checkpoint, request)
    if not join:
        refuse_claimed(root)
    joined = bool(living(root))
    found = survey(checkpoint, request)
    same = joined or _check_published(checkpoint, found, progress)
    if not found.plan.families and not found.plan.aliases:
        fetch = plan_fetch(checkpoint, (), request.fetch, root=root, bank_bytes=0)
        return _prepared(found, found.plan, None, (), fetch, same)
    if not joined:
        return _begun(checkpoint, request, found, same, device, progress)
    if found.frozen is None or found.frozen.sources is None or (session := current_session(root)) is None:
        raise session_over(root)
    if found.other_file is not None:
        raise other_files(checkpoint.name, found.frozen.sources, found.other_file)
    done = session.recorded(found.plan)
    todo = tuple(shard for shard in found.plan.shards if (shard.family, shard.index) not in done)
    return _prepared(found, found.plan, session, todo, _fetch(checkpoint, request.fetch, found, todo), same)


def _begun(
    checkpoint: Checkpoint, request: BuildRequest, found: Survey, same: bool, device: str, progress: ProgressCallback
) -> PreparedBuild:
    """A session of its own at the plan, which is frozen now or was before."""
    root = found.root
    refuse_full_disk(root, found.plan)
    works = shard_works(found.plan, {weight.name: weight for weight in found.new}, found.plan.shards)
    kept = _whole(found, works, progress)
    plan, sources = found.plan, None
    if found.frozen is None or found.other_file is not None:
        plan, sources = with_sources(found.plan, checkpoint, found.new, request.targets)
    if found.frozen is not None and found.other_file is not None:
        # Files that were touched or mended since: what is recorded must be of their bytes too, and something must be to show it.
        if not kept and found.frozen.sources is not None:
            raise other_files(checkpoint.name, found.frozen.sources, found.other_file)
        for work, record in kept.values():
            check_recorded(checkpoint, work.weights, record, found.plan.base, root)
    todo = tuple(work.shard for work in works if work.shard not in kept)
    fetch = _fetch(checkpoint, request.fetch, found, todo)
    if sources is not None:
        freeze(root, found.generation, plan, sources, instead=found.frozen is not None)
    session = begin_session(root, [family.name for family in plan.families])
    for shard in todo:
        session.forget(shard.family, shard.index)
    BankWriter(root, plan, generation=found.generation, session=session).begin()
    log(root, "start", versions={"torch": torch.__version__, "python": platform.python_version()}, device=device)
    return _prepared(found, plan, session, todo, fetch, same)


def _prepared(
    found: Survey, plan: Plan, session: Session | None, todo: tuple[ShardSpec, ...], fetch: FetchPlan, same: bool
) -> PreparedBuild:
    left = sum(shard.stop - shard.start for shard in todo)
    return PreparedBuild(
        root=found.root,
        plan=plan,
        generation=found.generation,
        session=session,
        weights={weight.name: weight for weight in found.new} if session is not None else {},
        todo=todo,
        published=len(found.published or ()),
        recorded=sum(len(family.weights) for family in plan.families) - left if session is not None else 0,
        fetch=fetch,
        same_bytes=same,
        decided_before=found.decided_before,
    )


def _fetch(checkpoint: Checkpoint, options: FetchOptions, found: Survey, todo: tuple[ShardSpec, ...]) -> FetchPlan:
    weights = {weight.name: weight for weight in found.new}
    ahead = [weight for work in shard_works(found.plan, weights, todo) for weight in work.weights]
    return plan_fetch(checkpoint, ahead, options, root=found.root, bank_bytes=bank_bytes(found.root, found.plan))


def _whole(found: Survey, works: list[ShardWork], progress: ProgressCallback) -> dict[ShardSpec, tuple[ShardWork, ShardRecord]]:
    """The shards that an earlier session recorded and whose files are, to the byte, what it recorded."""
    last = current_session(found.root) if found.frozen is not None else None
    if last is None:
        return {}
    writer = BankWriter(found.root, found.plan, generation=found.generation, session=last)
    done = last.recorded(found.plan)
    claimed = [work for work in works if (work.shard.family, work.shard.index) in done]
    kept = {}
    with ThreadPoolExecutor(available_cpus(), "svdbank-check") as pool:
        for number, (work, record) in enumerate(zip(claimed, pool.map(lambda w: writer.whole(w.shard), claimed), strict=True)):
            if record is not None:
                kept[work.shard] = (work, record)
            progress(Progress("check what is recorded", number + 1, len(claimed), "shards", work.family.name))
    return kept


def _check_published(checkpoint: Checkpoint, found: Survey, progress: ProgressCallback) -> bool:
    """Whether a published bank was made of these bytes; it is reused or extended only if its files are as published."""
    bank = found.published
    if bank is None:
        return True
    if damage := examine(bank).damage:
        first, path = damage[0], bank.place
        raise DamageError(f"{path} is damaged: {first.file}: {first.what} ({len(damage)} in all)", hint=repair_command(path))
    same = same_bytes(checkpoint, bank, found.known, progress)
    if found.new and not same:
        raise WrongBaseError(
            f"{found.root} holds the values of {checkpoint.name}, but was built from weights saved in another dtype",
            hint=f"extend it from {bank.manifest.base.name}, or give the bank another place with -o",
        )
    if found.frozen is None:
        clean(found.root, bank.manifest)
    return same
