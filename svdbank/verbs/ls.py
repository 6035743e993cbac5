"""``ls``: the banks in the cache."""

from __future__ import annotations

from pathlib import Path

import msgspec

from svdbank import cache
from svdbank.bank.files import Folder, read_regular
from svdbank.bank.index import parse_manifest, read_manifest
from svdbank.bank.parts import PUBLISHED, PartsOrigin, part_folders, read_origin
from svdbank.core.errors import BankError, BankNotFoundError
from svdbank.core.specs import Plan, Struct, from_json


class BankSummary(Struct, frozen=True):
    """One bank in a listing. ``nbytes`` counts its vectors, ``size`` all its files; ``last_used`` is in seconds since 1970: when it was
    last opened or built. Of a bank that lies elsewhere, ``path`` is the folder of the chunks that are kept of it, ``parts_of`` its address,
    and ``brought`` what ``pull`` was asked for and is not evicted."""

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
    parts_of: str | None = None
    brought: str | None = None


def ls() -> list[BankSummary]:
    """The banks in the cache, complete and unfinished, and what is kept of banks that lie elsewhere, by model name."""
    summaries = [_dated(_summary(folder)) for folder in cache.bank_folders()]
    summaries += [_parts(folder) for folder in part_folders(cache.parts_home())]
    return sorted((s for s in summaries if s is not None), key=lambda s: (s.model, s.path))


def _parts(folder: Path) -> BankSummary:
    origin = read_origin(folder) or PartsOrigin("(nobody knows)", "")
    size, used = cache.allocated_in(folder), cache.last_used(folder)
    brought = ", ".join(f"rank {b.rank} {b.side}" + ("" if b.whole else ", unfinished") for b in origin.brought) or None
    try:
        manifest = parse_manifest(read_regular(folder / PUBLISHED), str(folder))
    except (FileNotFoundError, BankError):
        return BankSummary(str(folder), "(damaged)", None, 0, "", "", 0, 0, False, size, used, origin.place, brought)
    return BankSummary(
        path=str(folder),
        model=manifest.base.name,
        revision=manifest.base.revision,
        rank=manifest.options.rank,
        side=manifest.options.side,
        dtype=manifest.options.dtype,
        weights=manifest.weights,
        nbytes=manifest.nbytes,
        complete=False,
        size=size,
        last_used=used,
        parts_of=origin.place,
        brought=brought,
    )


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
