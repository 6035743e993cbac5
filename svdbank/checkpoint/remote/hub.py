"""Models on the Hugging Face Hub: an id becomes a commit, and what the commit's files are.

Everything goes through ``huggingface_hub``, so its cache, tokens, endpoint and offline switch mean what they mean elsewhere.
"""

from __future__ import annotations

import contextlib
import glob
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdbank.checkpoint.files import CARD, blob_id, member, read_card, read_document, sha256_of
from svdbank.checkpoint.layout import MAX_CONFIG, MAX_INDEX, choose, parse_index
from svdbank.core.errors import CheckpointError
from svdbank.core.hub_refusals import ATTEMPTS, explain, is_connection_error, status_of, wait_before_retry
from svdbank.core.specs import SourceFile

#: ``progress(stage, done, total)``: bytes done and bytes known so far of a stage such as ``download``.
DownloadProgress = Callable[[str, int, int], None]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_ID = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})?")
_CONFIG = "config.json"


@dataclass(frozen=True)
class HubFile:
    """One weight file of a commit. ``identity`` is the Hub's id (sha256 of a large file, git's of a small one; may be empty),
    ``path`` where the Hugging Face cache has it, None where it does not."""

    name: str
    size: int
    identity: str
    path: Path | None


@dataclass(frozen=True)
class Snapshot:
    """A commit: what configuration and index say, and which weight files there are. ``folder`` is its place in the cache."""

    repository: str
    commit: str
    folder: Path
    config: bytes | None
    weight_map: dict[str, str] | None
    files: tuple[HubFile, ...]
    has_card: bool


def look_up(repository: str, revision: str | None) -> Snapshot:
    """The commit that ``revision`` (default ``main``) names now, with its configuration and index: weights are not downloaded.

    Without a connection, or under ``HF_HUB_OFFLINE``, the cached commit is used when it is complete; a full commit hash that is
    complete in the cache needs no request at all. Raises CheckpointError.
    """
    from huggingface_hub import HfApi

    if revision is not None and _COMMIT.fullmatch(revision) and (cached := cached_snapshot(repository, revision)) is not None:
        return cached
    shown = f"{repository}@{revision}" if revision else repository
    try:
        info = _patiently(lambda: HfApi().model_info(repository, revision=revision, files_metadata=True), repository, revision)
    except Exception as cause:
        unreachable = is_connection_error(cause) or status_of(cause) >= 500
        if unreachable and (cached := cached_snapshot(repository, revision)) is not None:
            return cached
        raise explain(cause, shown) from cause
    commit = info.sha
    if commit is None or not _COMMIT.fullmatch(commit):
        raise CheckpointError(f"{shown}: the Hub named no commit")
    listed = {file.rfilename: file for file in info.siblings or []}
    layout = choose(listed, shown)
    try:
        weight_map = None
        if layout.index is not None:
            index = _document(repository, commit, layout.index, listed, MAX_INDEX)
            weight_map = parse_index(index, f"{shown}: {layout.index}")
        names = sorted(set(weight_map.values())) if weight_map is not None else [layout.single or ""]
        missing = [name for name in names if name not in listed]
        if missing:
            raise CheckpointError(f"{shown}: {layout.index} names {missing[0]}, which the repository does not hold")
        config = _document(repository, commit, _CONFIG, listed, MAX_CONFIG) if _CONFIG in listed else None
        folder = storage_folder(repository) / "snapshots" / commit
        files = tuple(_hub_file(folder, name, listed[name]) for name in names)
    except Exception as cause:
        raise explain(cause, shown) from cause
    has_card = CARD in listed and (listed[CARD].size or 0) <= MAX_CONFIG
    return Snapshot(repository, commit, folder, config, weight_map, files, has_card)


def located(repository: str, commit: str, files: Iterable[SourceFile]) -> tuple[Path, tuple[HubFile, ...]]:
    """The cache's folder of a commit, and its weight files as somebody has recorded them: where the cache has each. Asks no network."""
    folder = storage_folder(repository) / "snapshots" / commit
    return folder, tuple(HubFile(f.name, f.size, f.identity, _cached(folder, f.name, f.identity)) for f in files)


def fetch_card(snapshot: Snapshot) -> str | None:
    """The beginning of a commit's model card, fetched into the cache; None where there is none, or it cannot be had now."""
    from huggingface_hub import hf_hub_download

    if not snapshot.has_card:
        return None
    # It only makes an error's advice better: nothing that goes wrong here may take that error's place.
    with contextlib.suppress(Exception):
        path = hf_hub_download(snapshot.repository, CARD, revision=snapshot.commit, tqdm_class=_silent_bar(None))
        return read_card(Path(path).parent.resolve())
    return None


