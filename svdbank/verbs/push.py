"""``push``: a bank on this disk becomes a repository on the Hub, or a folder of an object store, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from svdbank import cache
from svdbank.bank.reading import Bank
from svdbank.building.checking import examine, repair_command
from svdbank.building.space import refuse_many_files
from svdbank.core.errors import DamageError, OptionError
from svdbank.core.locks import locked
from svdbank.core.places import InStore, OnHub, far_bank, refuse_empty
from svdbank.core.specs import ProgressCallback, Struct, ignore_progress
from svdbank.sharing import repository as hub
from svdbank.sharing.bases import base_on_hub
from svdbank.sharing.contents import change_of
from svdbank.sharing.copying import copy_into
from svdbank.sharing.inventory import count_files, folder_of, inventory
from svdbank.sharing.replacing import refuse_visibility, replaced
from svdbank.verbs.info import sizes_by_rank

_COMMIT = re.compile(r"[0-9a-f]{40}")


class PushReport(Struct, frozen=True):
    """Where the bank is now, and what that took.

    ``place`` is what :func:`svdbank.open` takes, with the commit; ``committed`` is False where this bank was there already, to the byte.
    Of the bank's ``files``, ``changed`` of ``changed_bytes`` were not there before, ``removed`` were of the bank before and not of this
    one; ``documents`` are the new or changed ones beside them: card, attributes, licence. ``private`` says whether others see it; None in
    a store, where push does not know.
    """

    place: str
    url: str
    digest: str
    base: str
    base_commit: str | None
    files: int
    nbytes: int
    committed: bool
    created: bool
    private: bool | None
    changed: int
    changed_bytes: int
    removed: int
    documents: int = 0


def push(
    bank: str | os.PathLike[str] | Bank,
    to: str,
    *,
    base: str | None = None,
    source: str | os.PathLike[str] | None = None,
    public: bool = False,
    expose_closed_base: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> PushReport:
    """Put a bank into a repository of the Hub: every byte is verified, large files are uploaded, then one commit shows all of it.

    Until that commit the repository is as it was, and a push that was stopped goes on with what it had not yet uploaded. A repository that
    is not there is made, private unless ``public``; its card says what the bank is of and how exact. Into an object store the files are
    copied, and the manifest, which makes them a bank, last.

    Parameters
    ----------
    bank, to
        A bank on this disk (or the model whose bank is in the cache); ``org/name``, with ``@branch`` for another branch than main, or
        ``s3://bucket/path``, ``gs://bucket/path``.
    base, source
        For a bank that was built from a folder: its base on the Hub, ``org/name[@revision]``, and that folder, unless the base is in the
        Hub's cache. The weights are compared by their hashes, the files by the Hub's ids.
    public
        Let everybody see it. Without it a public repository is refused, and with it a private one: neither is changed here.
    expose_closed_base
        Also where not everybody may have the base: singular vectors and values say much about its weights.
    force
        Replace a bank of another base, or of other options, and put it beside files that are no bank's.

    Raises DamageError where the bank is not sound, OptionError and WrongBaseError where it may not go there or is not of its base,
    LockedError where somebody writes into it, BankError for what the Hub refuses and for a connection that breaks.
    """
    place, tell = _destination(to), progress or ignore_progress
    opened = bank if isinstance(bank, Bank) else cache.open(bank)
    root = folder_of(opened)
    refuse_many_files(count_files(opened), opened.place)
    if isinstance(place, InStore):
        if base or source or public or expose_closed_base:
            raise OptionError(f"{place.address} is no repository of the Hub", hint="leave --base, --source and --public out")
        return _into_store(place, opened, root, force, tell)
    hub.refuse_stranger(place.repository)
    branch = place.revision or "main"
    with hub.quiet(), _locked(root):
        found = base_on_hub(opened, base, source, tell)
        if public and found.closed and not expose_closed_base:
            raise OptionError(
                f"{found.repository} is {found.closed}: whoever has the singular vectors and values of its weights knows much about them",
                hint="leave --public out; or, if its owner lets you: --expose-closed-base",
            )
        before = hub.standing(place.repository, branch)
        if before is not None:
            refuse_visibility(place.repository, before.private, public)
            replaced(place.repository, before, opened, force=force)
        _refuse_unsound(opened, tell)
        files, sizes = inventory(opened), [(one.rank, one.left, one.both) for one in sizes_by_rank(opened)]
        change = change_of(opened, found, place.repository, files, sizes, before)
        refuse_many_files(len(files) + len(change.documents), opened.place)
        created = before is None
        if before is None:
            if branch != "main":
                raise OptionError(f"{place.repository} is not there yet, so it has no {branch!r}", hint="leave @BRANCH out")
            hub.create(place.repository, private=not public)
            before = hub.standing(place.repository, branch)
            assert before is not None  # it was just made by us
            change = change_of(opened, found, place.repository, files, sizes, before)
        made = before.commit
        if not change.is_nothing:
            operations = hub.upload(place.repository, branch, change, tell)
            message = f"Bank {opened.manifest.digest[:12]} of {found.repository}@{found.commit[:12]}"
            made = hub.commit(place.repository, branch, before.commit, operations, change, message)
            hub.check(place.repository, branch, made, change)
    return PushReport(
        place=f"hf://{place.repository}@{made}",
        url=_url(place.repository),
        digest=opened.manifest.digest,
        base=found.repository,
        base_commit=found.commit,
        files=len(files),
        nbytes=sum(file.size for file in files),
        committed=not change.is_nothing,
        created=created,
        private=not public,
        changed=len(change.files),
        changed_bytes=sum(file.size for file in change.files),
        removed=len(change.gone),
        documents=len(change.documents),
    )


def _into_store(place: InStore, bank: Bank, root: Path, force: bool, progress: ProgressCallback) -> PushReport:
    with _locked(root):
        _refuse_unsound(bank, progress)
        files = inventory(bank)
        copied = copy_into(place, bank, files, force=force, progress=progress)
    return PushReport(
        place=place.address,
        url=place.address,
        digest=bank.manifest.digest,
        base=bank.manifest.base.name,
        base_commit=bank.manifest.base.revision,
        files=len(files),
        nbytes=sum(file.size for file in files),
        committed=bool(copied.sent or copied.removed),
        created=copied.created,
        private=None,
        changed=copied.sent,
        changed_bytes=copied.nbytes,
        removed=copied.removed,
    )


def _destination(to: str) -> OnHub | InStore:
    refuse_empty(to, "where to push", "name a repository: org/name")
    place = far_bank(to) or far_bank(f"hf://{to}")
    if place is None or (isinstance(place, InStore) and not place.has_listing):
        raise OptionError(f"{to!r} is nothing to push to", hint="write org/name, s3://bucket/path or gs://bucket/path")
    if isinstance(place, OnHub) and place.revision is not None and _COMMIT.fullmatch(place.revision):
        raise OptionError(f"{to!r} names a commit; commits do not change", hint="name a branch, or leave it out for main")
    return place


def _refuse_unsound(bank: Bank, progress: ProgressCallback) -> None:
    damage = examine(bank, data=True, progress=progress).damage
    if damage:
        raise DamageError(
            f"{bank.place} is damaged, so nothing is pushed: {damage[0].file}: {damage[0].what}"
            + (f" (and {len(damage) - 1} more)" if damage[1:] else ""),
            hint=repair_command(bank.place),
        )


def _url(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Nobody else writes into the bank meanwhile; nobody can where the folder takes no lock."""
    with locked(root) if os.access(root, os.W_OK) else contextlib.nullcontext():
        yield
