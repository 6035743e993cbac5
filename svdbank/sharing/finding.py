"""Banks on the Hub that could be pulled for a model: those whose cards say that they are of its weight files. Only said, never pulled."""

from __future__ import annotations

import os
import re
from typing import Any

from svdbank import cache
from svdbank.bank.reading import Bank
from svdbank.checkpoint.files import blobs_of
from svdbank.core.errors import BankNotFoundError, OptionError, SvdbankError, WrongBaseError
from svdbank.core.places import OnDisk, OnHub, far_bank, locate
from svdbank.core.specs import Struct
from svdbank.sharing.card import KEY, TAG
from svdbank.sharing.refusals import explained

#: Banks asked for at a time, and named in an error.
_ASKED, _NAMED = 100, 3

#: Seconds for the first answer. Whoever has no connection waits no longer for an error that is there already.
_PATIENCE = 5.0

_NAME, _COMMIT = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII), re.compile(r"[0-9a-f]{40}")

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


class FoundBank(Struct, frozen=True):
    """A repository whose card says that it is a bank of just these weight files; ``date`` is that of its last commit."""

    repository: str
    owner: str
    date: str
    rank: int | str
    side: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.repository} (by {self.owner}, {self.date}; rank {self.rank}, {self.side}, {self.dtype})"


def opened(source: Bank | str | os.PathLike[str], *, find: bool = True) -> Bank:
    """What :func:`svdbank.cache.opened` opens. Where a model has no bank in the cache, the error says which one could be pulled.

    That asks the Hub once, unless ``find`` is False or ``HF_HUB_OFFLINE`` is set; what goes wrong with it takes no error's place.
    """
    try:
        return cache.opened(source)
    except BankNotFoundError as missing:
        raise (with_found(missing, source) if find and not isinstance(source, Bank) else missing) from missing.__cause__


def with_found(missing: BankNotFoundError, model: str | os.PathLike[str], *, brings: str = "--pull") -> BankNotFoundError:
    """The error, with the banks that are on the Hub for this model; ``brings`` is how one of them is asked for."""
    try:
        found = find_banks(model)
    except Exception:  # of a network, of a strange card: the bank is missing all the same
        found = ()
    if not found:
        return missing
    named = "; ".join(map(str, found[:_NAMED])) + (f" and {len(found) - _NAMED} more" if found[_NAMED:] else "")
    return BankNotFoundError(
        f"{missing}; on the Hub, of the same weight files as their cards say: {named}",
        hint=f"{brings} {found[0].repository} brings it, if you trust {found[0].owner}; or {missing.hint}",
    )


