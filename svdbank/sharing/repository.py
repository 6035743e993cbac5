"""A repository on the Hub that a bank is pushed to: what it holds, what of it has to change, and the one commit that changes it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from svdbank.core.errors import BankError, DamageError
from svdbank.core.hub_refusals import ATTEMPTS, is_connection_error, status_of, wait_before_retry
from svdbank.core.specs import Progress, ProgressCallback
from svdbank.sharing.inventory import LocalFile
from svdbank.sharing.refusals import OvertakenError, explained

#: What is handed to the Hub client at a time: files, and bytes.
_BATCH_FILES, _BATCH_BYTES = 64, 256 << 20

#: Files above this many bytes are always large ones to the Hub.
_LARGEST_REGULAR = 10 << 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class HeldFile:
    """A file of a commit: its size and the Hub's id, sha256 of a large one and git's of a small one."""

    size: int
    identity: str


@dataclass(frozen=True)
class Standing:
    """A branch of a repository: its commit and the files of that."""

    commit: str
    private: bool
    files: dict[str, HeldFile]


@dataclass(frozen=True)
class RepositoryChange:
    """What makes a branch hold a bank: files and documents to add, names to delete."""

    files: tuple[LocalFile, ...]
    documents: dict[str, bytes]
    gone: tuple[str, ...]

    @property
    def is_nothing(self) -> bool:
        return not (self.files or self.documents or self.gone)


def quiet() -> AbstractContextManager[object]:
    """Inside, the Hub client draws no bars: progress is told to whoever asked for it."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    return disable_progress_bars()


def refuse_stranger(repository: str) -> None:
    """BankError where nobody can write: without a token, or offline."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise BankError(f"{repository}: HF_HUB_OFFLINE forbids pushing", hint="run it with HF_HUB_OFFLINE=0")
    if get_token() is None:
        raise BankError(
            f"{repository}: pushing needs a token of yours, and there is none",
            hint="hf auth login, or HF_TOKEN in the environment",
        )


def read_text(repository: str, commit: str, name: str) -> bytes:
    """A small file of a commit."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=commit)).read_bytes()
    except Exception as cause:
        raise explained(cause, repository, "looking at it") from cause


def standing(repository: str, branch: str) -> Standing | None:
    """What a branch holds now; None where there is no repository that the Hub shows. BankError where it cannot be seen."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    shown, api = f"{repository}@{branch}", HfApi()
    try:
        info = _patiently(lambda: api.model_info(repository, revision=branch))
        listed = _patiently(lambda: list(api.list_repo_tree(repository, recursive=True, revision=info.sha)))
    except Exception as cause:
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            return None
        raise explained(cause, shown, "looking at it") from cause
    files = {
        entry.path: HeldFile(entry.size, entry.lfs.sha256 if entry.lfs is not None else entry.blob_id)
        for entry in listed
        if isinstance(entry, RepoFile)
    }
    return Standing(str(info.sha), bool(info.private), files)


def create(repository: str, *, private: bool) -> None:
    """Make the repository."""
    from huggingface_hub import HfApi

    try:
        _patiently(lambda: HfApi().create_repo(repository, private=private))
    except Exception as cause:
        if status_of(cause) == 409:
            raise BankError(
                f"{repository}: there is a repository of this name that the Hub does not show you", hint="name another one"
            ) from cause
        raise explained(cause, repository, "creating the repository") from cause


def differs(held: HeldFile | None, file: LocalFile) -> bool:
    """Whether a file of the bank is not what a commit holds under its name."""
    if held is None or held.size != file.size:
        return True
    if len(held.identity) == 64:
        return held.identity != file.sha256
    return held.size > _LARGEST_REGULAR or held.identity != git_id(file.path.read_bytes())


def is_large(name: str) -> bool:
    """Whether ``.gitattributes`` make a file of a bank a large one: its data, and what grows with the number of weights."""
    return "/c/" in name or name.startswith(("index-", "plan"))


def git_id(data: bytes) -> str:
    """git's id of a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def upload(repository: str, branch: str, change: RepositoryChange, progress: ProgressCallback) -> list[Any]:
    """Bring all large files of a change to the Hub, which shows none of them before the commit; the operations that it will be made of.

    What was uploaded before, by this command or another, is not uploaded again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, operations = HfApi(), list[Any]()
    total, done = sum(file.size for file in change.files), 0
    for batch in _batches(change.files):
        additions = [CommitOperationAdd(file.name, file.path) for file in batch]
        for addition, file in zip(additions, batch, strict=True):
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # it was just computed, of these bytes
            if is_large(file.name) and file.size:
                # The Hub decides by the .gitattributes before this commit. A client that does not know the attribute asks it.
                addition._upload_mode = "lfs"
        send = partial(api.preupload_lfs_files, repository, additions, revision=branch, free_memory=False)
        try:
            _patiently(send)
        except Exception as cause:
            raise explained(cause, repository, "uploading") from cause
        for file in batch:
            file.check()
        operations += additions
        done += sum(file.size for file in batch)
        progress(Progress("upload", done, total, "bytes", batch[-1].name))
    operations += [CommitOperationAdd(name, data) for name, data in sorted(change.documents.items())]
    return operations + [CommitOperationDelete(name) for name in change.gone]


def commit(repository: str, branch: str, parent: str, operations: Sequence[Any], change: RepositoryChange, message: str) -> str:
    """Make the one commit, on ``parent`` and no other; its hash. Raises OvertakenError where the branch has moved.

    Where the answer is lost, what the branch holds says whether it was made.
    """
    from huggingface_hub import HfApi

    try:
        made = _patiently(
            lambda: HfApi().create_commit(repository, operations, commit_message=message, revision=branch, parent_commit=parent)
        )
        return str(made.oid)
    except Exception as cause:
        failure = explained(cause, repository, "committing")
        if isinstance(failure, OvertakenError) or is_connection_error(cause) or status_of(cause) >= 500:
            now = standing(repository, branch)
            if now is not None and now.commit != parent and not wrong(now, change):
                return now.commit
        raise failure from cause


def wrong(now: Standing, change: RepositoryChange) -> list[str]:
    """Names under which a commit does not hold what the change put there."""
    names = [file.name for file in change.files if differs(now.files.get(file.name), file)]
    for name, data in change.documents.items():
        held = now.files.get(name)
        if held is None or held.identity not in (git_id(data), hashlib.sha256(data).hexdigest()):
            names.append(name)
    return names + [name for name in change.gone if name in now.files]


def check(repository: str, branch: str, made: str, change: RepositoryChange) -> None:
    """DamageError where the commit holds other bytes than were sent, by the ids that the Hub gives."""
    now = standing(repository, made)
    if now is None or (names := wrong(now, change)):
        first = "the repository" if now is None else names[0]
        raise DamageError(
            f"{repository}@{made[:12]}: the Hub does not hold {first} as it was sent", hint=f"push {repository} again"
        )


def _batches(files: Sequence[LocalFile]) -> Iterator[list[LocalFile]]:
    batch: list[LocalFile] = []
    for file in files:
        batch.append(file)
        if len(batch) == _BATCH_FILES or sum(one.size for one in batch) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _patiently(call: Callable[[], Result]) -> Result:
    """The result of a request that may be made twice, made again while the Hub says that it is busy."""
    for failures in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as cause:
            wait = wait_before_retry(cause, failures) if status_of(cause) else None
            if wait is None or failures == ATTEMPTS:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable")
