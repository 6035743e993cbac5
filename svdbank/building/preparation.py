"""``prepare``: the first of the three steps of a build. What is to be done is fixed and frozen into the bank."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from svdbank.bank.claims import refuse_claimed
from svdbank.bank.writing import BankWriter, clean
from svdbank.building.base import check_recorded, same_bytes
from svdbank.building.checking import examine, rebuild_command
from svdbank.building.fetching import FetchPlan, plan_fetch
from svdbank.building.records import log
from svdbank.building.request import BuildRequest
from svdbank.building.shards import shard_works
from svdbank.building.space import bank_bytes, refuse_full_disk
from svdbank.building.survey import Survey, survey
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import DamageError, WrongBaseError
from svdbank.core.specs import Plan, ProgressCallback, ShardSpec, WeightSpec


@dataclass(frozen=True)
class PreparedBuild:
    """A frozen plan and what is left of it. Holds nothing open, so it may be sent to another process.

    Attributes
    ----------
    root, plan, generation
        The bank and the plan that is carried out there. A plan of no families where the bank holds all that was asked for.
    weights
        The specs of the plan's weights by name.
    todo
        The shards that have no record yet.
    published, recorded
        Weights that were there before: in the published bank, and in shards that are recorded and whole.
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
        return not self.plan.families and not self.plan.aliases


def prepare(checkpoint: Checkpoint, request: BuildRequest, *, device: str, progress: ProgressCallback) -> PreparedBuild:
    """Look at what stands at the place of ``request``, check it against the model by hashing, and freeze the plan of what it lacks.

    The caller holds the bank's lock. Raises what :func:`svdbank.building.survey.survey` raises, DamageError for a published bank that
    is not whole, WrongBaseError for weights of other bytes, OptionError for a disk without room, and LockedError where workers are at it.
    ``device`` is for the log.
    """
    found = survey(checkpoint, request)
    refuse_claimed(found.root)
    same = _check_published(checkpoint, found, progress)
    plan = found.plan
    if not plan.families and not plan.aliases:
        fetch = plan_fetch(checkpoint, (), request.fetch, root=found.root, bank_bytes=0)
        return PreparedBuild(
            found.root, plan, found.generation, {}, (), len(found.published or ()), 0, fetch, same, found.decided_before
        )
    refuse_full_disk(found.root, plan)
    writer = BankWriter(found.root, plan, generation=found.generation)
    weights = {weight.name: weight for weight in found.new}
    works = shard_works(plan, weights, plan.shards)
    kept = [(work, record) for work in works if (record := writer.record(work.shard)) is not None]
    recorded = {work.shard for work, _ in kept}
    todo = tuple(shard for shard in plan.shards if shard not in recorded)
    ahead = [weight for work in works if work.shard not in recorded for weight in work.weights]
    fetch = plan_fetch(checkpoint, ahead, request.fetch, root=found.root, bank_bytes=bank_bytes(found.root, plan))
    writer.begin()
    log(found.root, "start", versions={"torch": torch.__version__, "python": platform.python_version()}, device=device)
    for work, record in kept:
        check_recorded(checkpoint, work.weights, record, plan.base, found.root)
    count = sum(len(record.weights) for _, record in kept)
    return PreparedBuild(
        found.root, plan, found.generation, weights, todo, len(found.published or ()), count, fetch, same, found.decided_before
    )


def _check_published(checkpoint: Checkpoint, found: Survey, progress: ProgressCallback) -> bool:
    """Whether a published bank was made of these bytes; it is reused or extended only if its files are as published."""
    bank = found.published
    if bank is None:
        return True
    if damage := examine(bank).damage:
        first, path = damage[0], str(bank.path)
        raise DamageError(
            f"{path} is damaged: {first.file}: {first.what} ({len(damage)} in all)", hint=rebuild_command(path, bank)
        )
    same = same_bytes(checkpoint, bank, found.known, progress)
    if found.new and not same:
        raise WrongBaseError(
            f"{found.root} holds the values of {checkpoint.name}, but was built from weights saved in another dtype",
            hint=f"extend it from {bank.manifest.base.name}, or give the bank another place with -o",
        )
    if not found.begun:
        clean(found.root, bank.manifest)
    return same
