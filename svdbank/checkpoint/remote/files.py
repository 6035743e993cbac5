"""One weight file of a repository: read where it is at the moment, on the Hub or on this disk."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from svdbank.checkpoint.files import WeightFile
from svdbank.core.hub_ranges import Repository
from svdbank.core.specs import SourceFile


class Lender(Protocol):
    """Who downloads files ahead of their readers and lends them; None for a file that is read by ranges."""

    def borrowed(self, name: str) -> AbstractContextManager[WeightFile | None]: ...


class RemoteFile:
    """One weight file of a repository, read at offsets by any number of threads."""

    def __init__(self, source: SourceFile, repository: Repository) -> None:
        self.name = source.name
        self.source = source
        self._repository = repository
        self.shards: Lender | None = None
        self.copy: WeightFile | None = None

    def read_into(self, buffer: memoryview, begin: int, digest: Any | None = None) -> None:
        """Fill ``buffer`` from offset ``begin``, feeding ``digest`` (a hashlib object) on the way. Raises CheckpointError.

        Waits for the file if it is being downloaded; without a copy on disk only this range is fetched.
        """
        if self.copy is not None:
            return self.copy.read_into(buffer, begin, digest)
        if self.shards is not None:
            with self.shards.borrowed(self.name) as copy:
                if copy is not None:
                    return copy.read_into(buffer, begin, digest)
        return self._repository.fill(self.source, buffer, begin, digest)

    def close(self) -> None:
        """No read may be under way."""
        if self.copy is not None:
            self.copy.close()
