"""A file server on 127.0.0.1 with ranges, ETags and faults on demand; it counts what it was asked for."""

from __future__ import annotations

import functools
import http.server
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

# From "endless" on: much more than was asked for.
Fault = Literal[
    "unavailable", "cut", "wrong", "slow", "silent", "whole", "endless", "endless range", "longer", "encoded", "elsewhere"
]  # fmt: skip
_MUCH = bytes(1 << 20)


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
    disable_nagle_algorithm = True  # else each reply waits 40 ms between its headers and its body

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server = self.server
        name = self.path.strip("/")
        path = server.folder / name
        if not (path.is_file() or name.endswith("endless")):
            self.send_error(404)
            return
        if name.endswith("endless"):
            self.send_endless(200)
            return
        size = path.stat().st_size
        status, first, last = 200, 0, size - 1
        fault: Fault | None = None
        if body and "Range" in self.headers:
            begin, end = self.headers["Range"].removeprefix("bytes=").split("-")
            status, first, last = 206, int(begin), min(int(end), size - 1)
            with server.lock:
                server.requests.append((name, first, last))
                fault = server.faults(len(server.requests) - 1, name)
                server.faulty[fault or "none"] += 1
        if fault == "unavailable":
            self.send_error(503)
            return
        if fault == "silent":
            server.ended.wait(30)
            return
        if fault in ("endless", "endless range"):
            self.send_endless(200 if fault == "endless" else 206)
            return
        if fault == "elsewhere":
            self.send_response(302)
            self.send_header("Location", "/endless")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "whole":
            status, first, last = 200, 0, size - 1
        with path.open("rb") as file:
            file.seek(first)
            part = bytearray(file.read(last + 1 - first if body else 0))
        if fault == "wrong":
            part[len(part) // 2] ^= 0x20
        self.send_response(status)
        if fault == "encoded":
            self.send_header("Content-Encoding", "gzip")
            part = bytearray(bomb())
        if fault == "longer":
            part += bytes(1 << 28)
        self.send_header("Content-Length", str(len(part) if body else size))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_ino}-{path.stat().st_mtime_ns}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
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

    def send_endless(self, status: int) -> None:
        """Chunks of 1 MiB until the client goes away."""
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not self.server.ended.is_set():
            self.wfile.write(b"%x\r\n%b\r\n" % (len(_MUCH), _MUCH))


@functools.cache
def bomb() -> bytes:
    """512 MiB of zeros, by gzip."""
    packer = zlib.compressobj(1, wbits=31)
    return b"".join([*(packer.compress(_MUCH) for _ in range(512)), packer.flush()])
