"""Models on the Hugging Face Hub: an id becomes a commit, and the commit's weight files lie in the Hugging Face cache.

Everything goes through ``huggingface_hub``, so its cache, tokens, endpoint and offline switch mean what they mean elsewhere.
"""

from __future__ import annotations

import contextlib
import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdbank.checkpoint.files import member, read_document, sha256_of
from svdbank.checkpoint.layout import MAX_INDEX, choose, parse_index
from svdbank.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from svdbank.checkpoint.source import Progress

_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@([\w./-]{1,200}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"


@dataclass(frozen=True)
class Snapshot:
    """A commit's configuration and weights on disk. ``identities`` maps weight file names to the Hub's file ids."""

    commit: str
    folder: Path
    identities: dict[str, str]


def parse_id(text: str) -> tuple[str, str | None]:
    """``org/name[@revision]`` in its two parts; OptionError if it is anything else."""
    found = _ID.fullmatch(text)
    if found is None or any(part in ("", ".", "..") for part in (found[2] or "main").split("/")) or ".." in found[1]:
        raise OptionError(
            f"{text!r} is neither a path that exists nor a Hub id",
            hint="write org/name or org/name@revision, or check the path",
        )
    return found[1], found[2]


def fetch(repository: str, revision: str | None, progress: Progress | None = None) -> Snapshot:
    """Configuration and weight files of a repository at the commit that ``revision`` (default ``main``) names now.

    What the cache lacks is downloaded, and compared with the Hub's sha256 where it gives one. Without a connection, or under
    ``HF_HUB_OFFLINE``, the cached commit is used when it is complete. Raises CheckpointError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if revision is not None and _COMMIT.fullmatch(revision) and (cached := _from_cache(repository, revision)) is not None:
        return cached
    shown = f"{repository}@{revision}" if revision else repository
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as cause:
        unreachable = _is_connection_error(cause) or (isinstance(cause, HfHubHTTPError) and _status(cause) >= 500)
        if unreachable and (cached := _from_cache(repository, revision)) is not None:
            return cached
        raise _explain(cause, shown) from cause
    commit = info.sha
    if commit is None or not _COMMIT.fullmatch(commit):
        raise CheckpointError(f"{shown}: the Hub named no commit")
    files = {file.rfilename: file for file in info.siblings or []}
    layout = choose(files, shown)
    try:
        names = [layout.single] if layout.single else _indexed(repository, commit, layout.index or "", files, shown)
        folder = _download(repository, commit, [*([_CONFIG] if _CONFIG in files else []), *names], files, progress)
        _remember(repository, revision or "main", commit, _CONFIG if _CONFIG in files else names[0])
    except CheckpointError:
        raise
    except Exception as cause:
        raise _explain(cause, shown) from cause
    identities = {name: _file_id(files[name]) for name in names}
    return Snapshot(commit, folder, identities)


def _file_id(file: Any) -> str:
    """sha256 of a large file, git's blob id of a small one: also the name that the file has in ``blobs/``."""
    return str((file.lfs.sha256 if file.lfs is not None else file.blob_id) or "")


def _indexed(repository: str, commit: str, index: str, files: dict[str, Any], shown: str) -> list[str]:
    folder = _download(repository, commit, [index], files, None)
    names = sorted(set(parse_index(read_document(member(folder, index), MAX_INDEX), f"{shown}: {index}").values()))
    missing = [name for name in names if name not in files]
    if missing:
        raise CheckpointError(f"{shown}: {index} names {missing[0]}, which the repository does not hold")
    return names


def _download(repository: str, commit: str, names: list[str], files: dict[str, Any], progress: Progress | None) -> Path:
    """Fetch ``names`` at ``commit``; those that were not cached before are compared with their sha256."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    new = [name for name in names if not isinstance(try_to_load_from_cache(repository, name, revision=commit), str)]
    folder = Path(
        snapshot_download(
            repository, revision=commit, allow_patterns=[glob.escape(name) for name in names], tqdm_class=_silent_bar(progress)
        )
    ).resolve()
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{repository}@{commit[:12]}: {name} was not downloaded", hint="run the command again")
    for name in new:
        lfs = files[name].lfs
        if lfs is not None and lfs.sha256 and sha256_of((folder / name).resolve()) != lfs.sha256:
            # What is in the cache is trusted from then on by every program, so wrong bytes must not stay there.
            (folder / name).resolve().unlink()
            (folder / name).unlink(missing_ok=True)
            raise CheckpointError(
                f"{repository}@{commit[:12]}: {name} arrived with other bytes than the Hub's sha256 {lfs.sha256[:12]}…; it was removed",
                hint="run the command again; if it repeats, a proxy or mirror in between changes files",
            )
    return folder


def _remember(repository: str, revision: str, commit: str, name: str) -> None:
    """Make the cache's ``refs/`` say what ``revision`` was, so that it can be opened offline: the client does it for a file.

    Only now, when the commit is complete: refs never name a commit that cannot be used.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if revision == commit:
        return
    known = try_to_load_from_cache(repository, name, revision=revision)
    if not isinstance(known, str) or Path(known).parent.name != commit:
        # The weights are here: that a name cannot be looked up offline later is no reason to fail now.
        with contextlib.suppress(Exception):
            hf_hub_download(repository, name, revision=revision, tqdm_class=_silent_bar(None))


def _from_cache(repository: str, revision: str | None) -> Snapshot | None:
    """The cached snapshot of a revision; None if there is none, CheckpointError if files of it are missing."""
    from huggingface_hub import try_to_load_from_cache

    for name in (_CONFIG, "model.safetensors", "model.safetensors.index.json"):
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent.resolve()
            break
    else:
        return None
    shown = f"{repository}@{revision}" if revision else repository
    try:
        layout = choose((entry.name for entry in folder.iterdir()), shown)
    except CheckpointError:
        return None
    names = [layout.single] if layout.single else []
    if layout.index:
        names = sorted(set(parse_index(read_document(member(folder, layout.index), MAX_INDEX), f"{shown}: index").values()))
    if any(not (folder / name).is_file() for name in names):
        return None
    return Snapshot(folder.name, folder, {})


def _explain(cause: Exception, shown: str) -> CheckpointError:
    """What a failure of the Hub client means to the person who named ``shown``."""
    from huggingface_hub import errors

    if isinstance(cause, errors.GatedRepoError):
        return CheckpointError(
            f"{shown}: access to this repository must be granted first",
            hint=f"ask for it on the model's page ({shown.split('@')[0]}), then: hf auth login",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{shown}: the repository has no such revision", hint="name a branch, a tag or a full commit hash"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{shown}: neither a path here nor a repository that the Hub shows you",
            hint="check the spelling; if it is private: hf auth login",
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return CheckpointError(
            f"{shown}: not complete in the Hugging Face cache, and HF_HUB_OFFLINE forbids downloading it",
            hint=f"once, with a connection: HF_HUB_OFFLINE=0 hf download {shown.replace('@', ' --revision ')}",
        )
    if isinstance(cause, errors.HfHubHTTPError):
        status = _status(cause)
        if status in (401, 403):
            return CheckpointError(f"{shown}: the Hub refuses access (HTTP {status})", hint="hf auth login")
        if status == 429:
            return CheckpointError(
                f"{shown}: the Hub answers that too many requests were made (HTTP 429)",
                hint="wait some minutes and run it again",
            )
        return CheckpointError(f"{shown}: the Hub answers HTTP {status}", hint="run it again later")
    if _is_connection_error(cause):
        return CheckpointError(
            f"{shown}: not complete in the Hugging Face cache, and the Hub cannot be reached ({type(cause).__name__})",
            hint="check the connection and HF_ENDPOINT, or name a local folder",
        )
    if isinstance(cause, OSError):
        return CheckpointError(
            f"{shown}: downloading failed: {cause}",
            hint="check the free space and permissions of the Hugging Face cache (HF_HOME)",
        )
    return CheckpointError(
        f"{shown}: the Hub client failed: {type(cause).__name__}: {cause}", hint="run it again; what was downloaded is kept"
    )


def _status(cause: Exception) -> int:
    return int(getattr(getattr(cause, "response", None), "status_code", 0) or 0)


def _is_connection_error(cause: BaseException) -> bool:
    """True for a failed connection, of whichever HTTP library this version of huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(cause, HfHubHTTPError):
        return False
    seen: BaseException | None = cause
    while seen is not None:
        libraries = {kind.__module__.partition(".")[0] for kind in type(seen).__mro__}
        if isinstance(seen, ConnectionError | TimeoutError) or libraries & {
            "httpx",
            "httpx2",
            "httpcore",
            "requests",
            "urllib3",
        }:
            return True
        seen = seen.__cause__
    return False


def _silent_bar(progress: Progress | None) -> Any:
    """A tqdm class that draws nothing and hands bytes on to ``progress``."""
    from tqdm.auto import tqdm

    class Forward(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Two bars count bytes: those from the network and those written. The second is what is done.
            self.counts = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            kwargs.pop("name", None)
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts:
                self.n += n or 0
                if progress is not None:
                    progress("download", int(self.n), int(self.total or 0))
            return None

    return Forward
