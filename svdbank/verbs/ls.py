"""``ls``: the banks in the cache."""

from __future__ import annotations

from pathlib import Path

import msgspec

from svdbank import cache
from svdbank.bank.files import Folder, read_regular
from svdbank.bank.index import read_manifest
from svdbank.core.errors import BankError, BankNotFoundError
from svdbank.core.specs import Plan, Struct, from_json


class BankSummary(Struct, frozen=True):
    """One bank in a listing. ``nbytes`` counts its vectors, ``size`` all its files; ``last_used`` is in seconds since 1970: when it was
    last opened or built."""

    path: str
    model: str
    revision: str | None
    rank: int | str
    side: str
    dtype: str
    weights: int
    nbytes: int
    complete: bool
    size: int = 0
    last_used: float = 0.0


def ls() -> list[BankSummary]:
    """The banks in the cache, complete and unfinished, by model name."""
    summaries = [_dated(_summary(folder)) for folder in cache.bank_folders()]
    return sorted((s for s in summaries if s is not None), key=lambda s: (s.model, s.path))


def _dated(summary: BankSummary | None) -> BankSummary | None:
    if summary is None:
        return None
    root = Path(summary.path)
    return msgspec.structs.replace(summary, size=cache.bytes_in(root), last_used=cache.last_used(root))


def _summary(folder: Path) -> BankSummary | None:
    try:
        manifest = read_manifest(Folder(folder))
    except BankNotFoundError:
        try:
            plan = from_json(read_regular(folder / "plan.json"), Plan, where=str(folder / "plan.json"), error=BankError)
        except (BankError, FileNotFoundError):
            return None
        base, options, weights = plan.base, plan.options, sum(len(family.weights) for family in plan.families)
        nbytes, complete = 0, False
    except BankError:
        # Damaged: shown, so that it can be removed.
        return BankSummary(str(folder), "(damaged)", None, 0, "", "", 0, 0, False) if cache.is_bank(folder) else None
    else:
        base, options, weights = manifest.base, manifest.options, manifest.weights
        nbytes, complete = manifest.nbytes, True
    return BankSummary(
        path=str(folder),
        model=base.name,
        revision=base.revision,
        rank=options.rank,
        side=options.side,
        dtype=options.dtype,
        weights=weights,
        nbytes=nbytes,
        complete=complete,
    )