def find_banks(model: str | os.PathLike[str]) -> tuple[FoundBank, ...]:
    """Banks on the Hub of a model that is there too, or in the Hub's cache; the last changed first. None where the client is offline.

    Asked for are the tag ``svdbank`` and the model as ``base_model``; the weight files in the card must be those of the model, by the
    Hub's ids. Raises what the Hub client raises, and CheckpointError for a model that cannot be looked up.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or (known := _weight_files(model)) is None:
        return ()
    repository, files = known
    listed = HfApi().list_models(filter=[TAG, f"base_model:{repository}"], cardData=True, limit=_ASKED)
    found = [(info.last_modified, bank) for info in listed if (bank := _listed_bank(info, files)) is not None]
    return tuple(bank for _, bank in sorted(found, key=lambda entry: str(entry[0]), reverse=True))


def check_named(model: str | os.PathLike[str], repository: str) -> bool:
    """WrongBaseError where the card of ``repository``, ``org/name[@revision]``, says that its bank is not of the model's weight files.

    OptionError where it is no bank by its card. False where nothing was compared: the Hub's ids of the model are not known, or the bank
    is not on the Hub.
    """
    from huggingface_hub import HfApi, constants

    place = far_bank(repository) or far_bank(f"hf://{repository}")
    if constants.HF_HUB_OFFLINE or not isinstance(place, OnHub) or (known := _weight_files(model)) is None:
        return False
    try:
        info = HfApi().model_info(place.repository, revision=place.revision)
    except Exception as cause:
        raise explained(cause, str(place), "looking at it") from cause
    card = _card(info)
    if card is None:
        raise OptionError(
            f"{place}: its card names no bank", hint="name a bank's repository, or leave --pull out to be told of some"
        )
    if not _is_of(card, known[1]):
        raise _other_base(str(place), info, card, os.fspath(model), known[0])
    return True


def _other_base(place: str, info: Any, card: dict[str, Any], model: str, repository: str) -> WrongBaseError:
    """The error for a bank that is not of the model's weight files, with what the card says that it is of."""
    named, commit = getattr(getattr(info, "card_data", None), "base_model", None), card.get("base_commit")
    base = far_bank(f"hf://{named}@{commit}") if _is_name(named) and _is_commit(commit) else None
    if base is not None and named == repository:
        return WrongBaseError(
            f"{place}: its card says that it is of other weight files than {model}",
            hint=f"name the revision of the model that it is of: {base}",
        )
    of = "other weight files than" if base is None else f"{base}, not of the weight files of"
    return WrongBaseError(
        f"{place}: its card says that it is of {of} {model}",
        hint=f"leave --pull out to be told of banks of {repository}; or svdbank build {repository}",
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_commit(value: object) -> bool:
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None


def _weight_files(model: str | os.PathLike[str]) -> tuple[str, dict[str, str]] | None:
    """A model's repository and its weight files with the Hub's ids, as the Hub says now; None where nobody knows a repository.

    One request that is given up soon: it also shows whether there is a Hub to ask.
    """
    from huggingface_hub import HfApi

    if (place := _on_hub(model)) is None:
        return None
    info = HfApi().model_info(place.repository, revision=place.revision, files_metadata=True, timeout=_PATIENCE)
    ids = {file.rfilename: file.lfs.sha256 if file.lfs is not None else file.blob_id for file in info.siblings or []}
    return place.repository, {
        name: str(identity) for name, identity in ids.items() if name.endswith(".safetensors") and identity
    }


def _on_hub(model: str | os.PathLike[str]) -> OnHub | None:
    """The repository of a model: named, or that of a snapshot in the Hub's cache."""
    if far_bank(model) is not None and not os.fspath(model).startswith("hf://"):
        return None
    place = locate(os.fspath(model))
    if isinstance(place, OnHub):
        return place if "/" in place.repository else None
    if not isinstance(place, OnDisk) or not (place.path / "config.json").is_file():
        return None
    folder = place.path.resolve()
    named = None if blobs_of(folder) is None else _CACHED.fullmatch(folder.parent.parent.name)
    return None if named is None else OnHub(f"{named[1]}/{named[2]}", folder.name)


def _listed_bank(info: Any, files: dict[str, str]) -> FoundBank | None:
    """The bank that a listing's entry is of, where its card says that it is of these files."""
    card = _card(info)
    if card is None or not _is_of(card, files):
        return None
    try:
        place = far_bank(f"hf://{info.id}")
    except SvdbankError:
        return None
    date = "" if info.last_modified is None else f"{info.last_modified:%Y-%m-%d}"
    said = [str(card.get(key, "?"))[:20] for key in ("rank", "side", "dtype")]
    return FoundBank(str(place), str(place).partition("/")[0], date, *said)


def _card(info: Any) -> dict[str, Any] | None:
    """What a card says of a bank; None where it says nothing."""
    data = getattr(info, "card_data", None)
    found = (data if isinstance(data, dict) else vars(data)).get(KEY) if data is not None else None
    return found if isinstance(found, dict) else None


def _is_of(card: dict[str, Any], files: dict[str, str]) -> bool:
    """Whether a card names weight files, each with the id that the model's has."""
    named = card.get("weight_files")
    return (
        isinstance(named, dict)
        and bool(named)
        and card.get("format") == 1
        and all(isinstance(name, str) and bool(identity) and files.get(name) == identity for name, identity in named.items())
    )
