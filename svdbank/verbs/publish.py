"""``publish``: close a build whose shards are all recorded, by whoever they were."""

from __future__ import annotations

import os
from collections.abc import Callable

from svdbank.bank.files import Folder
from svdbank.bank.index import read_manifest
from svdbank.bank.layout import MANIFEST
from svdbank.bank.reading import Bank, open_bank
from svdbank.building.freezing import plan_under_way
from svdbank.building.publication import publish as publish_records
from svdbank.core import disk
from svdbank.core.errors import BankNotFoundError
from svdbank.core.locks import locked
from svdbank.core.places import refuse_address, refuse_empty
from svdbank.core.specs import Progress, ProgressCallback, Struct, ignore_progress


class PublishReport(Struct, frozen=True):
    """What is published at a place now; ``published`` counts the weights that were not before: 0 where there was nothing to do."""

    bank: str
    weights: int
    published: int
    nbytes: int


def publish(
    path: str | os.PathLike[str],
    *,
    progress: ProgressCallback | None = None,
    on_report: Callable[[PublishReport], None] | None = None,
) -> Bank:
    """Publish what workers have recorded, where nothing is missing: fold the records into the index and write the manifest.

    ``svdbank.build`` does so by itself as soon as all is recorded; this is for a build whose last worker died just then. Waits for the
    bank's lock. Returns the opened bank; ``on_report`` is called once with a summary. Raises UnfinishedError, naming what is missing,
    where something is; BankNotFoundError where no build has begun.
    """
    refuse_empty(path, "the bank's name", "svdbank ls shows the banks there are")
    refuse_address(path)
    root, tell = disk.expanded(path), progress or ignore_progress
    if not (root / "plan.json").is_file():
        raise BankNotFoundError(
            f"{root}: no bank here, and no build that has begun", hint="svdbank ls shows the banks there are"
        )
    with locked(root, waiting=lambda who: tell(Progress("wait for the bank's lock", 0, 1, "locks", who))):
        before = read_manifest(Folder(root)).weights if (root / MANIFEST).exists() else 0
        found = plan_under_way(root)
        if found is not None:
            generation, plan = found
            publish_records(root, plan, generation, progress=tell)
        bank = open_bank(root)
    if on_report is not None:
        on_report(PublishReport(str(root), len(bank), len(bank) - before, bank.manifest.nbytes))
    return bank
