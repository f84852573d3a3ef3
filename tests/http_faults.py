"""A file server on 127.0.0.1 with ranges, ETags and faults on demand; it counts what it was asked for."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

Fault = Literal["unavailable", "cut", "wrong", "slow", "silent", "whole"]


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder. faults: asked for each request of bytes, by its number and file name; None: answer as one should.

    requests: (file name, first byte, last byte) of each range asked for. faulty: how often each fault was made.
    """

    daemon_threads = True

    def __init__(self, folder: Path, faults: Callable[[int, str], Fault | None] = lambda number, name: None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults = folder, faults
        self.requests: list[tuple[str, int, int]] = []
        self.faulty: Counter[str] = Counter()
        self.lock, self.ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news here."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server = self.server
        name = self.path.lstrip("/")
        path = server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        status, first, last = 200, 0, len(data) - 1
        fault: Fault | None = None
        if body and "Range" in self.headers:
            begin, end = self.headers["Range"].removeprefix("bytes=").split("-")
            status, first, last = 206, int(begin), min(int(end), len(data) - 1)
            with server.lock:
                fault = server.faults(len(server.requests), name)
                server.requests.append((name, first, last))
                server.faulty[fault or "none"] += 1
        if fault == "unavailable":
            self.send_error(503)
            return
        if fault == "silent":
            server.ended.wait(30)
            return
        if fault == "whole":
            status, first, last = 200, 0, len(data) - 1
        part = bytearray(data[first : last + 1])
        if fault == "wrong":
            part[len(part) // 2] ^= 0x20
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if not body:
            return
        if fault == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        if fault == "slow":
            self.wfile.write(part[: len(part) // 2])
            server.ended.wait(0.5)
        self.wfile.write(part[len(part) // 2 if fault == "slow" else 0 :])
