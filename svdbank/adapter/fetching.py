"""Where an adapter lies: a folder, or a repository on the Hugging Face Hub whose few files are fetched into its cache."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from svdbank.adapter.settings import CACHE, COMPONENTS, CONFIG, WEIGHTS
from svdbank.checkpoint.files import sha256_of
from svdbank.core.errors import CheckpointError
from svdbank.core.hub_refusals import explain, is_connection_error, status_of
from svdbank.core.places import Nowhere, OnDisk, OnHub, locate, refusal, refuse_empty

#: What is read of an adapter; a repository may hold checkpoints of its training beside them, which are not wanted.
_FILES = (CONFIG, WEIGHTS, CACHE, COMPONENTS)

_PICKLE = "adapter_model.bin"


def located(adapter: str | os.PathLike[str]) -> tuple[Path, str]:
    """The folder of an adapter, and what to call it: ``org/name@commit`` where it was fetched.

    Names mean what :func:`svdbank.core.places.locate` says; a path need not exist. Raises :class:`OptionError` for what cannot be a
    name, :class:`CheckpointError` for what the Hub does not give.
    """
    refuse_empty(adapter, "the adapter's name", "name its folder, or org/name on the Hub")
    place = locate(adapter)
    if isinstance(place, OnHub):
        folder = _fetched(place)
        return folder, f"{place.repository}@{folder.name}"
    if isinstance(place, OnDisk) or (isinstance(place, Nowhere) and place.is_path):
        return place.path, os.fspath(adapter)
    raise refusal(place)


def name_of(adapter: str | os.PathLike[str]) -> str:
    """What an adapter is called where nobody says: the last part of its folder, or of its repository on the Hub."""
    place = locate(adapter)
    if isinstance(place, OnHub):
        return place.repository.rpartition("/")[2]
    return (place.path if isinstance(place, OnDisk | Nowhere) else Path(adapter)).resolve().name


def _fetched(place: OnHub) -> Path:
    """The snapshot of a revision in the Hub's cache; without a connection, the one that is there."""
    from huggingface_hub import HfApi, snapshot_download

    repository, revision, shown = place.repository, place.revision, str(place)
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        listed = {file.rfilename: file for file in info.siblings or []}
        if CONFIG not in listed:
            raise CheckpointError(
                f"{shown}: the repository holds no {CONFIG}, so it is no adapter",
                hint=f"as a bank it is named hf://{shown}"
                if "manifest.json" in listed
                else "name a LoRA's repository, or a folder",
            )
        if WEIGHTS not in listed and _PICKLE in listed:
            raise CheckpointError(
                f"{shown}: {_PICKLE} is a pickle, which can run code, and is not read",
                hint="load it where you trust it and save it again with save_pretrained(…): that writes safetensors",
            )
        names = [name for name in _FILES if name in listed]
        folder = Path(
            snapshot_download(repository, revision=info.sha, allow_patterns=[glob.escape(name) for name in names])
        ).resolve()
    except Exception as cause:
        unreachable = is_connection_error(cause) or status_of(cause) >= 500
        if unreachable and (cached := _cached(repository, revision)) is not None:
            return cached
        raise explain(cause, shown) from cause
    for name in names:
        _check(folder / name, listed[name], shown)
    return folder


def _cached(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, CONFIG, revision=revision)
    folder = Path(found).parent.resolve() if isinstance(found, str) else None
    return folder if folder is not None and (folder / WEIGHTS).is_file() else None


def _check(path: Path, listed: Any, shown: str) -> None:
    """The client does not compare what it fetched with the Hub's sha256; what is wrong leaves the cache, which others trust."""
    wanted = listed.lfs.sha256 if listed.lfs is not None else None
    if wanted is None or sha256_of(path.resolve()) == wanted:
        return
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    raise CheckpointError(
        f"{shown}: {path.name} arrived with other bytes than the Hub's sha256 says; removed",
        hint="run the command again; if it repeats, a proxy or mirror in between changes files",
    )
