"""Where banks lie that are not on this disk: byte ranges of files, many at a time. What is read is checked by whoever asked."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from shlex import quote
from typing import Any, Protocol

from svdbank.core import stores
from svdbank.core.errors import BankError, BankNotFoundError, CheckpointError, DamageError
from svdbank.core.hub_ranges import PIECE, AnswerError, Repository, Traffic
from svdbank.core.hub_refusals import ATTEMPTS, explain, status_of, wait_before_retry
from svdbank.core.places import InStore, OnHub
from svdbank.core.specs import SourceFile

#: Requests in flight. The Hub asks twice for a large file, itself and where it lies, so that a lookup of 210 files waits 14 times.
REQUESTS = 32

#: Bytes asked for ahead of the reader.
AHEAD = 128 << 20

#: Of a part of a file: the file, with the size and, where it is known, the Hub's id that it must have; first byte; byte behind the last.
Part = tuple[SourceFile, int, int]


_COMMIT = re.compile(r"[0-9a-f]{40}")


class Source(Protocol):
    """One place far away. Methods may be called from any number of threads."""

    traffic: Traffic

    @property
    def place(self) -> str:
        """Its address: what ``svdbank.open`` takes, with the commit where there is one."""

    def whole(self, name: str, largest: int) -> bytes:
        """A small file of unknown size. FileNotFoundError where there is none, DamageError where it is larger."""

    def read(self, file: SourceFile, start: int, stop: int) -> bytes:
        """A part of a file, in one request. FileNotFoundError where there is no such file; DamageError where it has another size or the
        answer is not to the question; BankError where the place cannot be reached."""

    def give_up(self) -> None:
        """End what is under way soon, with an error; what is asked afterwards is answered."""

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Bytes of those of the files that are there, and of what else a listing shows."""


def read_all(source: Source, parts: Sequence[Part]) -> Iterator[bytes]:
    """The bytes of each part, in order, several requests at a time and ahead of the reader; large parts in several. The first error ends
    it."""
    pool = ThreadPoolExecutor(min(REQUESTS, max(len(parts), 4)), "svdbank-far")
    left = iter([(part, begin) for part in parts for begin in range(part[1], max(part[2], part[1] + 1), PIECE)])
    ahead: deque[tuple[Future[bytes], int]] = deque()
    waiting = 0
    try:
        for file, start, stop in parts:
            pieces: list[bytes] = []
            while sum(map(len, pieces)) < stop - start or not pieces:
                while waiting < AHEAD and (following := next(left, None)) is not None:
                    (of, _, end), begin = following
                    size = min(begin + PIECE, end) - begin
                    ahead.append((pool.submit(source.read, of, begin, begin + size) if size else _empty(), size))
                    waiting += size
                future, size = ahead.popleft()
                pieces.append(future.result())
                waiting -= size
                if len(pieces[-1]) != size:
                    raise DamageError(f"{source.place}/{file.name}: {size} bytes were asked for, {len(pieces[-1])} came")
                if not size:
                    break
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
    except KeyboardInterrupt:
        source.give_up()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _empty() -> Future[bytes]:
    """The answer to no question: a server has no range of no bytes."""
    future: Future[bytes] = Future()
    future.set_result(b"")
    return future


