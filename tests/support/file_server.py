"""A file server on this machine that does what a test tells it: ranges or none, redirects, changes, cuts, refusals."""

import io
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

RANGE = re.compile(r"bytes=(\d+)-(\d+)")
API = "/api/models/"


@dataclass(frozen=True)
class Seen:
    """One request."""

    path: str
    range: str | None
    authorization: str | None


@dataclass
class FileServer:
    """What is served and how; `files` by path, of bytes or a file's; changed by a test at any time."""

    files: dict[str, bytes | Path] = field(default_factory=dict)
    repositories: dict[str, list[str]] = field(default_factory=dict)  # their files, for the hub's API
    redirects: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    ranges: bool = True
    token: str | None = None  # without it: 401
    statuses: list[int] = field(default_factory=list)  # of the next answers
    cuts: int = 0  # so many answers end early
    delay_s: float = 0.0  # before an answer
    seen: list[Seen] = field(default_factory=list)
    sent_bytes: int = 0
    url: str = ""

    def serve(self, path: str, data: bytes | Path) -> str:
        """Offer `data`; its URL."""
        self.files[path] = data
        return self.url + path

    def hub(self, repo: str, files: dict[str, bytes | Path]) -> None:
        """Offer `files` as a repository of the hub."""
        self.repositories[repo] = list(files)
        for path, data in files.items():
            self.files[f"/{repo}/resolve/main/{path}"] = data


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        told = self.server.told
        path = unquote(urlsplit(self.path).path)
        told.seen.append(Seen(path, self.headers.get("Range"), self.headers.get("Authorization")))
        time.sleep(told.delay_s)
        with suppress(ConnectionError):  # the client has heard enough
            self._answer(told, path)

    def _answer(self, told: FileServer, path: str) -> None:
        if told.statuses and (status := told.statuses.pop(0)) != 200:
            self._send(status, b"no")
        elif told.token is not None and self.headers.get("Authorization") != f"Bearer {told.token}":
            self._send(401, b"no")
        elif path in told.redirects:
            self._send(302, b"", {"Location": told.redirects[path]})
        elif (repo := path.removeprefix(API)) in told.repositories:
            answer = {"id": repo, "siblings": [{"rfilename": file} for file in told.repositories[repo]]}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        elif path in told.files:
            self._file(told, told.files[path])
        else:
            self._send(404, b"no")

    def _file(self, told: FileServer, data: bytes | Path) -> None:
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        wanted = RANGE.fullmatch(self.headers.get("Range", ""))
        if not told.ranges or wanted is None:
            self._send(200, b"x" * min(size, 1 << 16), told.headers | {"Content-Length": str(size)})
            return
        first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
        if first >= size:
            self._send(416, b"", told.headers | {"Content-Range": f"bytes */{size}"})
            return
        with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
            file.seek(first)
            body = file.read(last + 1 - first)
        headers = {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": str(len(body))} | told.headers
        if told.cuts:
            told.cuts -= 1
            body = body[: len(body) // 2]
        told.sent_bytes += len(body)
        self._send(206, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: tests look at what was seen."""


class _Server(ThreadingHTTPServer):
    def __init__(self, told: FileServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told = told


@contextmanager
def file_server() -> Iterator[FileServer]:
    """A server that runs until the end of the block."""
    told = FileServer()
    with _Server(told) as server:
        told.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()


def unused_url() -> str:
    """Where nobody listens."""
    with _Server(FileServer()) as server:
        return f"http://127.0.0.1:{server.server_port}"
