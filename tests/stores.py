"""Object stores and a web server on 127.0.0.1, each at a port that the system chose, for the real obstore."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """S3 as moto has it, with a bucket; what the environment must say."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        known = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        client = boto3.client(
            "s3",
            endpoint_url=known["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        yield known
    finally:
        server.stop()


@contextmanager
def gcs(folder: Path) -> Iterator[dict[str, str]]:
    """Google Cloud Storage as its emulator has it, with a bucket; what the environment must say.

    obstore speaks the XML interface, of which the emulator lacks HEAD, DELETE, listings, a condition and two headers: these are added here.
    """
    import gcp_storage_emulator.server as emulator

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)

    class Handler(emulator.RequestHandler):  # type: ignore[misc]
        def _object(self) -> bytes | None:
            path = unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}/")
            if path.startswith("/"):
                return None
            try:
                content: bytes = self.storage.get_file(BUCKET, path)
            except Exception:
                return None
            return content

        def end_headers(self) -> None:
            if self.command in ("GET", "HEAD", "PUT") and (content := self._object()) is not None:
                self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
                self.send_header("Last-Modified", formatdate(usegmt=True))
            super().end_headers()

        def do_HEAD(self) -> None:  # noqa: N802
            content = self._object()
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()

        def do_GET(self) -> None:  # noqa: N802
            query = parse_qs(urlsplit(self.path).query)
            if query.get("list-type") != ["2"]:
                return super().do_GET()
            listed, _ = self.storage.get_file_list(BUCKET, query.get("prefix", [""])[0], None)[:2]
            entries = "".join(
                f"<Contents><Key>{escape(one['name'])}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f'<ETag>"{base64.b64decode(one["md5Hash"]).hex()}"</ETag><Size>{one["size"]}</Size></Contents>'
                for one in listed
            )
            data = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return None

        def do_PUT(self) -> None:  # noqa: N802
            if self.headers.get("x-goog-if-generation-match") == "0" and self._object() is not None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            super().do_PUT()

        def do_DELETE(self) -> None:  # noqa: N802
            found = self._object() is not None
            if found:
                self.storage.delete_file(BUCKET, unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}/"))
            self.send_response(204 if found else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server._api._httpd = httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, server._storage))
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    account = folder / "account.json"
    account.write_text(
        json.dumps(
            {
                "gcs_base_url": f"http://127.0.0.1:{httpd.server_port}",
                "disable_oauth": True,
                "client_email": "",
                "private_key": "",
                "private_key_id": "",
            }
        )
    )
    try:
        yield {"GOOGLE_SERVICE_ACCOUNT": str(account)}
    finally:
        httpd.shutdown()
        httpd.server_close()


@dataclass
class Web:
    """A web server of some files that answers ranges. ``harm`` may change an answer: (status, headers, body) of (path, range)."""

    files: dict[str, bytes]
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    address: str = ""
    harm: Callable[[str, int, dict[str, str], bytes], tuple[int, dict[str, str], bytes]] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def web(files: Mapping[str, bytes]) -> Iterator[Web]:
    """Serve ``files`` below ``/bank``."""
    state = Web(dict(files))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            name = unquote(urlsplit(self.path).path).removeprefix("/bank/")
            data = state.files.get(name)
            with state.lock:
                state.requests.append(f"{self.command} {name}")
            status, headers = 200, {"Last-Modified": formatdate(usegmt=True)}
            if data is None:
                status, data = 404, b""
            else:
                headers["ETag"] = f'"{base64.b32encode(hashlib.md5(data).digest()).decode()}"'
                if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                    begin, end = int(found[1]), min(int(found[2]), len(data) - 1)
                    headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
                    status, data = (206, data[begin : end + 1]) if begin < len(data) else (416, b"")
            if state.harm is not None and body:
                status, headers, data = state.harm(name, status, headers, data)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                with state.lock:
                    state.sent += len(data)
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}/bank"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def put(address: str, files: Mapping[str, bytes]) -> None:
    """Upload files below an address of a store."""
    from svdbank.core.stores import open_store

    store: Any = open_store(address)
    for name, data in files.items():
        store.put(name, data, use_multipart=False)
