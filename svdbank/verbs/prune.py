"""``prune``: delete the banks of the cache that nobody has used for long."""

from __future__ import annotations

import datetime
import math
import time
from pathlib import Path

from svdbank import cache
from svdbank.core.errors import LockedError, OptionError
from svdbank.core.specs import Struct
from svdbank.verbs.ls import BankSummary, ls


class PruneReport(Struct, frozen=True):
    """What was deleted, or with ``dry_run`` would be; what stayed because it is in use; the bytes freed."""

    removed: tuple[BankSummary, ...]
    kept: int
    busy: tuple[str, ...]
    freed: int
    dry_run: bool


def prune(older_than: float | datetime.timedelta, *, dry_run: bool = False) -> PruneReport:
    """Delete the cached banks, finished, unfinished or damaged, whose last use is longer ago than ``older_than`` (seconds).

    A bank is used when it is opened, by whichever verb, and when it is built. Banks outside the cache are left alone, and so are those
    that somebody writes into. What a killed ``rm`` left in the cache goes too, and
    what a ``pull`` that was stopped had brought, once that is as old. Raises :class:`OptionError` for a time that is none.
    """
    age = older_than.total_seconds() if isinstance(older_than, datetime.timedelta) else float(older_than)
    if not (math.isfinite(age) and age >= 0):
        raise OptionError(f"{older_than!r} is no length of time", hint="--older-than 30d")
    before, removed, busy, freed, kept = time.time() - age, list[BankSummary](), list[str](), 0, 0
    for bank in ls():
        if bank.last_used > before:
            kept += 1
            continue
        if not dry_run:
            try:
                if cache.last_used(Path(bank.path)) > before:  # meanwhile
                    kept += 1
                    continue
                cache.remove(Path(bank.path))
            except LockedError:
                busy.append(bank.path)
                continue
        removed.append(bank)
        freed += bank.size
    for left in cache.left_in_cache(before):
        freed += cache.finish_removal(left, dry_run=dry_run)
    return PruneReport(tuple(removed), kept, tuple(busy), freed, dry_run)