class HubSource:
    """A repository of the Hub at one commit, which a branch or tag is turned into at the first request."""

    def __init__(self, named: OnHub, commit: str | None = None) -> None:
        self._named = named
        self._repository = None if commit is None else Repository(named.repository, commit)
        self._lock = threading.Lock()
        self.traffic = Traffic() if self._repository is None else self._repository.traffic

    @property
    def place(self) -> str:
        at = self._named.revision if self._repository is None else self._repository.commit
        return f"hf://{self._named.repository}" + (f"@{at}" if at else "")

    def whole(self, name: str, largest: int) -> bytes:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        revision = self._named.revision if self._repository is None else self._repository.commit
        url = hf_hub_url(self._named.repository, name, revision=revision)
        self.traffic.add(requests=1)
        found = self._patiently(lambda: get_hf_file_metadata(url), name)
        if found.commit_hash is None or found.size is None:
            raise BankError(f"{self.place}: the server names neither commit nor size of {name}", hint=_PROXY)
        self._pin(found.commit_hash)
        if found.size > largest:
            raise DamageError(f"{self.place}/{name}: {found.size} bytes where a small file belongs")
        return self.read(SourceFile(name, found.size, ""), 0, found.size) if found.size else b""

    def read(self, file: SourceFile, start: int, stop: int) -> bytes:
        if self._repository is None:
            raise BankError(f"{self.place}: no commit is known yet")
        buffer = bytearray(stop - start)
        try:
            self._repository.read_into(file, memoryview(buffer), start)
        except CheckpointError as error:
            raise self._told(error, file.name) from error
        return bytes(buffer)

    def give_up(self) -> None:
        with self._lock:
            given_up = self._repository
            if given_up is not None:
                self._repository = Repository(given_up.name, given_up.commit)
                self._repository.traffic = self.traffic
        if given_up is not None:
            given_up.close()

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        del names
        revision = self._named.revision if self._repository is None else self._repository.commit
        self.traffic.add(requests=1)
        listed = self._patiently(
            lambda: list(HfApi().list_repo_tree(self._named.repository, recursive=True, revision=revision)),
            "the list of its files",
        )
        return {entry.path: entry.size for entry in listed if isinstance(entry, RepoFile)}

    def _pin(self, commit: str) -> None:
        with self._lock:
            asked = self._named.revision or ""
            if _COMMIT.fullmatch(asked) and commit != asked:
                raise DamageError(f"{self.place}: the server answers from commit {commit[:12]}", hint=_PROXY)
            if not _COMMIT.fullmatch(commit):
                raise BankError(f"{self.place}: the server names no commit", hint=_PROXY)
            if self._repository is None:
                self._repository = Repository(self._named.repository, commit)
                self._repository.traffic = self.traffic
            elif self._repository.commit != commit:
                raise DamageError(f"{self.place}: the server answers from commit {commit[:12]}", hint=_PROXY)

    def _patiently(self, call: Any, name: str) -> Any:
        """Call again what failed for a moment; errors as :meth:`read`."""
        failures = 0
        while True:
            try:
                return call()
            except Exception as cause:
                failures += 1
                wait = wait_before_retry(cause, failures) if failures < ATTEMPTS else None
                if wait is None:
                    error = explain(cause, self.place)
                    error.__cause__ = cause
                    raise self._told(error, name) from cause
                threading.Event().wait(wait)

    def _told(self, error: CheckpointError, name: str) -> Exception:
        """What a failure means to whoever reads a bank."""
        from huggingface_hub import errors

        cause = error.__cause__
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return OfflineError(
                f"{self.place}: {name} is not on this disk, and HF_HUB_OFFLINE forbids fetching it",
                hint=f"once, with a connection: HF_HUB_OFFLINE=0 svdbank pull {quote(self.place)}",
            )
        if isinstance(cause, errors.RepositoryNotFoundError) and not isinstance(cause, errors.GatedRepoError):
            return BankNotFoundError(
                f"{self.place}: no repository that the Hub shows you",
                hint="check the spelling; if it is private: hf auth login",
            )
        if isinstance(cause, errors.EntryNotFoundError):
            return FileNotFoundError(f"{self.place}/{name}")
        if "does not answer byte ranges" in str(error):
            return BankError(
                str(error), hint="a proxy or mirror in between (HF_ENDPOINT) answers only whole files: go round it"
            )
        if isinstance(error, AnswerError) or (cause is not None and status_of(cause) == 416):
            return DamageError(str(error), hint=_PROXY)
        hint = error.hint
        if hint is not None and ("HF_HUB_OFFLINE" in hint or "local folder" in hint):
            hint = "check the connection and HF_ENDPOINT"
        text = str(error).replace("not complete in the Hugging Face cache, and the Hub", "the Hub")
        return BankError(text, hint=hint)


class StoreSource:
    """A bank below an address of an object store: ``s3://``, ``gs://``, ``https://``. It has no commits: the digests decide."""

    def __init__(self, named: InStore) -> None:
        self.traffic = Traffic()
        self._named = named
        self._store: Any = None
        self._etags: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        return self._named.address

    def whole(self, name: str, largest: int) -> bytes:
        self.traffic.add(requests=1)
        with stores.explained(self.place, name):
            found = self._opened().head(name)
        size = int(found["size"])
        if size > largest:
            raise DamageError(f"{self.place}/{name}: {size} bytes where a small file belongs")
        return self.read(SourceFile(name, size, ""), 0, size) if size else b""

    def read(self, file: SourceFile, start: int, stop: int) -> bytes:
        where = f"{self.place}/{file.name}"
        self.traffic.add(requests=1)
        with stores.explained(self.place, file.name):
            # One range in one request: get_ranges would read the gaps between ranges that are less than a megabyte apart.
            answer = self._opened().get(file.name, options={"range": (start, stop)})
            meta, said = answer.meta, answer.range
            if meta["size"] != file.size:
                raise DamageError(f"{where}: {meta['size']} bytes, recorded were {file.size}")
            if tuple(said) != (start, stop):
                raise DamageError(f"{where}: bytes {start}-{stop} were asked for, the server sends {said[0]}-{said[1]}")
            data = bytes(answer.bytes())
        if len(data) != stop - start:
            raise DamageError(f"{where}: {stop - start} bytes were asked for, the server sent {len(data)}")
        etag = meta.get("e_tag")
        with self._lock:
            if etag and self._etags.setdefault(file.name, etag) != etag:
                raise DamageError(f"{where}: changed while it was read (its ETag is another one now)")
        self.traffic.add(nbytes=len(data))
        return data

    def give_up(self) -> None:
        """Nothing: obstore's requests end by its own limits."""

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        if self._named.has_listing:
            with stores.explained(self.place, "the list of its files"):
                listed = [entry for batch in self._opened().list() for entry in batch]
            self.traffic.add(requests=-(-len(listed) // 1000) or 1)
            return {str(entry["path"]): int(entry["size"]) for entry in listed}
        found: dict[str, int] = {}

        def look(name: str) -> None:
            with suppress(FileNotFoundError), stores.explained(self.place, name):
                self.traffic.add(requests=1)
                found[name] = int(self._opened().head(name)["size"])

        with ThreadPoolExecutor(REQUESTS, "svdbank-far") as pool:
            for _ in pool.map(look, names):
                pass
        return found

    def _opened(self) -> Any:
        with self._lock:
            if self._store is None:
                self._store = stores.open_store(self._named.address)
            return self._store


class OfflineError(BankError):
    """Something that is not on this disk was asked for where nothing may be fetched."""


_PROXY = "a proxy or mirror in between (HF_ENDPOINT) may change what it passes on; svdbank pull looks at what is there now"
