"""Where banks live when no path is given, and how one is found again."""

from __future__ import annotations

import os
import re
from pathlib import Path

from svdbank import fsio
from svdbank.bank import Bank, Manifest, open_bank, read_manifest
from svdbank.bank.layout import MANIFEST
from svdbank.checkpoint import Checkpoint, open_checkpoint
from svdbank.errors import BankError, BankNotFoundError
from svdbank.specs import BuildOptions, Struct


class BankSummary(Struct, frozen=True):
    """One bank in a listing. ``nbytes`` counts its vectors."""

    path: str
    model: str
    revision: str | None
    rank: int | str
    side: str
    dtype: str
    weights: int
    nbytes: int
    complete: bool


def home() -> Path:
    """Folder of svdbank's own files: ``SVDBANK_HOME``, else a folder in huggingface_hub's assets cache."""
    if own := os.environ.get("SVDBANK_HOME"):
        return Path(own)
    from huggingface_hub.constants import HF_ASSETS_CACHE

    return Path(HF_ASSETS_CACHE) / "svdbank"


def model_folder(checkpoint: Checkpoint) -> Path:
    """Where the cached banks of a checkpoint lie: named for people, told apart by the identity of its weight files."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", checkpoint.name).strip("-.") or "model"
    return home() / "banks" / f"{slug}-{checkpoint.cache_key[:12]}"


def default_output(checkpoint: Checkpoint, options: BuildOptions) -> Path:
    """Where a bank goes when no path is given: below its model's folder, by what is stored."""
    suffix = f"-p{options.principal}" if options.principal else ""
    return model_folder(checkpoint) / f"r{options.rank}-{options.side}-{options.dtype}{suffix}"


def open(source: str | os.PathLike[str]) -> Bank:
    """Open a bank by its folder, or the cached bank of a model by the model's name or folder.

    Of several cached banks of one model the one that holds most is taken: largest rank, both sides, then the most weights.
    Raises BankNotFoundError where there is none.
    """
    path = Path(source)
    if (path / MANIFEST).is_file() or (path / "plan.json").is_file():
        return open_bank(path)
    if path.exists():
        if not (path.is_file() or (path / "config.json").is_file() or any(path.glob("*.safetensors"))):
            return open_bank(path)
        with open_checkpoint(path) as checkpoint:
            found = [_complete(folder) for folder in _folders(model_folder(checkpoint))]
    else:
        name, _, revision = str(source).removeprefix("hf://").partition("@")
        found = [
            entry
            for folder in _folders(home() / "banks")
            if (entry := _complete(folder))
            and entry[1].base.name == name
            and (not revision or (entry[1].base.revision or "").startswith(revision))
        ]
    candidates = [entry for entry in found if entry is not None]
    if not candidates:
        raise BankNotFoundError(f"no bank of {str(source)!r} in {home() / 'banks'}", hint=f"svdbank build {source}")
    revisions = {manifest.base.revision for _, manifest in candidates}
    if len(revisions) > 1:
        raise BankError(
            f"{str(source)!r} has banks of {len(revisions)} revisions",
            hint=f"name one: {source}@{sorted(map(str, revisions))[0]}",
        )
    best, _ = max(candidates, key=lambda entry: _richness(entry[1]))
    return open_bank(best)


def ls() -> list[BankSummary]:
    """The banks in the cache, complete and unfinished, by model name."""
    summaries = [_summary(folder) for folder in _folders(home() / "banks")]
    return sorted((s for s in summaries if s is not None), key=lambda s: (s.model, s.path))


def rm(path: str | os.PathLike[str]) -> int:
    """Delete a bank folder, finished or not; returns the bytes freed. Raises BankNotFoundError for a folder that is no bank."""
    root = Path(path)
    if not (root / MANIFEST).is_file() and not (root / "plan.json").is_file():
        raise BankNotFoundError(f"{root}: no bank here", hint="svdbank ls shows the banks there are")
    with fsio.locked(root):
        freed = sum(file.stat().st_size for file in root.rglob("*") if file.is_file() and not file.is_symlink())
        # Without its manifest it is no bank, whatever of it a crash leaves.
        fsio.unlink(root / MANIFEST)
        fsio.remove_tree(root)
    return freed


def _folders(folder: Path) -> list[Path]:
    marks = {
        mark.parent
        for name in (MANIFEST, "plan.json")
        for pattern in (name, f"*/{name}", f"*/*/{name}")
        for mark in folder.glob(pattern)
    }
    return sorted(marks)


def _complete(folder: Path) -> tuple[Path, Manifest] | None:
    try:
        return folder, read_manifest(folder)
    except BankError:
        return None


def _richness(manifest: Manifest) -> tuple[float, bool, int]:
    rank = manifest.options.rank
    return (float("inf") if rank == "all" else float(rank), manifest.options.side == "both", manifest.weights)


def _summary(folder: Path) -> BankSummary | None:
    from svdbank.specs import Plan, from_json

    try:
        manifest = read_manifest(folder)
    except BankNotFoundError:
        try:
            plan = from_json((folder / "plan.json").read_bytes(), Plan, where=str(folder / "plan.json"), error=BankError)
        except (BankError, OSError):
            return None
        base, options, weights, nbytes = plan.base, plan.options, sum(len(f.weights) for f in plan.families), 0
    except BankError:
        return None
    else:
        base, options, weights, nbytes = manifest.base, manifest.options, manifest.weights, manifest.nbytes
    return BankSummary(
        path=str(folder),
        model=base.name,
        revision=base.revision,
        rank=options.rank,
        side=options.side,
        dtype=options.dtype,
        weights=weights,
        nbytes=nbytes,
        complete=(folder / MANIFEST).is_file(),
    )
