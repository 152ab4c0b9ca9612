"""A hub on this machine that serves one repository: slowly, in part, or not at all, as a test wants it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 2**17
LFS_FROM = 2**19
"""Bytes; the hub keeps larger files outside git, with their SHA-256."""


class FakeHub:
    """What it serves, how, and what it was asked."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.pause_s = 0.0
        """Before each piece of `PIECE` bytes."""
        self.stop_at: int | None = None
        """Bytes of a large file after which it sends nothing more until the test ends."""
        self.cut_at: int | None = None
        """Bytes of a large file after which it hangs up, once."""
        self.status = 200
        """Of the answers that carry files."""
        self.ranges: list[int] = []
        """Where requests for a part of a large file began."""
        self.requests = 0
        self.over = threading.Event()

    def listing(self, *, tree: bool) -> object:
        files = []
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            sha = hashlib.sha256(data).hexdigest()
            lfs = {"size": len(data), "pointerSize": 130}
            large = len(data) >= LFS_FROM
            if tree:
                entry = {"type": "file", "path": path.name, "size": len(data), "oid": sha[:40]}
                files.append(entry | ({"lfs": lfs | {"oid": sha}} if large else {}))
            else:
                entry = {"rfilename": path.name, "size": len(data), "blobId": sha[:40]}
                files.append(entry | ({"lfs": lfs | {"sha256": sha}} if large else {}))
        return files if tree else {"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": files}


@contextmanager
def fake_hub(name: str, folder: Path, cache: Path) -> Iterator[FakeHub]:
    """Serve the folder as the repository `name`; this process and its children take it for the hub, and `cache` for the
    hub's cache."""
    hub = FakeHub(name, folder)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        patch.setenv("HF_HUB_CACHE", str(cache))
        patch.setenv("HF_HOME", str(cache))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        try:
            yield hub
        finally:
            hub.over.set()
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        hub = self.served
        hub.requests += 1
        path = urlparse(self.path).path
        if path.startswith(f"/api/models/{hub.name}"):
            body = json.dumps(hub.listing(tree="/tree/" in path)).encode()
            self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
            if not head:
                self.wfile.write(body)
            return
        file = hub.folder / path.rpartition("/")[2]
        if not path.startswith(f"/{hub.name}/resolve/") or not file.is_file():
            self._send(404, {"Content-Length": "0", "X-Error-Code": "RepoNotFound"})
            return
        self._send_file(file.read_bytes(), head)

    def _send_file(self, data: bytes, head: bool) -> None:
        hub = self.served
        sha = hashlib.sha256(data).hexdigest()
        large = len(data) >= LFS_FROM
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", "ETag": f'"{sha if large else sha[:40]}"'}
        if large:
            headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
        if hub.status != 200 and not head:
            self._send(hub.status, {"Content-Length": "0"})
            return
        first = 0
        if (asked := self.headers.get("Range")) and not head:
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            if large:
                hub.ranges.append(first)
        self._send(206 if first else 200, headers | {"Content-Length": str(len(data) - first)})
        if not head:
            self._write(data, first, large)

    def _write(self, data: bytes, first: int, large: bool) -> None:
        hub = self.served
        for start in range(first, len(data), PIECE):
            if large and hub.cut_at is not None and start >= hub.cut_at:
                hub.cut_at = None
                self.close_connection = True
                self.connection.close()
                return
            if large and hub.stop_at is not None and start >= hub.stop_at:
                hub.over.wait(60)
                return
            time.sleep(hub.pause_s)
            try:
                self.wfile.write(data[start : start + PIECE])
            except OSError:  # the other side was ended
                return

    def _send(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
