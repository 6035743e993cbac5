"""Weight files of the Hub fetched one after another into the Hugging Face cache, ahead of those who read them, within a disk budget.

A file grows in order under ``blobs/<id>.svdbank.incomplete``, so a run that was stopped goes on at the byte where it stopped; this
program and no other reads it there. Whole and with the right hash it gets its place in the cache, or, where nothing is to be kept,
it is deleted once the last tensor was read from it. What was in the cache before is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdbank.checkpoint.files import PIECE, State, WeightFile
from svdbank.core import disk
from svdbank.core.errors import CheckpointError
from svdbank.core.hub_ranges import Repository
from svdbank.core.specs import SourceFile

if TYPE_CHECKING:
    from svdbank.checkpoint.remote.files import RemoteFile

#: Seconds after which one that waits for another process's download looks again.
_ASK_AGAIN = 0.2

#: Ends the names of our unfinished downloads; ``.incomplete`` is what the Hub client itself calls such files.
SUFFIX = ".svdbank.incomplete"


def admitted(uses: Sequence[frozenset[str]], sizes: Mapping[str, int], budget: int | None) -> list[str]:
    """The files to download whole, in the order of their first use; the others do not fit and are read by ranges.

    ``uses`` names the files of each read, in the order of the reads. A file is on disk from its first use to its last; it is
    admitted where the files admitted before it leave room in ``budget`` at each read between, so no read waits for ever.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for step, names in enumerate(uses):
        for name in sorted(names & sizes.keys()):
            first.setdefault(name, step)
            last[name] = step
    taken: list[str] = []
    for name, begin in first.items():
        # Of those admitted before, the most are there when this one comes in: none of them comes in later.
        beside = sum(sizes[other] for other in taken if last[other] >= begin)
        if budget is None or beside + sizes[name] <= budget:
            taken.append(name)
    return taken


class Shards:
    """Downloads files in the order in which they will be read; use it as a context manager around the reads.

    ``uses`` names, for each read to come and in their order, the files it needs; :meth:`done` is told of each read that is over.
    ``budget`` bounds the bytes on disk at any time (None: no bound); ``keep`` leaves the files in the Hugging Face cache.
    """

    def __init__(
        self,
        repository: Repository,
        files: Mapping[str, RemoteFile],
        uses: Sequence[frozenset[str]],
        *,
        folder: Path,
        budget: int | None,
        keep: bool,
    ) -> None:
        sizes = {name: file.source.size for name, file in files.items()}
        self._repository = repository
        self._files = files
        self._folder = folder
        self._budget = budget
        self._keep = keep
        self._queue = admitted(uses, sizes, None if keep else budget)
        self._expected = set(self._queue)
        self._left = Counter(name for names in uses for name in names if name in self._expected)
        self._copies: dict[str, _Copy] = {}
        self._borrowed: Counter[str] = Counter()
        self._on_disk = 0
        self._stopped = False
        self._error: BaseException | None = None
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="svdbank-download", daemon=True)
        #: Total bytes of the files to download.
        self.nbytes = sum(sizes[name] for name in self._queue)

    def __enter__(self) -> Shards:
        disk.make_dirs(self._folder)
        self._make_room()
        for name in self._queue:
            self._files[name].shards = self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        if self._thread.is_alive() and self._expected:
            self._repository.close()  # reads were given up: requests under way would only be waited for
        self._thread.join()
        with self._condition:
            while any(self._borrowed.values()):
                self._condition.wait()
        for name in self._queue:
            self._files[name].shards = None
        for copy in self._copies.values():
            copy.close()

    @contextlib.contextmanager
    def borrowed(self, name: str) -> Iterator[WeightFile | None]:
        """The copy of a file, which stays for the length of the block; None if there is none any more. Waits for the download."""
        with self._condition:
            while name in self._expected and self._error is None and not self._stopped:
                self._condition.wait()
            if name in self._expected:
                raise self._error or CheckpointError(f"{self._repository.name}: {name}: downloading was given up")
            copy = self._copies.get(name)
            self._borrowed[name] += copy is not None
        try:
            yield None if copy is None else copy.file
        finally:
            if copy is not None:
                with self._condition:
                    self._borrowed[name] -= 1
                    self._drop(name)
                    self._condition.notify_all()

    def done(self, names: frozenset[str]) -> None:
        """A read that needed ``names`` is over."""
        with self._condition:
            for name in names & self._left.keys():
                self._left[name] -= 1
                self._drop(name)

    def _drop(self, name: str) -> None:
        """Delete a file that nobody will read or reads, unless it is to be kept."""
        if self._keep or self._left[name] > 0 or self._borrowed[name] > 0 or name not in self._copies:
            return
        self._copies.pop(name).remove()
        self._on_disk -= self._files[name].source.size
        self._condition.notify_all()

    def _run(self) -> None:
        try:
            for name in self._queue:
                file = self._files[name].source
                with self._condition:
                    while self._budget is not None and self._on_disk + file.size > self._budget and not self._stopped:
                        self._condition.wait()
                    if self._stopped:
                        return
                    self._on_disk += file.size
                copy = self._download(file)
                with self._condition:
                    self._copies[name] = copy
                    self._expected.discard(name)
                    self._condition.notify_all()
        except BaseException as cause:
            with self._condition:
                self._error = cause if isinstance(cause, CheckpointError) else self._explained(cause)
                self._condition.notify_all()

    def _explained(self, cause: BaseException) -> CheckpointError:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        what = cause.strerror if isinstance(cause, OSError) else type(cause).__name__
        return CheckpointError(
            f"{self._repository.name}: downloading into {self._folder} failed: {what}",
            hint="--no-keep --disk-budget SIZE, or --fetch ranges, which needs no disk" if full else "check HF_HOME",
        )

    def _download(self, file: SourceFile) -> _Copy:
        shared = self._keep and file.identity
        copy = self._own_or_another(file) if shared else _Copy.open(self._folder, file)
        if copy.is_whole:
            return copy
        try:
            for last in (False, True):
                digest = _hasher(file)
                position = copy.resume(digest)
                for piece in self._repository.pieces(file, position, file.size):
                    copy.append(piece)
                    if digest is not None:
                        digest.update(piece)
                if digest is None or digest.hexdigest() == file.identity:
                    break
                copy.truncate()
                if last:
                    copy.remove()
                    raise CheckpointError(
                        f"{self._repository.name}@{self._repository.commit[:12]}: {file.name} arrived twice with other bytes "
                        f"than the Hub's id {file.identity[:12]}… says; it was removed",
                        hint="run the command again; if it repeats, a proxy or mirror in between changes files",
                    )
                self._repository.traffic.add(retries=1)
            if self._keep and file.identity:
                copy.publish(self._folder / file.identity)
                self._link(file.name)
        except BaseException:
            copy.close()
            raise
        copy.finish()
        return copy

    def _own_or_another(self, file: SourceFile) -> _Copy:
        """A file to be downloaded by us alone, or whole where another process has brought it: one that is at it is waited for."""
        whole, growing = self._folder / file.identity, self._folder / f"{file.identity}{SUFFIX}"
        while True:
            descriptor = None if whole.is_file() else _lock(growing, create=True)
            if whole.is_file():  # also where that was so between the two looks
                if descriptor is not None:
                    disk.unlink(growing)
                    os.close(descriptor)
                copy = _Copy(whole, os.open(whole, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), file)
                copy.finish()
                return copy
            if descriptor is not None:
                return _Copy(growing, descriptor, file)
            with self._condition:
                if self._stopped:
                    raise CheckpointError(f"{self._repository.name}: {file.name}: downloading was given up")
                self._condition.wait(_ASK_AGAIN)

    def _link(self, name: str) -> None:
        """Have the Hub client make the snapshot's link to a blob that is there."""
        from huggingface_hub import hf_hub_download

        # Without it the blob is found by its id; the next run of any program makes the link.
        with contextlib.suppress(Exception):
            hf_hub_download(self._repository.name, name, revision=self._repository.commit)

    def _make_room(self) -> None:
        """Remove what earlier runs left, except unfinished files that come next and fit."""
        room = self._budget
        wanted: set[str] = set()
        for name in self._queue:
            file = self._files[name].source
            if room is not None:
                if file.size > room:
                    break
                room -= file.size
            wanted.add(f"{file.identity}{SUFFIX}")
        for path in self._folder.glob("*.svdbank*.incomplete"):
            if path.name not in wanted and (left := _lock(path, create=False)) is not None:
                disk.unlink(path)
                os.close(left)


