"""A proxy in front of an S3 server that does what networks and busy servers do.

    with FaultyS3(server.endpoint_url, faults=Faults(slow_down=0.05, reset=0.02)) as proxy:
        ... env=server.env() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint_url}
        proxy.down()     refuses connections and cuts those there are
        proxy.up()

Requests pass unchanged, with their Host header, which their signatures cover. What happens to a request follows from
the seed, its kind, the key (without the bucket, which tests name at random) and how often it was made, not from the
order in which requests come.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from urllib.parse import urlsplit

_SLOW_DOWN = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_NOT_PASSED_ON = {"connection", "expect", "keep-alive", "proxy-connection", "transfer-encoding"}
_UPSTREAM_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """Probabilities for each request; at most one of them comes true."""

    slow_down: float = 0.0
    """503 with S3's error document; the server does not hear of the request."""
    reset: float = 0.0
    """The connection is reset before any answer; the server does not hear of the request."""
    truncate: float = 0.0
    """Headers with the full Content-Length and half of the body, then the connection is closed; without a body, no
    answer at all. The server has done what was asked."""
    stall: float = 0.0
    """As `truncate`, but the connection stays open, until the client gives up."""

    def draw(self, number: float) -> str | None:
        """The fault that a number from 0 to 1 stands for."""
        for field in fields(self):
            number -= getattr(self, field.name)
            if number < 0:
                return field.name
        return None


class FaultyS3:
    """The proxy; a context manager. `requests` counts what came, `injected` the faults, `attempts` the requests for
    each (kind, path)."""

    def __init__(
        self,
        target_url: str,
        *,
        faults: Faults,
        kinds: frozenset[str] = frozenset({"get"}),
        attempts_with_faults: int | None = None,
        seed: int = 0,
    ) -> None:
        """Faults befall requests of these `kinds` (see `kind_of`): every attempt, or only the first ones."""
        parts = urlsplit(target_url)
        assert parts.hostname and parts.port
        self.target = (parts.hostname, parts.port)
        self.faults = faults
        self.kinds = kinds
        self.attempts_with_faults = attempts_with_faults
        self.seed = seed
        self.requests: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.attempts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._listening = False
        self._listener = self._bound(0)
        self.port: int = self._listener.getsockname()[1]

    @property
    def endpoint_url(self) -> str:
        """Where clients connect to, also while it is down."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultyS3:
        self.up()
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()
        self._listener.close()

    def up(self) -> None:
        """Accept connections."""
        self._listening = True
        self._listener.listen(1024)
        threading.Thread(target=self._accept, args=(self._listener,), name="faulty-s3", daemon=True).start()

    def down(self) -> None:
        """Refuse connections from now on, and cut those there are. The port stays ours: bound, but not listening."""
        with self._lock:
            self._listening = False
            clients = list(self._clients)
        _cut(self._listener)
        self._listener = self._bound(self.port)
        for client in clients:
            _cut(client)

    def gets(self, folder: str) -> list[int]:
        """How often each object was asked for whose path starts with `folder` (`/bucket/prefix/`)."""
        with self._lock:
            return [n for (kind, path), n in self.attempts.items() if kind == "get" and path.startswith(folder)]

    def next_fault(self, kind: str, path: str) -> str | None:
        """Count a request; what is to happen to it."""
        with self._lock:
            self.requests[kind] += 1
            self.attempts[kind, path] += 1
            attempt = self.attempts[kind, path]
            if kind not in self.kinds or attempt > (self.attempts_with_faults or attempt):
                return None
            _, _, key = path.lstrip("/").partition("/")
            fault = self.faults.draw(random.Random(f"{self.seed} {kind} {key} {attempt}").random())
            if fault:
                self.injected[fault] += 1
            return fault

    @staticmethod
    def _bound(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed: down
            while True:
                client, address = listener.accept()
                threading.Thread(target=self._handle, args=(client, address), name="faulty-s3", daemon=True).start()

    def _handle(self, client: socket.socket, address: tuple[str, int]) -> None:
        with self._lock:
            accepted = self._listening
            if accepted:
                self._clients.add(client)
        try:
            with suppress(OSError, http.client.HTTPException):  # either side may go at any time
                if accepted:
                    _Connection(client, address, self)
        finally:
            with self._lock:
                self._clients.discard(client)
            client.close()


def _cut(connection: socket.socket) -> None:
    """Close a socket that other threads wait on."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def kind_of(method: str, target: str) -> str:
    """get, put, head or delete of an object; list, or other, for requests to a bucket."""
    parts = urlsplit(target)
    if parts.path.strip("/").count("/"):
        return method.lower()
    return "list" if "list-type=2" in parts.query else "other"


class _Connection(BaseHTTPRequestHandler):
    """One client's connection: its requests go to the server, one after another, over one connection of its own."""

    protocol_version = "HTTP/1.1"

    def __init__(self, client: socket.socket, address: tuple[str, int], proxy: FaultyS3) -> None:
        self.proxy = proxy
        self.upstream = http.client.HTTPConnection(*proxy.target, timeout=_UPSTREAM_TIMEOUT_S)
        try:
            super().__init__(client, address, proxy)  # type: ignore[arg-type]  # it only keeps it
        finally:
            self.upstream.close()

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.next_fault(kind_of(self.command, self.path), urlsplit(self.path).path)
        if fault == "slow_down":
            self._send(503, [("Content-Type", "application/xml"), ("Content-Length", str(len(_SLOW_DOWN)))], _SLOW_DOWN)
            return
        if fault == "reset":
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            return
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _NOT_PASSED_ON:
                self.upstream.putheader(name, value)
        self.upstream.endheaders(body)
        answer = self.upstream.getresponse()
        data = answer.read()
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _NOT_PASSED_ON]
        if answer.getheader("Content-Length") is None:
            headers.append(("Content-Length", str(len(data))))
        if fault is None:
            self._send(answer.status, headers, data)
            return
        if data:
            self._send(answer.status, headers, data[: len(data) // 2])
        if fault == "stall":
            self.connection.recv(1)  # nothing comes but the client's end of the connection
        self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def _send(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
