"""Whether an adapter folder still is what svdbank wrote: sha256 recorded in ``svdbank.json``, compared wherever the folder is read.

PEFT's ``save_pretrained`` into a folder that svdbank wrote leaves ``svdbank.json`` with sums of other bytes, and harms nothing. Tensor
files that svdbank writes carry a mark in their header, which no other program's do: a file with the mark and another sum is damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from svdbank.adapter.settings import CACHE, COMPONENTS, CONFIG, WEIGHTS, AdapterCache, LoraSettings
from svdbank.checkpoint.header import PREFIX
from svdbank.core import disk
from svdbank.core.errors import CheckpointError, DamageError
from svdbank.core.specs import to_json

if TYPE_CHECKING:
    from torch import Tensor

#: What svdbank adds to PEFT's metadata in the header of a tensor file, 8·n bytes so that the data stay aligned. The name stands there
#: twice: one changed byte cannot take it away.
_METADATA, _MARK = b'{"__metadata__":{"format":"pt"', b',"svdbank":"svdbank.json has the sha256"'

#: Fields of the config that decide what the tensors mean.
_DECIDING = ("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "target_parameters")

_HINT = "copy the folder again, or write it anew; nothing in it says what the bytes were"


def tensor_file(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with the mark."""
    import safetensors.torch  # with torch, which whoever looks at banks does not wait for

    data = safetensors.torch.save(dict(tensors), metadata={"format": "pt"})
    length, end = int.from_bytes(data[:PREFIX], "little"), PREFIX + len(_METADATA)
    # By hand, because safetensors writes two entries of its metadata in any order, and the same adapter is to be the same bytes.
    if data[PREFIX:end] != _METADATA:
        raise CheckpointError("safetensors writes its header in another way than this version of svdbank knows")
    return b"".join(((length + len(_MARK)).to_bytes(PREFIX, "little"), _METADATA, _MARK, data[end:]))


def sealed(cache: AdapterCache, settings: LoraSettings, files: Mapping[str, bytes]) -> AdapterCache:
    """The record with the sums of the folder's tensor files, of what decides in its config, and of itself."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    whole = msgspec.structs.replace(cache, files=sums, settings=_deciding(settings), digest="")
    return msgspec.structs.replace(whole, digest=_digest(whole))


def check_record(cache: AdapterCache, where: Path) -> None:
    """Raise :class:`DamageError` for a record that is not the one that was written."""
    if cache.digest and _digest(cache) != cache.digest:
        raise DamageError(
            f"{where}: not the record that svdbank wrote",
            hint="copy the folder again; without this file it is read as PEFT's, its components as one",
        )


def check_folder(folder: Path, settings: LoraSettings, cache: AdapterCache | None) -> str | None:
    """None where tensors and config are what svdbank wrote; why that is not known, where another program wrote them.

    Raises :class:`DamageError` where svdbank wrote them and they are not as they were.
    """
    if cache is None or WEIGHTS not in cache.files:
        return f"no sha256 of {WEIGHTS} is recorded, as where PEFT wrote it"
    if disk.sha256_file(folder / WEIGHTS) != cache.files[WEIGHTS]:
        if _is_marked(folder / WEIGHTS):
            raise DamageError(f"{folder / WEIGHTS}: not the bytes that were written ({CACHE} has their sha256)", hint=_HINT)
        return f"{WEIGHTS} was written anew since, by another program"
    if _deciding(settings) != cache.settings:
        raise DamageError(
            f"{folder / CONFIG}: ranks, alphas or parameters are not those that were written with {WEIGHTS}",
            hint="copy the folder again; svdbank stack NAME=FOLDER --scale NAME=0.5 changes an adapter's strength",
        )
    if COMPONENTS in cache.files:
        _check_components(folder / COMPONENTS, cache.files[COMPONENTS])
    return None


def _check_components(path: Path, recorded: str) -> None:
    try:
        found = disk.sha256_file(path) if path.is_file() else None
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read: {cause.strerror}") from cause
    if found is None:
        raise DamageError(
            f"{path}: missing, and the components of the sum with it", hint="copy the folder again, or stack anew"
        )
    if found != recorded:
        raise DamageError(f"{path}: not the bytes that were written ({CACHE} has their sha256)", hint=_HINT)


def _is_marked(path: Path) -> bool:
    """True for a file that svdbank wrote, and for one whose header cannot be read."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            said = file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return True
    return any("svdbank" in text for pair in said.items() for text in pair)


def _deciding(settings: LoraSettings) -> str:
    return hashlib.sha256(to_json({name: getattr(settings, name) for name in _DECIDING})).hexdigest()


def _digest(cache: AdapterCache) -> str:
    return hashlib.sha256(to_json(msgspec.structs.replace(cache, digest=""))).hexdigest()
