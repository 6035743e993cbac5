"""A small Hugging Face Hub on localhost for the real ``huggingface_hub`` client (point ``HF_ENDPOINT`` at :attr:`LocalHub.url`).

It holds repositories as lists of commits in memory, answers the endpoints that read and write models with the real Hub's headers and
error codes, counts requests and bytes, waits before each answer if told to, and fails on demand. Large files travel by LFS; of Xet it
knows nothing (``HF_HUB_DISABLE_XET=1``).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from tests.checkpoint.hub_repositories import Blob, Repository, Tree
from tests.checkpoint.hub_writing import RefusedError, commit_of, created, lfs_batch, upload_modes, validated_card

FaultKind = Literal[
    "drop", "status", "slow", "wrong-bytes", "other-range", "other-etag", "other-file", "no-range", "cut", "lost"
]
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
_WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)")
_STORAGE = re.compile(r"/storage/([0-9a-f]{64})")
_ERRORS = {
    "RepoNotFound": (404, "Repository not found"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
    "GatedRepo": (403, "Access to this model is restricted"),
}


@dataclass
class Fault:
    """What goes wrong, for requests whose path contains ``path`` and whose method is ``method``, ``times`` times after ``skip``.

    ``cut`` closes the connection before anything is done, ``lost`` after it was done and before a word of the answer.
    """

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


class LocalHub:
    """The server; use it as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        #: Large files that were uploaded, by their sha256, whether a commit names them or not; and who may write where, by token.
        self.objects: dict[str, bytes] = {}
        self.tokens: dict[str, frozenset[str]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        #: (path, Range header) of each request that asked for a part of a file.
        self.ranges: list[tuple[str, str]] = []
        #: Requests that are being answered, and the most that were at a time.
        self.under_way = self.most_at_once = 0
        #: Bytes of the bodies of answers to GET, and of requests.
        self.sent = self.received = 0
        #: Seconds before each answer; entries of a listing in one answer; who is told of each request before it is acted on.
        self.latency = 0.0
        self.page = 1000
        self.before: Callable[[str], None] | None = None
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
        if sha256 in self.objects:
            return Blob(self.objects[sha256], large=True)
        trees = [tree for repository in self.repositories.values() for tree in repository.commits.values()]
        return next((blob for tree in trees for blob in tree.values() if blob.large and blob.sha256 == sha256), None)

    def commit(self, name: str, files: dict[str, bytes], *, branch: str = "main", gated: bool = False) -> str:
        """Add a commit that changes ``files`` on ``branch``; its hash."""
        repository = self.repositories.setdefault(name, Repository(name))
        repository.gated = gated
        changed = {path: Blob(data, "/c/" in path or repository.is_large(path, data)) for path, data in files.items()}
        return repository.add({**repository.head(branch), **changed}, branch)

    def login(self, *namespaces: str, token: str = "hf_aToken") -> str:
        """A token that may write into these namespaces, and see what is private there."""
        self.tokens[token] = frozenset(namespaces)
        return token

    def point(self, patch: pytest.MonkeyPatch, home: Path, *, token: str | None = None) -> None:
        """Let the Hub client of this process, and those of processes that it starts, use this Hub with a cache and a token of its own."""
        point_client(patch, self.url, home, token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def point_client(patch: pytest.MonkeyPatch, url: str, home: Path, token: str | None) -> None:
    """What :meth:`LocalHub.point` does, in a process that has the Hub's address alone."""
    from huggingface_hub import constants, hf_api

    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_DISABLE_XET": "1"}
    for name, value in settings.items():
        patch.setenv(name, value)
    patch.setenv("HF_TOKEN_PATH", str(home / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
    patch.setattr(constants, "ENDPOINT", url)
    # The client's functions (`list_repo_tree`, by which Transformers lists a tokenizer's files) are those of one object, which took the
    # address when it was imported.
    patch.setattr(hf_api.api, "endpoint", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._count_and_answer(body=True)

    def do_HEAD(self) -> None:
        self._count_and_answer(body=False)

    def do_POST(self) -> None:
        self._count_and_answer(body=True)

    def do_PUT(self) -> None:
        self._count_and_answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _count_and_answer(self, *, body: bool) -> None:
        with self.hub.lock:
            self.hub.under_way += 1
            self.hub.most_at_once = max(self.hub.most_at_once, self.hub.under_way)
        try:
            try:
                self._answer(body=body)
            except RefusedError as refusal:
                self._send(refusal.status, json.dumps({"error": str(refusal)}).encode(), refusal.headers, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
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
        if self.hub.before is not None:
            self.hub.before(f"{self.command} {path}")
        received = self._received()
        if self.hub.latency:
            time.sleep(self.hub.latency)
        if fault is not None and fault.kind == "cut":
            self.close_connection = True
            return None
        if fault is not None and fault.kind == "status":
            later = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            return self._send(fault.status, b"{}", later, body)
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.seconds)
        if self.command in ("POST", "PUT"):
            with self.hub.lock:
                document = self._write(path, received)
            if fault is not None and fault.kind == "lost":
                self.close_connection = True
                return None
            return self._send_json(document, body)
        if path == "/api/models":
            return self._models(body)
        if path == "/api/whoami-v2":
            return self._send_json({"type": "user", "name": min(self._namespaces(required=True)), "orgs": []}, body)
        if found := _API.fullmatch(path):
            return self._api(found[1], found[2], found[3] or "main", found[4], body)
        if found := _RESOLVE.fullmatch(path):
            return self._resolve(found[1], found[2], found[3], fault, body)
        if (found := _STORAGE.fullmatch(path)) and (blob := self.hub.blob(found[1])):
            if "Authorization" in self.headers:
                self.hub.leaked.append(self.headers["Authorization"])
            return self._file(blob, {"ETag": '"storage"'}, fault, body)
        return self._send(404, b"{}", {}, body)

    def _received(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            data = b"".join(parts)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            self.hub.received += len(data)
        return data

    def _write(self, path: str, data: bytes) -> object:
        """Act on a POST or PUT, and say what came of it."""
        hub = self.hub
        if path == "/api/validate-yaml":
            return validated_card(json.loads(data)["content"])
        if path == "/api/repos/create":
            return created(hub.repositories, json.loads(data), self._namespaces(required=True), hub.url)
        if found := _STORAGE.fullmatch(path):
            if hashlib.sha256(data).hexdigest() != found[1]:
                raise RefusedError(400, "the bytes have another sha256")
            hub.objects[found[1]] = data
            return {}
        found = _WRITE.fullmatch(path) or _BATCH.fullmatch(path)
        if found is None:
            raise RefusedError(404, "no such place")
        repository = hub.repositories.get(found[1])
        if repository is None or (repository.private and found[1].split("/")[0] not in self._namespaces(required=False)):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if found[1].split("/")[0] not in self._namespaces(required=True):
            raise RefusedError(403, "you have no right to write here")
        if found[2] == "verify":
            if json.loads(data)["oid"] not in hub.objects:
                raise RefusedError(404, "no such object")
            return {}
        if found[2] == "batch":
            return lfs_batch(
                json.loads(data), lambda sha256: hub.blob(sha256) is not None, hub.storage_url, f"{hub.url}/{found[1]}"
            )
        if found[2] == "preupload":
            return upload_modes(repository, json.loads(data), found[3])
        commit = commit_of(repository, data, found[3], hub.blob)
        return {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{found[1]}/commit/{commit}", "hookOutput": ""}

    def _namespaces(self, *, required: bool) -> frozenset[str]:
        """Where the request's token may write. 401 for a token that is none, and for none where one is ``required``."""
        found = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if found is None and required:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return found or frozenset()

    def _tree(self, name: str, revision: str, body: bool) -> tuple[str, Tree] | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and name.split("/")[0] not in self._namespaces(required=False)):
            return self._error("RepoNotFound", body)
        commit = repository.resolve(revision)
        if commit is None:
            return self._error("RevisionNotFound", body)
        return commit, repository.commits[commit]

    def _api(self, name: str, what: str | None, revision: str, under: str | None, body: bool) -> None:
        found = self._tree(name, revision, body)
        if found is None:
            return None
        commit, files = found
        if what == "tree":
            return self._paged(
                [_listed(path, blob) for path, blob in files.items() if path.startswith(f"{under}/" if under else "")], body
            )
        siblings = [
            {
                "rfilename": path,
                "size": len(blob.data),
                "blobId": blob.git_id,
                **({"lfs": {"sha256": blob.sha256, **blob.lfs}} if blob.large else {}),
            }
            for path, blob in files.items()
        ]
        return self._send_json({**self.hub.repositories[name].info(commit), "siblings": siblings}, body)

    def _models(self, body: bool) -> None:
        """The repositories that have every ``filter`` among their tags, and that this token may see."""
        asked = parse_qs(urlsplit(self.path).query)
        found = []
        for name, repository in self.hub.repositories.items():
            if not repository.branches or (repository.private and name.split("/")[0] not in self._namespaces(required=False)):
                continue
            info = repository.info(repository.branches["main"])
            if asked.get("author", [info["author"]]) == [info["author"]] and set(asked.get("filter", [])) <= set(info["tags"]):
                found.append(info if {"cardData", "full"} & set(asked) else {**info, "cardData": None})
        self._paged(found[: int(asked.get("limit", ["1000"])[0])], body)

    def _paged(self, entries: list[dict[str, object]], body: bool) -> None:
        """One page of a listing, with the address of the next."""
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        begin = int(query.pop("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if begin + self.hub.page < len(entries):
            kept = "".join(f"&{name}={quote(value)}" for name, values in query.items() for value in values)
            headers["Link"] = f'<{self.hub.url}{address.path}?cursor={begin + self.hub.page}{kept}>; rel="next"'
        self._send(200, json.dumps(entries[begin : begin + self.hub.page]).encode(), headers, body)

    def _send_json(self, document: object, body: bool) -> None:
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
        with self.hub.lock:
            self.hub.sent += len(data) if self.command == "GET" else 0
        self.wfile.write(data[: len(data) // 2] if drop else data)
        if drop:
            self.close_connection = True


def _listed(path: str, blob: Blob) -> dict[str, object]:
    large = {"lfs": {"oid": blob.sha256, **blob.lfs}} if blob.large else {}
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_id, **large}
