"""What of a repository belongs to the bank that is there, and whether another one may take its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from svdbank.bank.layout import MANIFEST, Manifest
from svdbank.bank.reading import Bank
from svdbank.core.errors import DamageError, OptionError
from svdbank.core.specs import from_json
from svdbank.sharing.repository import Standing, read_text

#: Names of files that a bank has; what else is in a repository its owner put there.
_OURS = re.compile(r"manifest\.json|(?:index|plan|sources)(?:-[\w.]+)?\.json|(?:[^/]+/)*zarr\.json|[^/]+/[^/]+/c/.+")

#: What a repository may hold beside a bank without anybody being asked.
_BESIDE = re.compile(r"\.gitattributes|README\.md|(?:licen[cs]e|notice|copying|use[_-]?policy)[\w.-]*", re.IGNORECASE)

#: Bytes of a manifest that is looked at.
_LARGEST = 64 << 20


def is_of_a_bank(name: str) -> bool:
    """Whether a file of this name is one that banks have."""
    return _OURS.fullmatch(name) is not None


def stale(held: Iterable[str], wanted: set[str]) -> Iterator[str]:
    """Names that a bank before had and this one has not."""
    return (name for name in sorted(held) if is_of_a_bank(name) and name not in wanted)


def replaced(repository: str, before: Standing, bank: Bank, *, force: bool) -> None:
    """OptionError where a bank of another base or of other options is in the repository, or what is no bank, unless ``force``."""
    if force:
        return
    if MANIFEST not in before.files:
        others = [name for name in before.files if not _BESIDE.fullmatch(name)]
        if others:
            raise OptionError(
                f"{repository} holds no bank and {len(others)} other files, {others[0]} among them",
                hint="another name; or --force to put the bank beside them",
            )
        return
    there = _manifest(repository, before)
    if there is None:
        raise OptionError(f"{repository} holds a bank whose manifest cannot be read", hint="--force to replace it")
    mine = bank.manifest
    if (there.base, there.options) != (mine.base, mine.options):
        raise OptionError(
            f"{repository} holds another bank: of {there.base.name}, rank {there.options.rank}, {there.options.side}, "
            f"{there.options.dtype}",
            hint="another name; or --force to replace it (its commits stay)",
        )


def refuse_visibility(repository: str, private: bool, public: bool) -> None:
    """OptionError where those who see the repository are others than are meant: push changes that for nobody."""
    if private and public:
        raise OptionError(
            f"{repository} is there and private, which push does not change",
            hint="leave --public out, or make it public in its settings on the Hub",
        )
    if not private and not public:
        raise OptionError(f"{repository} is there and public", hint="--public, if everybody may have the bank")


def _manifest(repository: str, before: Standing) -> Manifest | None:
    if before.files[MANIFEST].size > _LARGEST:
        return None
    try:
        return from_json(read_text(repository, before.commit, MANIFEST), Manifest, where=repository, error=DamageError)
    except DamageError:
        return None
