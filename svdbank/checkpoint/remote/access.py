"""Weight files of a commit that lie on the Hub and not on this disk, and the ways in which their bytes are had."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from svdbank.checkpoint.files import State, WeightFile, open_regular
from svdbank.checkpoint.remote.files import RemoteFile
from svdbank.checkpoint.remote.hub import DownloadProgress, Snapshot, download, remember, storage_folder
from svdbank.checkpoint.remote.shards import Shards
from svdbank.core.hub_ranges import Repository, Traffic
from svdbank.core.specs import SourceFile


class Remote:
    """What of a commit is not on this disk. Until it is told otherwise, each read fetches its own bytes and leaves nothing here."""

    def __init__(self, snapshot: Snapshot, revision: str | None) -> None:
        self._snapshot = snapshot
        self._revision = revision
        self._repository = Repository(snapshot.repository, snapshot.commit)
        self.files = {
            file.name: RemoteFile(SourceFile(name=file.name, size=file.size, identity=file.identity), self._repository)
            for file in snapshot.files
            if file.path is None
        }

    @property
    def traffic(self) -> Traffic:
        """Bytes, requests and retries so far; of :meth:`download`, which is the Hub client's, the bytes only."""
        return self._repository.traffic

    @property
    def folder(self) -> Path:
        """Where downloads go: the cache's folder of blobs of this repository."""
        return storage_folder(self._snapshot.repository) / "blobs"

    def download(self, progress: DownloadProgress | None = None) -> None:
        """Bring all files into the Hugging Face cache, as the Hub client does it, and read them there from now on."""
        paths = download(self._snapshot, progress)
        for file in self.files.values():
            self._read_here(file, paths[file.name])
            self.traffic.add(nbytes=file.source.size)

    def look_again(self) -> None:
        """Read from the cache what has come there since, by whomever. No read may be under way."""
        for file in self.files.values():
            blob = self.folder / file.source.identity
            if file.copy is None and file.source.identity and blob.is_file() and not blob.is_symlink():
                self._read_here(file, blob)

    def _read_here(self, file: RemoteFile, path: Path) -> None:
        descriptor = open_regular(path)
        try:
            file.copy = WeightFile(file.name, path, State.of(descriptor))
        finally:
            os.close(descriptor)

    def shards(self, uses: Sequence[frozenset[str]], *, budget: int | None, keep: bool) -> Shards:
        """Download file by file ahead of the reads to come; see :class:`~svdbank.checkpoint.remote.shards.Shards`."""
        return Shards(self._repository, self.files, uses, folder=self.folder, budget=budget, keep=keep)

    def remember(self) -> None:
        """Let the cache know which commit the revision was; see :func:`svdbank.checkpoint.remote.hub.remember`."""
        remember(self._snapshot.repository, self._revision, self._snapshot.commit)

    def close(self) -> None:
        """Give up requests under way; later reads raise CheckpointError."""
        self._repository.close()
