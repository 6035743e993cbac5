"""A small Hugging Face Hub on localhost for the real ``huggingface_hub`` client (point ``HF_ENDPOINT`` at :attr:`LocalHub.url`).

It holds repositories as lists of commits in memory, answers the read endpoints with the real Hub's headers and error codes, counts
requests, and fails on demand.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

FaultKind = Literal["drop", "status", "slow", "wrong-bytes", "other-range", "other-etag", "other-file", "no-range"]
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
_ERRORS = {
    "RepoNotFound": (404, "Repository not found"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
    "GatedRepo": (403, "Access to this model is restricted"),
}


@dataclass
class Fault:
    """What goes wrong, for requests whose path contains ``path`` and whose method is ``method``, ``times`` times after ``skip``."""

    kind: FaultKind
    path: str
    times: int = 1
    status: int = 503
    seconds: float = 0.5
    method: str = "GET"
    skip: int = 0
    #: Seconds to ask for in Retry-After; None leaves the header out.
    retry_after: str | None = "0"

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request fails; counts it."""
        if self.path not in path or self.method != method or self.times <= 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass(frozen=True)
class Blob:
    """One version of a file, with the ids that the Hub gives it. Weights count as large files (LFS)."""

    data: bytes
    large: bool

    @cached_property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_id


@dataclass
class Repository:
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class LocalHub:
    """The server; use it as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        #: (path, Range header) of each request that asked for a part of a file.
        self.ranges: list[tuple[str, str]] = []
        #: Requests that are being answered, and the most that were at a time.
        self.under_way = self.most_at_once = 0
        #: Whether large files are answered by a redirect to another host, as the Hub does it, and what tokens came there.
        self.redirects = False
        self.leaked: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in ("hub", "storage")]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def blob(self, sha256: str) -> Blob | None:
        """A large file of any repository, by its hash."""
        trees = [tree for repository in self.repositories.values() for tree in repository.commits.values()]
        return next((blob for tree in trees for blob in tree.values() if blob.large and blob.sha256 == sha256), None)

    def commit(self, name: str, files: dict[str, bytes], *, branch: str = "main", gated: bool = False) -> str:
        """Add a commit that changes ``files`` on ``branch``; its hash."""
        repository = self.repositories.setdefault(name, Repository())
        repository.gated = gated
        tree = dict(repository.commits.get(repository.branches.get(branch, ""), {}))
        tree.update({path: Blob(data, path.endswith((".safetensors", ".bin"))) for path, data in files.items()})
        digest = hashlib.sha1(
            json.dumps([name, len(repository.commits), sorted((p, b.git_id) for p, b in tree.items())]).encode()
        )
        commit = digest.hexdigest()
        repository.commits[commit] = tree
        repository.branches[branch] = commit
        return commit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._count_and_answer(body=True)

    def do_HEAD(self) -> None:
        self._count_and_answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _count_and_answer(self, *, body: bool) -> None:
        with self.hub.lock:
            self.hub.under_way += 1
            self.hub.most_at_once = max(self.hub.most_at_once, self.hub.under_way)
        try:
            self._answer(body=body)
        finally:
            with self.hub.lock:
                self.hub.under_way -= 1

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            if asked := self.headers.get("Range"):
                self.hub.ranges.append((path, asked))
            fault = next((fault for fault in self.hub.faults if fault.strikes(self.command, path)), None)
        if fault is not None and fault.kind == "status":
            later = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            return self._send(fault.status, b"{}", later, body)
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.seconds)
        if found := _API.fullmatch(path):
            return self._api(found[1], found[2], found[3] or "main", body)
        if found := _RESOLVE.fullmatch(path):
            return self._resolve(found[1], found[2], found[3], fault, body)
        if (found := re.fullmatch(r"/storage/([0-9a-f]{64})", path)) and (blob := self.hub.blob(found[1])):
            if "Authorization" in self.headers:
                self.hub.leaked.append(self.headers["Authorization"])
            return self._file(blob, {"ETag": '"storage"'}, fault, body)
        return self._send(404, b"{}", {}, body)

    def _tree(self, name: str, revision: str, body: bool) -> tuple[str, dict[str, Blob]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._error("RepoNotFound", body)
        commit = repository.resolve(revision)
        if commit is None:
            return self._error("RevisionNotFound", body)
        return commit, repository.commits[commit]

    def _api(self, name: str, what: str | None, revision: str, body: bool) -> None:
        found = self._tree(name, revision, body)
        if found is None:
            return
        commit, files = found
        if what == "tree":
            document: object = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(blob.data),
                    "oid": blob.git_id,
                    **({"lfs": {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}} if blob.large else {}),
                }
                for path, blob in files.items()
            ]
        else:
            siblings = [
                {
                    "rfilename": path,
                    "size": len(blob.data),
                    "blobId": blob.git_id,
                    **({"lfs": {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}} if blob.large else {}),
                }
                for path, blob in files.items()
            ]
            gated = "manual" if self.hub.repositories[name].gated else False
            document = {
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": False,
                "gated": gated,
                "tags": [],
                "siblings": siblings,
            }
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"}, body)

    def _resolve(self, name: str, revision: str, path: str, fault: Fault | None, body: bool) -> None:
        found = self._tree(name, revision, body)
        if found is None:
            return None
        commit, files = found
        if self.hub.repositories[name].gated and "Authorization" not in self.headers:
            return self._error("GatedRepo", body)
        if path not in files:
            return self._error("EntryNotFound", body, {"X-Repo-Commit": commit})
        blob = files[path]
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(blob.data))}
        if blob.large:
            headers["X-Linked-Etag"] = f'"{blob.etag}"'
        if fault is not None and fault.kind == "other-file":
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(b"another").hexdigest()}"'
        if self.hub.redirects and blob.large:
            return self._send(302, b"", {**headers, "Location": f"{self.hub.storage_url}/storage/{blob.sha256}"}, body)
        return self._file(blob, headers, fault, body)

    def _file(self, blob: Blob, headers: dict[str, str], fault: Fault | None, body: bool) -> None:
        kind = fault.kind if fault is not None else None
        data, status = blob.data, 200
        headers = {**headers, "Accept-Ranges": "bytes"}
        if kind != "no-range" and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            begin = int(asked[1])
            end = min(int(asked[2] or len(data) - 1), len(data) - 1)
            data, status = data[begin : end + 1], 206
            if kind == "other-range":
                begin, end = begin + 4, end + 4
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(blob.data)}"
        if kind == "other-etag":
            headers["ETag"] = '"changed"'
        if kind == "wrong-bytes":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(status, data, headers, body, drop=kind == "drop")

    def _error(self, code: str, body: bool, headers: dict[str, str] | None = None) -> None:
        status, message = _ERRORS[code]
        text = json.dumps({"error": message}).encode()
        self._send(status, text, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool, *, drop: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        self.wfile.write(data[: len(data) // 2] if drop else data)
        if drop:
            self.close_connection = True
