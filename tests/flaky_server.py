"""A web server on this machine that serves bytes from memory, and fails as it is told to."""

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What may go wrong with an answer:
#   drop      half of the body, then the connection is closed
#   refuse    the connection is closed without an answer
#   stall     half of the body, then nothing until the server closes or `stalled` seconds pass
#   trickle   a byte now and then
#   truncate  a whole answer of half the bytes that were asked for
#   wrong     one bit of the body is another
#   whole     Range is ignored: status 200 and all bytes
#   gzip      the body is said to be compressed
#   a number  that status, e.g. "503"
FAULTS = ("drop", "refuse", "stall", "truncate", "wrong", "500", "503", "429")


@dataclass
class FlakyServer:
    """Serves `files` (path without the first slash -> bytes); `fault` (path) names what goes wrong with a request."""

    files: Mapping[str, bytes]
    fault: Callable[[str], str | None] = lambda path: None
    stalled: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict)  # of every answer
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, Range, fault
    address: str = ""  # http://127.0.0.1:port
    closing: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        return f"{self.address}/{path}"


def at_random(rate: float, seed: int, faults: tuple[str, ...] = FAULTS, most: int = 4) -> Callable[[str], str | None]:
    """Fail a share `rate` of all requests, seeded, but never more than `most` in a row."""
    draw, lock, row = random.Random(seed), threading.Lock(), [0]

    def fault(_: str) -> str | None:
        with lock:
            fails = draw.random() < rate and row[0] < most
            row[0] = row[0] + 1 if fails else 0
            return draw.choice(faults) if fails else None

    return fault


@contextmanager
def serve(files: Mapping[str, bytes], **options) -> Iterator[FlakyServer]:
    """Run a `FlakyServer` in a thread."""
    flaky = FlakyServer(files, **options)
    handler = type("Handler", (_Handler,), {"flaky": flaky})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    flaky.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield flaky
    finally:
        flaky.closing.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    flaky: FlakyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):  # the client had enough
            self.close_connection = True

    def _answer(self) -> None:
        path = urlsplit(self.path).path.lstrip("/")
        wanted, fault = self.headers.get("Range"), self.flaky.fault(path)
        self.flaky.requests.append((path, wanted, fault))
        if fault == "refuse":
            self.close_connection = True
            return
        status = int(fault) if fault and fault.isdigit() else 200 if path in self.flaky.files else 404
        if status != 200:
            self._send(status, b"no", {"Content-Length": "2"})
            return
        body, headers = self.flaky.files[path], {}
        if wanted and fault != "whole":
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            if first >= len(body):
                self._send(416, b"", {"Content-Length": "0"})
                return
            headers["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
            status, body = 206, body[first : last + 1]
        if fault == "truncate":
            body = body[: len(body) // 2]
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        headers["Content-Length"] = str(len(body))
        part = {"drop": len(body) // 2, "stall": len(body) // 2, "trickle": 0}.get(fault or "", len(body))
        self._send(status, body[:part], headers)
        if fault == "stall":
            self.flaky.closing.wait(self.flaky.stalled)
        while fault == "trickle" and part < len(body) and not self.flaky.closing.wait(0.02):
            self.wfile.write(body[part : part + 1])
            part += 1
        if fault in ("drop", "stall", "trickle"):
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, **self.flaky.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