class _Copy:
    """A file on disk while it grows, and after; holds the lock that keeps other builds off it."""

    def __init__(self, path: Path, descriptor: int, source: SourceFile) -> None:
        self.path = path
        self.source = source
        self._descriptor = descriptor
        self._file: WeightFile | None = None

    @classmethod
    def open(cls, folder: Path, source: SourceFile) -> _Copy:
        path = folder / f"{source.identity or secrets.token_hex(8)}{SUFFIX}"
        descriptor = _lock(path, create=True)
        if descriptor is None:  # another build is at it: a copy of our own
            path = folder / f"{source.identity}.svdbank-{os.getpid()}-{secrets.token_hex(4)}.incomplete"
            descriptor = _lock(path, create=True)
            assert descriptor is not None
        return cls(path, descriptor, source)

    @property
    def is_whole(self) -> bool:
        """Whether it can be read."""
        return self._file is not None

    @property
    def file(self) -> WeightFile:
        """The file for reading, once it is whole."""
        assert self._file is not None
        return self._file

    def resume(self, digest: Any | None) -> int:
        """Bytes that are there from an earlier run, fed to ``digest``; the file's end is where writing goes on."""
        present = os.fstat(self._descriptor).st_size
        if present > self.source.size:
            self.truncate()
            present = 0
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        left = present
        while left and digest is not None:
            piece = os.read(self._descriptor, min(PIECE, left))
            digest.update(piece)
            left -= len(piece)
        return os.lseek(self._descriptor, 0, os.SEEK_END)

    def append(self, piece: memoryview) -> None:
        while piece:
            piece = piece[os.write(self._descriptor, piece) :]

    def truncate(self) -> None:
        os.ftruncate(self._descriptor, 0)

    def publish(self, path: Path) -> None:
        os.fsync(self._descriptor)
        disk.replace(self.path, path)
        self.path = path

    def finish(self) -> None:
        self._file = WeightFile(self.source.name, self.path, State.of(self._descriptor))

    def remove(self) -> None:
        disk.unlink(self.path)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _lock(path: Path, *, create: bool) -> int | None:
    """A locked descriptor of ``path``; None if another build holds it, or if it is not there and not to be created."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(descriptor).st_ino == path.stat().st_ino
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            ours = False
        if ours:
            return descriptor
        os.close(descriptor)  # whoever held it has removed it meanwhile


def _hasher(file: SourceFile) -> Any | None:
    """A hash object whose digest of the whole file is its id: sha256 of a large file, git's blob id of a small one."""
    if len(file.identity) == 64:
        return hashlib.sha256()
    if len(file.identity) == 40:
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return None
