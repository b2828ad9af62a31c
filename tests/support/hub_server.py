"""A local server that speaks the Hugging Face hub's protocol: a repository's files at a commit."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "5f0c3b7d9a1e4c2f8b6a7d0e9c1b2a3f4d5e6f70"
LARGE = (".safetensors", ".gguf")


@dataclass(kw_only=True)
class Hub:
    """One repository. Its answers may be made worse."""

    repo: str
    files: dict[str, bytes]
    cut_at: int | None = None
    """Large files are cut off there, once for each."""
    wrong: set[str] = field(default_factory=set)
    """Files whose bytes are not those that were promised."""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and range of each request."""
    url: str = ""

    def info(self) -> dict[str, Any]:
        return {
            "id": self.repo,
            "sha": COMMIT,
            "siblings": [self._sibling(name, content) for name, content in self.files.items()],
        }

    def info_paths(self) -> tuple[str, ...]:
        path = f"/api/models/{self.repo}"
        return (path, *(f"{path}/revision/{name}" for name in ("main", COMMIT)))

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return found


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server.hub, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if path in hub.info_paths():
            return self._send(json.dumps(hub.info()).encode())
        prefix = f"/{hub.repo}/resolve/{COMMIT}/"
        if path.startswith(prefix) and (name := path.removeprefix(prefix)) in hub.files:
            return self._send_file(name)
        known = path.startswith((f"/api/models/{hub.repo}/", f"/{hub.repo}/"))
        return self._send(
            b"{}", 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}
        )

    def _send_file(self, name: str) -> None:
        content, hub = self.server.hub.files[name], self.server.hub
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name in hub.wrong:
            content = bytes(reversed(content))
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(content[start:], 206 if start else 200, headers, name.endswith(LARGE))

    def _send(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        is_large: bool = False,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_large and self.server.hub.cut_at is not None:
            body, self.server.hub.cut_at = body[: self.server.hub.cut_at], None
            self.close_connection = True
        self.wfile.write(body)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def hub_of(folder: Path, repo: str = "tiny-org/tiny") -> Hub:
    """A repository with a folder's files, and some that nobody needs."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return Hub(repo=repo, files={**files, "README.md": b"# tiny", "onnx/model.onnx": b"x"})