def storage_folder(repository: str) -> Path:
    """Where the Hugging Face cache keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=repository, repo_type="model")


def download(snapshot: Snapshot, progress: DownloadProgress | None = None) -> dict[str, Path]:
    """Bring every weight file of a commit into the Hugging Face cache; where each lies then.

    Those that were not there before are compared with the Hub's sha256 where it gives one. Raises CheckpointError.
    """
    new = {file.name: file.identity for file in snapshot.files if file.path is None}
    try:
        _download(snapshot, new, progress)
    except Exception as cause:
        raise explain(cause, f"{snapshot.repository}@{snapshot.commit[:12]}") from cause
    return {file.name: member(snapshot.folder.resolve(), file.name) for file in snapshot.files}


def remember(repository: str, revision: str | None, commit: str) -> None:
    """Make the cache's ``refs/`` say what ``revision`` was, so that it can be opened and looked up offline.

    Not where that would put a commit that is complete in the cache behind one that is not.
    """
    from huggingface_hub import hf_hub_download

    if revision == commit:
        return
    reference = storage_folder(repository) / "refs" / (revision or "main")
    known = reference.read_text().strip() if reference.is_file() else None
    if known == commit or (known is not None and cached_snapshot(repository, commit) is None):
        return
    # The client writes refs for a file that it is asked for by name. The build is done: that this fails is no reason to fail now.
    with contextlib.suppress(Exception):
        hf_hub_download(repository, _CONFIG, revision=revision, tqdm_class=_silent_bar(None))


def _patiently(call: Callable[[], Any], repository: str, revision: str | None) -> Any:
    """The result of a request for metadata, asked again while the Hub is busy: not where the cache can answer instead."""
    for failures in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as cause:
            wait = wait_before_retry(cause, failures)
            # A server that is busy may be waited for; one that is not there is told of soon.
            last = wait is None or failures == (ATTEMPTS if status_of(cause) else 3)
            if last or (status_of(cause) != 429 and cached_snapshot(repository, revision) is not None):
                raise
            assert wait is not None
            time.sleep(wait)
    raise AssertionError("unreachable")


def _document(repository: str, commit: str, name: str, listed: dict[str, Any], limit: int) -> bytes:
    """The bytes of a small file, through the Hugging Face cache; refused before the download if it is not small."""
    from huggingface_hub import hf_hub_download

    if (listed[name].size or 0) > limit:
        raise CheckpointError(f"{repository}: {name} has {listed[name].size} bytes; {limit} are accepted")
    path = Path(
        _patiently(lambda: hf_hub_download(repository, name, revision=commit, tqdm_class=_silent_bar(None)), repository, commit)
    )
    return read_document(member(path.parent.resolve(), name), limit)


def _hub_file(folder: Path, name: str, listed: Any) -> HubFile:
    identity = str((listed.lfs.sha256 if listed.lfs is not None else listed.blob_id) or "")
    if not _FILE_ID.fullmatch(identity):  # it becomes a file name in the cache
        raise CheckpointError(f"{name}: the server names an id that is no hash: {identity[:80]!r}", hint="check HF_ENDPOINT")
    size = listed.size if listed.size is not None else (listed.lfs.size if listed.lfs is not None else None)
    if size is None:
        raise CheckpointError(f"{name}: the server does not say how large it is", hint="check HF_ENDPOINT")
    return HubFile(name, int(size), identity, _cached(folder, name, identity))


def _cached(folder: Path, name: str, identity: str) -> Path | None:
    """Where the cache has a file: behind the snapshot's link, or as a blob of that id which another commit brought."""
    if (folder / name).exists():
        return member(folder.resolve(), name)
    blob = folder.parent.parent / "blobs" / identity
    return blob.resolve() if identity and blob.is_file() and not blob.is_symlink() else None


def _download(snapshot: Snapshot, new: dict[str, str], progress: DownloadProgress | None) -> None:
    from huggingface_hub import snapshot_download

    where = f"{snapshot.repository}@{snapshot.commit[:12]}"
    names = [file.name for file in snapshot.files]
    failure: Exception | None = None
    try:
        snapshot_download(
            snapshot.repository,
            revision=snapshot.commit,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=_silent_bar(progress),
        )
    except Exception as cause:
        failure = cause  # some files may have come
    folder = snapshot.folder.resolve()
    if wrong := [name for name, identity in new.items() if _remove_if_wrong(folder, name, identity)]:
        raise CheckpointError(
            f"{where}: {', '.join(wrong[:3])} arrived with other bytes than the Hub's sha256 says ({len(wrong)} files); removed",
            hint="run the command again; if it repeats, a proxy or mirror in between changes files",
        )
    if failure is not None:
        raise failure
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{where}: {name} was not downloaded", hint="run the command again")


def _remove_if_wrong(folder: Path, name: str, identity: str) -> bool:
    """Remove a file that just came if it is not what the Hub's sha256 says: what is in the cache is trusted by every program."""
    if len(identity) != 64 or not (folder / name).is_file():
        return False
    path = member(folder, name)
    if sha256_of(path) == identity:
        return False
    path.unlink()
    (folder / name).unlink(missing_ok=True)
    return True


def cached_snapshot(repository: str, revision: str | None) -> Snapshot | None:
    """The cached snapshot of a revision, if all of its files are there."""
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
    weight_map = None
    if layout.index:
        weight_map = parse_index(read_document(member(folder, layout.index), MAX_INDEX), f"{shown}: {layout.index}")
    names = sorted(set(weight_map.values())) if weight_map is not None else [layout.single or ""]
    if any(not (folder / name).is_file() for name in names):
        return None
    # A model is not what it is without its configuration: one that never came, or whose blob is gone, is not a model without one.
    if try_to_load_from_cache(repository, _CONFIG, revision=folder.name) is None:
        return None
    config = read_document(member(folder, _CONFIG), MAX_CONFIG) if (folder / _CONFIG).is_file() else None
    files = []
    for name in names:
        path = member(folder, name)
        files.append(HubFile(name, path.stat().st_size, blob_id(folder, name) or "", path))
    return Snapshot(repository, folder.name, folder, config, weight_map, tuple(files), (folder / CARD).is_file())


def _silent_bar(progress: DownloadProgress | None) -> Any:
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
