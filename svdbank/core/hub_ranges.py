"""Byte ranges of the files of one repository at one commit, over the Hub client's own session.

A request that breaks goes on at the byte where it broke. The Hub gives no hash for a part of a file, so a range is held to what is
known of it: the commit, the file's id and size, the range that the server says it sends, and an ETag that does not change.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from svdbank.core.errors import CheckpointError
from svdbank.core.hub_refusals import ATTEMPTS, explain, status_of, wait_before_retry
from svdbank.core.specs import SourceFile

#: Requests in flight, and bytes asked for in one. Few large requests: the Hub limits how many may be made in five minutes.
REQUESTS, PIECE = 8, 8 << 20

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass
class Traffic:
    """What was asked of the Hub for weight files: bytes received, requests made, and how many of these were repeats."""

    nbytes: int = 0
    requests: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, nbytes: int = 0, requests: int = 0, retries: int = 0) -> None:
        """Count from any thread."""
        with self._lock:
            self.nbytes += nbytes
            self.requests += requests
            self.retries += retries


class AnswerError(CheckpointError):
    """An answer that is not to the question: of another commit, file or range, or more than was asked for."""


class _BrokenOffError(ConnectionError):
    """The body ended before the range did."""


class Repository:
    """Reads ranges of a repository's files at ``commit``, from any number of threads."""

    def __init__(self, name: str, commit: str) -> None:
        self.name = name
        self.commit = commit
        self.traffic = Traffic()
        self._pool = ThreadPoolExecutor(REQUESTS, "svdbank-ranges")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._etags: dict[str, str] = {}
        self._locations: dict[str, str] = {}
        self._headers: dict[str, str] = {}
        self._headers_until = 0.0

    def close(self) -> None:
        """Give up requests under way and start none."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read_into(self, file: SourceFile, buffer: memoryview, begin: int, filled: list[int] | None = None) -> None:
        """Fill ``buffer`` from offset ``begin``, in one request if the connection holds. Raises CheckpointError.

        ``filled[0]`` is kept at the number of bytes that are there, also when it ends in an error.
        """
        position = failures = 0
        while position < len(buffer):
            try:
                for chunk in self._stream(file, begin + position, begin + len(buffer)):
                    buffer[position : position + len(chunk)] = chunk
                    position += len(chunk)
                    failures = 0
                    if filled is not None:
                        filled[0] = position
                if position < len(buffer):
                    raise _BrokenOffError
            except CheckpointError:
                raise
            except Exception as cause:
                failures += 1
                if self._closed.is_set():
                    raise CheckpointError(f"{self.name}: {file.name}: reading was given up") from cause
                if self._forget_location(file.name) and 400 <= status_of(cause) < 500:
                    wait: float | None = 0.0  # a signed address that has expired: the Hub gives a new one
                else:
                    wait = wait_before_retry(cause, failures) if failures < ATTEMPTS else None
                if wait is None:
                    raise self._gave_up(cause, file, failures) from cause
                self.traffic.add(retries=1)
                self._closed.wait(wait)

    def pieces(self, file: SourceFile, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes ``[begin, end)`` in order, piece by piece, several requests ahead of the reader.

        Before an error comes what had arrived of the piece that it is about.
        """
        ahead: deque[tuple[Future[None], memoryview, list[int]]] = deque()
        try:
            while ahead or begin < end:
                while begin < end and len(ahead) < REQUESTS:
                    piece, filled = memoryview(bytearray(min(PIECE, end - begin))), [0]
                    ahead.append((self._pool.submit(self.read_into, file, piece, begin, filled), piece, filled))
                    begin += len(piece)
                future, piece, filled = ahead.popleft()
                error = future.exception()
                yield piece[: filled[0]]
                if error is not None:
                    raise error
        finally:
            for future, _, _ in ahead:
                future.cancel()

    def fill(self, file: SourceFile, buffer: memoryview, begin: int, digest: Any | None = None) -> None:
        """Fill ``buffer`` from offset ``begin`` with several requests at a time, feeding ``digest`` in order."""
        if len(buffer) <= PIECE:
            self.read_into(file, buffer, begin)
            if digest is not None:
                digest.update(buffer)
            return
        parts = [(place, buffer[place : place + PIECE]) for place in range(0, len(buffer), PIECE)]
        futures = [self._pool.submit(self.read_into, file, part, begin + place) for place, part in parts]
        try:
            for future, (_, part) in zip(futures, parts, strict=True):
                future.result()
                if digest is not None:
                    digest.update(part)
        finally:
            for future in futures:
                future.cancel()

    def _stream(self, file: SourceFile, begin: int, end: int) -> Iterator[bytes]:
        """Send one request and yield the body of the answer, once the answer is known to be to this question."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

        if self._closed.is_set():
            raise CheckpointError(f"{self.name}: the checkpoint was closed", hint="open it again")
        address = self._locations.get(file.name)
        # A token belongs to the Hub alone. It is not sent to the address that a file was redirected to, here or by the client.
        headers = {} if address else self._authorised()
        headers = {**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        self.traffic.add(requests=1)
        with get_session().stream(
            "GET",
            address or self._url(file.name),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as response:
            hf_raise_for_status(response)
            self._check(response, file, begin, end)
            left = end - begin
            for chunk in response.iter_raw():
                left -= len(chunk)
                if left < 0:
                    raise AnswerError(f"{self._where(file)}: the server sent more bytes than were asked for", hint=_PROXY)
                self.traffic.add(nbytes=len(chunk))
                yield chunk

    def _check(self, response: Any, file: SourceFile, begin: int, end: int) -> None:
        """Hold an answer to the commit, the file's id and size, the range, and the ETag of the answers before it."""
        where = self._where(file)
        for step in (*response.history, response):
            commit = step.headers.get("X-Repo-Commit")
            if commit is not None and commit != self.commit:
                raise AnswerError(f"{where}: the server answers from commit {commit[:12]}", hint=_PROXY)
            linked = step.headers.get("X-Linked-Etag") or ("" if response.history else step.headers.get("ETag", ""))
            linked = _unquoted(linked)
            if _HASH.fullmatch(linked) and len(linked) == len(file.identity) and linked != file.identity:
                raise AnswerError(f"{where}: the server has another file there (its id is {linked[:12]}…)", hint=_PROXY)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise AnswerError(f"{where}: the server compresses what it sends", hint=_NO_RANGES)
        said = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        whole = response.status_code == 200 and (begin, end) == (0, file.size)
        if not whole and (response.status_code != 206 or said is None):
            raise AnswerError(f"{where}: the server does not answer byte ranges", hint=_NO_RANGES)
        if said is not None and tuple(map(int, said.groups())) != (begin, end - 1, file.size):
            raise AnswerError(
                f"{where}: bytes {begin}-{end - 1} of {file.size} were asked for, the server sends {said[0]}", hint=_PROXY
            )
        etag = _unquoted(response.headers.get("ETag", ""))
        with self._lock:
            if etag and self._etags.setdefault(file.name, etag) != etag:
                raise AnswerError(
                    f"{where}: changed while it was read (its ETag is another one now)", hint="run the command again"
                )
            if response.history:
                self._locations[file.name] = str(response.url)

    def _authorised(self) -> dict[str, str]:
        """The client's headers with its token, looked up once a minute: making them takes as long as the rest of a small request."""
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with self._lock:
            if time.monotonic() >= self._headers_until:
                self._headers, self._headers_until = build_hf_headers(library_name="svdbank"), time.monotonic() + 60
            return self._headers

    def _forget_location(self, name: str) -> bool:
        with self._lock:
            return self._locations.pop(name, None) is not None

    def _gave_up(self, cause: Exception, file: SourceFile, failures: int) -> CheckpointError:
        if isinstance(cause, _BrokenOffError):
            error = CheckpointError(f"{self._where(file)}: the connection breaks off again and again")
        else:
            error = explain(cause, f"{self.name}@{self.commit[:12]}")
        tried = f" (after {failures} tries)" if failures > 1 else ""
        return CheckpointError(f"{error}{tried}", hint=error.hint or "run the command again: it goes on where it was")

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, name, revision=self.commit)

    def _where(self, file: SourceFile) -> str:
        return f"{self.name}@{self.commit[:12]}: {file.name}"


_PROXY = "a proxy or mirror in between (HF_ENDPOINT) changes what it passes on"
_NO_RANGES = "a proxy or mirror in between (HF_ENDPOINT) answers only whole files: --fetch cache"


def _unquoted(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
