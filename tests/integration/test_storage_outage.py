"""Stores survive that a real S3 server is away for a while: refused and broken connections, through a TCP proxy."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import pytest

from raycap.errors import EndpointError
from raycap.storage import S3Options, open_store, patience
from tests.s3 import S3Server

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_aws_settings")]


class Proxy:
    """Passes bytes on to the server. `stop` breaks all connections and refuses new ones, `start` ends that."""

    def __init__(self, endpoint_url: str) -> None:
        parts = urlsplit(endpoint_url)
        self._server = (parts.hostname or "", parts.port or 0)
        self._port = 0
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._run(self._accept, self._listener)

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        while self._open:
            with suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def _run(self, target: object, *args: socket.socket) -> None:
        thread = threading.Thread(target=target, args=args)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # stopped
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._server)
                self._open += [client, server]
                self._run(self._pass_on, client, server)
                self._run(self._pass_on, server, client)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        source.close()


@contextmanager
def proxy_of(server: S3Server) -> Iterator[Proxy]:
    proxy = Proxy(server.endpoint_url)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(patience, "_MAX_WAIT_S", 0.2)
    return s3_server.make_bucket()


class Noticed(logging.Handler):
    """Tells when the outage was noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.outage = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if "for it to pass" in self.messages[-1]:
            self.outage.set()


@pytest.fixture
def noticed() -> Iterator[Noticed]:
    handler = Noticed()
    logger = logging.getLogger("raycap.storage.patience")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def test_reads_go_on_when_the_server_is_back(s3_server: S3Server, bucket: str, noticed: Noticed) -> None:
    keys = [f"{number:03d}" for number in range(200)]
    with proxy_of(s3_server) as proxy:
        store = open_store(f"s3://{bucket}/", S3Options(endpoint_url=proxy.endpoint_url, max_attempts=2))
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda key: store.write(key, key.encode() * 1000), keys))
            middle = threading.Event()

            def read(key: str) -> bytes:
                if key == keys[100]:
                    middle.set()
                return store.read(key)

            results = [threads.submit(read, key) for key in keys]
            assert middle.wait(60)
            proxy.stop()
            assert noticed.outage.wait(60)
            assert not all(result.done() for result in results)
            proxy.start()
            assert [result.result() for result in results] == [key.encode() * 1000 for key in keys]
    assert sum("for it to pass" in message for message in noticed.messages) == 1
    assert sum("answers again" in message for message in noticed.messages) == 1


def test_a_listing_and_writes_go_on_when_the_server_is_back(s3_server: S3Server, bucket: str, noticed: Noticed) -> None:
    keys = [f"{number:04d}" for number in range(1100)]
    with proxy_of(s3_server) as proxy, ThreadPoolExecutor(8) as threads:
        store = open_store(f"s3://{bucket}/", S3Options(endpoint_url=proxy.endpoint_url, max_attempts=2))
        list(threads.map(lambda key: store.write(key, b""), keys))
        version = store.write_if(".lock", b"1", version=None)
        listing = store.list()
        found = [next(listing).key]
        proxy.stop()
        rest = threads.submit(lambda: [info.key for info in listing])
        write = threads.submit(store.write, "9999", b"")
        renewal = threads.submit(store.write_if, ".lock", b"2", version=version)
        assert noticed.outage.wait(60)
        proxy.start()
        found += rest.result()
        write.result()
        new_version = renewal.result()
        assert store.read_versioned(".lock") == (b"2", new_version)
        assert sorted({*found} - {".lock", "9999"}) == keys
        assert len(found) == len(set(found))


def test_a_server_that_stays_away(s3_server: S3Server, bucket: str) -> None:
    with proxy_of(s3_server) as proxy:
        options = S3Options(endpoint_url=proxy.endpoint_url, max_attempts=1, max_outage_s=0.5)
        store = open_store(f"s3://{bucket}/", options)
        store.write("a", b"1")
        proxy.stop()
        for call in (lambda: store.read("a"), lambda: list(store.list()), lambda: store.write("a", b"2")):
            with pytest.raises(EndpointError, match=r"refuses the connection.*; tried for \d+ s"):
                call()
        proxy.start()
        assert store.read("a") == b"1"
