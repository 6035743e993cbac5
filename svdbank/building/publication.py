"""``publish``: the last of the three steps of a build. Records are folded into the index; the manifest, written last, makes the bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from svdbank.bank.layout import MANIFEST, Manifest
from svdbank.bank.reading import open_bank
from svdbank.bank.sessions import current_session
from svdbank.bank.writing import BankWriter
from svdbank.building.records import log
from svdbank.core.errors import UnfinishedError
from svdbank.core.specs import Plan, Progress, ProgressCallback, ShardSpec

_SHOWN = 3


def publish(
    root: Path, plan: Plan, generation: int, *, progress: ProgressCallback, facts: Mapping[str, object] | None = None
) -> Manifest:
    """Publish what the records of a plan say, beside what is published already. Needs nothing but the bank's folder.

    The caller holds the bank's lock. Raises UnfinishedError, naming the first, where shards have no record, or none that their files
    agree with. ``facts`` go into the log.
    """
    session = current_session(root)
    recorded = session.recorded(plan) if session is not None else set()
    if session is None or (missing := [one for one in plan.shards if (one.family, one.index) not in recorded]):
        raise _unfinished(root, plan, missing if session is not None else plan.shards, "have no record")
    writer = BankWriter(root, plan, generation=generation, session=session)
    wrong = writer.place(lambda done, total: progress(Progress("publish", done, total, "shards", str(root))))
    if wrong:
        raise _unfinished(root, plan, wrong, "are not as they were recorded and are to be done again")
    earlier = open_bank(root) if (root / MANIFEST).exists() else None
    manifest = writer.publish(
        earlier=None if earlier is None else earlier.manifest, earlier_index=None if earlier is None else earlier.index
    )
    log(root, "published", **(facts or {}))
    return manifest


def _unfinished(root: Path, plan: Plan, missing: Sequence[ShardSpec], what: str) -> UnfinishedError:
    shown = ", ".join(f"{shard.family}/{shard.index}" for shard in missing[:_SHOWN])
    return UnfinishedError(
        f"{root}: {len(missing)} of {len(plan.shards)} shards {what}: {shown}" + (", …" if len(missing) > _SHOWN else ""),
        hint="build again: what is recorded is kept",
    )
