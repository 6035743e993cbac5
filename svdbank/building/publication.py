"""``publish``: the last of the three steps of a build. Records are folded into the index; the manifest, written last, makes the bank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svdbank.bank.layout import MANIFEST, Manifest, record_file
from svdbank.bank.reading import open_bank
from svdbank.bank.writing import BankWriter
from svdbank.building.records import log
from svdbank.core.errors import UnfinishedError
from svdbank.core.specs import Plan, Progress, ProgressCallback

_SHOWN = 3


def publish(
    root: Path, plan: Plan, generation: int, *, progress: ProgressCallback, facts: Mapping[str, object] | None = None
) -> Manifest:
    """Publish what the records of a plan say, beside what is published already. Needs nothing but the bank's folder.

    The caller holds the bank's lock. Raises UnfinishedError, naming the first, where shards have no record. ``facts`` go into the log.
    """
    names = [record_file(shard.family, shard.index) for shard in plan.shards]
    if missing := [name for name in names if not (root / name).is_file()]:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise UnfinishedError(
            f"{root}: {len(missing)} of {len(names)} shards have no record: {shown}",
            hint="build again: what is recorded is kept",
        )
    progress(Progress("publish", 0, 1, "bank", str(root)))
    earlier = open_bank(root) if (root / MANIFEST).exists() else None
    writer = BankWriter(root, plan, generation=generation)
    manifest = writer.publish(
        earlier=None if earlier is None else earlier.manifest, earlier_index=None if earlier is None else earlier.index
    )
    log(root, "published", **(facts or {}))
    progress(Progress("publish", 1, 1, "bank", str(root)))
    return manifest
