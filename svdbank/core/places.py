"""How a model, a bank, an adapter or a text is named: a path, a repository of the Hugging Face Hub, ``NAME=PLACE``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from svdbank.core import disk
from svdbank.core.errors import CheckpointError, OptionError

_REPOSITORY = re.compile(r"((?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95})(?:@([\w./-]{1,200}))?", re.ASCII)
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?!(?:datasets|spaces)/)"
    r"([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([\w.-]+))?(?:[/?#].*)?",
    re.ASCII,
)

#: How the addresses of web pages begin.
_ADDRESSES = ("https://", "http://", "huggingface.co/", "hf.co/")


@dataclass(frozen=True)
class OnDisk:
    """A path that exists, with ``~`` replaced."""

    path: Path


@dataclass(frozen=True)
class OnHub:
    """A repository of the Hub, and the branch, tag or commit that was named; None where none was."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


@dataclass(frozen=True)
class WebAddress:
    """The address of a web page, and what it shows where that is a repository of the Hub."""

    text: str
    shown: OnHub | None


@dataclass(frozen=True)
class Nowhere:
    """No path that exists, and no name of a repository. ``is_path`` where it can only have been meant as a path."""

    text: str
    path: Path
    is_path: bool


@dataclass(frozen=True)
class InStore:
    """A folder of an object store or of a web server, without a slash at its end."""

    address: str

    @property
    def has_listing(self) -> bool:
        """False for a web server, which shows files alone."""
        return not self.address.startswith("http")


def far_bank(name: str | os.PathLike[str]) -> OnHub | InStore | None:
    """Where a bank lies that is named by an address: ``hf://org/name[@revision]``, ``s3://``, ``gs://``, ``http(s)://``; None for any
    other name. OptionError for an address that is none, or the page of a repository."""
    text = os.fspath(name)
    scheme, sign, rest = text.partition("://")
    if not isinstance(name, str) or not sign or scheme not in ("hf", "s3", "gs", "http", "https"):
        return None
    if scheme == "hf":
        repository = _repository(rest)
        if repository is None or "/" not in repository.repository:
            raise OptionError(f"{text!r} is no address on the Hub", hint="write hf://org/name or hf://org/name@revision")
        return repository
    if (page := _PAGE.fullmatch(text)) is not None:
        raise OptionError(f"{text!r} is a page, not a bank's address", hint=f"name it as hf://{page[1]}")
    host = rest.partition("/")[0]
    if (
        not host
        or any(ch.isspace() or ord(ch) < 32 for ch in text)
        or ".." in rest.split("/")
        or any(ch in rest for ch in "?#")
    ):
        raise OptionError(
            f"{text!r} is no address of a bank", hint="write s3://bucket/path, gs://bucket/path or https://host/path"
        )
    if "@" in host:
        raise OptionError("an address with a user or a token in it is not taken", hint="set credentials in the environment")
    return InStore(text.rstrip("/"))


def locate(name: str | os.PathLike[str], *, one_word: bool = False) -> OnDisk | OnHub | WebAddress | Nowhere:
    """What a name from outside means: the one place where paths are told from ``org/name[@revision]``.

    A path that exists wins over a repository of the same spelling; ``hf://org/name[@revision]`` always means the Hub. What starts with
    ``/``, ``.`` or ``~``, ends in ``.safetensors`` or is a ``PathLike`` is only ever a path, an empty name is nowhere, and nothing is
    asked of the network. With ``one_word``, a word alone is a repository too, as some of the Hub's oldest are (``gpt2``). Raises
    :class:`CheckpointError` for a path that cannot be looked at.
    """
    text = os.fspath(name)
    remote = text.removeprefix("hf://")
    path = disk.expanded(text)
    if remote == text and text.strip() and _exists(path, text):
        return OnDisk(path)
    as_path = remote == text and (
        not isinstance(name, str) or text.startswith(("/", ".", "~")) or text.endswith(".safetensors")
    )
    repository = None if as_path else _repository(remote)
    if repository is not None and (one_word or "/" in repository.repository):
        return repository
    page = _PAGE.fullmatch(remote)
    if page is not None or text.startswith(_ADDRESSES):
        return WebAddress(remote, _repository(page[1] + (f"@{page[2]}" if page[2] else "")) if page is not None else None)
    return Nowhere(remote, path, is_path=as_path or (remote == text and text.split("@")[0].count("/") != 1))


def refusal(place: WebAddress | Nowhere) -> OptionError:
    """The error for a name that means nothing here."""
    shown = place.shown if isinstance(place, WebAddress) else None
    return OptionError(
        f"{place.text!r} is neither a path that exists nor a Hub id",
        hint=f"name it as {shown}" if shown else "write org/name or org/name@revision, or check the path",
    )


def refuse_empty(name: str | os.PathLike[str], what: str, hint: str) -> None:
    """OptionError for an empty name. As a path it is the working folder, which nobody who passes an unset variable means."""
    if not os.fspath(name).strip():
        raise OptionError(f"{what} is empty", hint=hint)


def refuse_address(name: str | os.PathLike[str]) -> None:
    """OptionError for an address where a folder on this disk belongs: as a path it would be a folder called ``hf:``."""
    if isinstance(name, str) and re.match(r"[a-z][a-z0-9+.-]*://", name):
        raise OptionError(f"{name[:200]!r} is an address, and this needs a folder on this disk", hint="name a folder")


def named_place(value: str) -> tuple[str | None, str]:
    """``NAME=PLACE`` as its parts. The name is None where there is only a place: a path that exists, or one with ``=`` further down."""
    name, sign, place = value.partition("=")
    if not sign or "/" in name or disk.expanded(value).exists():
        return None, value
    return name, place


def _exists(path: Path, text: str) -> bool:
    try:
        return path.exists()
    except OSError as cause:
        raise CheckpointError(
            f"{text[:200]}: cannot be looked at: {cause.strerror}", hint="check the path and its permissions"
        ) from cause


def _repository(text: str) -> OnHub | None:
    found = _REPOSITORY.fullmatch(text)
    if found is None or any(part in ("", ".", "..") for part in (found[2] or "main").split("/")):
        return None
    if ".." in found[1] or "--" in found[1] or found[1].endswith(".git"):  # the Hub takes no such name
        return None
    return OnHub(found[1], found[2])
