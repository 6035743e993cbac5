"""Which repository on the Hub a bank's base is: named by the bank, or by whoever built it from a folder, and then compared."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdbank.adapter.base import task_of
from svdbank.bank.layout import LEGAL
from svdbank.bank.reading import Bank
from svdbank.checkpoint.configuration import facts
from svdbank.checkpoint.documents import parse_object
from svdbank.checkpoint.files import read_document
from svdbank.checkpoint.remote.hub import Snapshot, look_up
from svdbank.core.errors import OptionError, WrongBaseError
from svdbank.core.hub_refusals import explain
from svdbank.core.places import OnHub, far_bank
from svdbank.core.specs import ProgressCallback

if TYPE_CHECKING:
    from svdbank.checkpoint.source import Checkpoint

#: Largest of the files that go with what is made of a model.
_LARGEST_LEGAL = 1 << 20


@dataclass(frozen=True)
class HubBase:
    """A base on the Hub: the commit, its weight files by name with the Hub's ids, and what its card says that a copy has to repeat."""

    repository: str
    commit: str
    files: dict[str, str]
    #: Why not everybody may have it: ``gated`` or ``private``; None where everybody may.
    closed: str | None
    licence: dict[str, str | list[str]] = field(default_factory=dict)
    #: Names and bytes of the licence and its notices.
    documents: dict[str, bytes] = field(default_factory=dict)
    causal: bool = False


def base_on_hub(bank: Bank, named: str | None, source: str | os.PathLike[str] | None, progress: ProgressCallback) -> HubBase:
    """The base of ``bank`` as the Hub has it.

    A bank that was built from the Hub names it. For one that was built from a folder ``named`` does, ``org/name[@revision]``: the weights
    that the bank records are then compared with those of that commit, in the Hub's cache, or in the folder ``source``, whose files must be
    those that the Hub lists. Raises OptionError where nobody names a base or nothing is here to compare, WrongBaseError where it differs.
    """
    base = bank.manifest.base
    if named is None and source is not None:
        raise OptionError(
            f"--source {os.fspath(source)!r} would not be looked at: it is compared with what --base names",
            hint="add --base ORG/NAME, or leave it out",
        )
    if named is None and base.revision is None:
        raise OptionError(
            f"{bank.place} was built from a folder called {base.name!r}; whoever finds it has to know which model that is",
            hint="--base ORG/NAME names it on the Hub",
        )
    place = OnHub(base.name, base.revision) if named is None else far_bank(named) or far_bank(f"hf://{named}")
    if not isinstance(place, OnHub):
        raise OptionError(f"--base {named!r} is no repository of the Hub", hint="--base ORG/NAME or ORG/NAME@REVISION")
    snapshot = look_up(place.repository, place.revision)
    if named is not None and (source is not None or (place.repository, snapshot.commit) != (base.name, base.revision)):
        _compare(bank, snapshot, source, progress)
    return _described(snapshot)


def _compare(bank: Bank, snapshot: Snapshot, source: str | os.PathLike[str] | None, progress: ProgressCallback) -> None:
    """Nothing where the bank's weights are those of the commit, to the byte; WrongBaseError where they are not."""
    from svdbank.checkpoint.source import open_checkpoint

    shown = f"{snapshot.repository}@{snapshot.commit[:12]}"
    if source is None and any(file.path is None for file in snapshot.files):
        raise OptionError(
            f"whether {bank.place} is of {shown} cannot be seen: the weights of neither are here",
            hint=f"--source FOLDER names the folder that it was built from; or hf download {snapshot.repository}",
        )
    with open_checkpoint(f"{snapshot.repository}@{snapshot.commit}" if source is None else source) as checkpoint:
        if source is not None:
            for file in snapshot.files:
                path = checkpoint.folder / file.name
                if not path.is_file() or path.stat().st_size != file.size or _id_of(path, file.identity) != file.identity:
                    raise WrongBaseError(
                        f"{path} is not {file.name} of {shown}: size or hash differ", hint="--base ORG/NAME@REVISION"
                    )
        if not are_of(checkpoint, bank, progress):
            raise WrongBaseError(
                f"{bank.place} is of the same values as {shown}, stored in another dtype: their files differ",
                hint="name the repository that the weights came from",
            )


def are_of(checkpoint: Checkpoint, bank: Bank, progress: ProgressCallback) -> bool:
    """Whether a bank is of a checkpoint's bytes; False where only the values are the same. Reads all of its weights.

    Raises WrongBaseError where they are neither.
    """
    from svdbank.building.base import same_bytes
    from svdbank.checkpoint.naming.selection import decomposable

    specs = {spec.name: spec for spec in decomposable(checkpoint, (".*",))[0]}
    stored = [weight.name for family in bank.index.families for weight in family.weights]
    lacking = [name for name in stored if name not in specs]
    if lacking:
        raise WrongBaseError(f"{bank.place} is not of {checkpoint.name}, which has no {lacking[0]}", hint="name its own base")
    return same_bytes(checkpoint, bank, [specs[name] for name in stored], progress)


def _id_of(path: Path, like: str) -> str:
    """The Hub's id of a local file, of the kind of ``like``: sha256 of a large one, git's of a small one."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _described(snapshot: Snapshot) -> HubBase:
    from huggingface_hub import HfApi, hf_hub_download

    shown = f"{snapshot.repository}@{snapshot.commit[:12]}"
    try:
        info = HfApi().model_info(snapshot.repository, revision=snapshot.commit, files_metadata=True)
        documents = {}
        for file in info.siblings or []:
            if LEGAL.fullmatch(file.rfilename) and (file.size or 0) <= _LARGEST_LEGAL:
                path = Path(hf_hub_download(snapshot.repository, file.rfilename, revision=snapshot.commit))
                documents[file.rfilename] = read_document(path.resolve(), _LARGEST_LEGAL)
    except Exception as cause:
        raise explain(cause, shown) from cause
    config = {} if snapshot.config is None else parse_object(snapshot.config, f"{shown}: config.json")
    card: Mapping[str, Any] = vars(info.card_data) if info.card_data is not None else {}
    keys = ("license", "license_name", "license_link")
    return HubBase(
        snapshot.repository,
        snapshot.commit,
        {file.name: file.identity for file in snapshot.files},
        "gated" if info.gated else "private" if info.private else None,
        {key: card[key] for key in keys if _is_text(card.get(key))},
        documents,
        task_of(facts(config, shown)) == "CAUSAL_LM",
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
