"""Outages: what is waited for, how long, and what is a failed row instead."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError

from raycap.errors import CredentialsError, EndpointError, NotFoundError, ObjectNotFoundError, ObjectUnreadableError
from raycap.storage import S3Options, Store, open_store, read_bytes
from raycap.storage.patience import Server, server_of
from tests.answering import Answer, answering, s3_error

REFUSED = EndpointConnectionError(endpoint_url="http://host")
TIMEOUT = ReadTimeoutError(endpoint_url="http://host")


def answered(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


class World:
    """A server's clock, which stands still but while somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        self.server = Server("http://host", clock=lambda: self.now, sleep=self.sleep)
        self.while_asleep: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        self.while_asleep()

    def call(self, *results: Exception | str, max_outage_s: float = 300.0, **settings: Any) -> str:
        """A request with these results; the last one stays."""
        remaining = list(results)

        def request() -> str:
            self.now += 1
            result = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            if isinstance(result, Exception):
                raise result
            return result

        return self.server.call(request, "cannot read", max_outage_s=max_outage_s, **settings)


@pytest.mark.parametrize("error", [REFUSED, TIMEOUT, answered(503, "SlowDown"), answered(429, ""), answered(502, "")])
def test_an_outage_is_waited_for(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    with caplog.at_level(logging.WARNING, "raycap"):
        assert world.call(*[error] * 8, "data") == "data"
    assert len(world.waits) == 8
    assert 0.25 <= world.waits[0] <= 0.5  # and twice as long each time, to 10 s
    assert all(5 <= wait <= 10 for wait in world.waits[5:])
    begin, end = caplog.messages
    assert "waiting up to 300 s" in begin
    assert end.startswith("http://host answers again, after")


def test_past_the_limit_it_is_given_up() -> None:
    world = World()
    with pytest.raises(EndpointError, match=r"http://host.*; tried for 6\d s") as caught:
        world.call(REFUSED, max_outage_s=60)
    assert caught.value.__cause__ is REFUSED
    assert 60 <= world.now - 1000 <= 62  # the last try begins at the limit


def test_all_threads_share_one_limit() -> None:
    world = World()

    def other_thread() -> None:
        world.while_asleep = lambda: None
        with pytest.raises(EndpointError, match="tried for 3"):
            world.call(REFUSED, max_outage_s=30)

    world.while_asleep = other_thread
    with pytest.raises(EndpointError, match="tried for 3"):
        world.call(REFUSED, max_outage_s=30)
    assert world.now - 1000 < 40


@pytest.mark.parametrize(
    "error",
    [
        answered(404, "NoSuchBucket"),
        answered(404, "NoSuchKey"),
        answered(403, "AccessDenied"),
        answered(400, "ExpiredToken"),
        answered(507, "XMinioStorageFull"),
        answered(501, "NotImplemented"),
    ],
)
def test_what_will_not_pass_is_not_waited_for(error: Exception) -> None:
    world = World()
    with pytest.raises(ClientError):
        world.call(error)
    assert world.waits == []


def test_without_patience_nothing_is_waited_for() -> None:
    world = World()
    with pytest.raises(EndpointConnectionError):
        world.call(REFUSED, max_outage_s=0)
    assert world.waits == []


class TestWhoseFaultItIs:
    """Of a request that comes with `other_request`, which looks whether the server can do anything else."""

    ERROR = answered(500, "InternalError")

    def test_of_the_object_if_another_request_succeeds(self) -> None:
        world = World()
        with pytest.raises(ClientError):
            world.call(self.ERROR, other_request=lambda: "fine")
        assert world.waits == []

    def test_of_the_object_if_the_other_is_answered_that_it_is_gone(self) -> None:
        world = World()
        with pytest.raises(ClientError, match="InternalError"):
            world.call(self.ERROR, other_request=raising(answered(404, "NoSuchKey")))

    def test_of_the_server_if_nothing_succeeds(self) -> None:
        world = World()
        assert world.call(*[self.ERROR] * 3, "data", other_request=raising(self.ERROR)) == "data"
        with pytest.raises(EndpointError, match="InternalError"):
            world.call(self.ERROR, other_request=raising(self.ERROR))

    def test_of_the_server_if_it_came_back_at_this_moment(self) -> None:
        world = World()
        assert world.call(self.ERROR, "data", other_request=lambda: "fine") == "data"
        assert world.waits == []

    def test_of_the_server_if_it_cannot_be_reached(self) -> None:
        world = World()
        assert world.call(REFUSED, "data", other_request=raising(AssertionError("is not asked"))) == "data"


def raising(error: Exception) -> Callable[[], object]:
    def request() -> object:
        raise error

    return request


# Through a store. The waits are random and here all 0.


@pytest.fixture
def no_waits(no_aws_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 0.0)
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)


def patient_store(endpoint_url: str, **settings: Any) -> Store:
    options = S3Options(endpoint_url=endpoint_url, anonymous=True, **{"max_attempts": 1, "max_outage_s": 60} | settings)
    return open_store("s3://bucket/", options)


LISTING = b"<ListBucketResult><Name>bucket</Name><Contents><Key>a</Key><Size>1</Size></Contents></ListBucketResult>"
CALLS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("a"),
    "read_versioned": lambda store: store.read_versioned("a"),
    "list": lambda store: [info.key for info in store.list()],
    "write": lambda store: store.write("a", b"1"),
    "write_if": lambda store: store.write_if("a", b"1", version=None),
    "exists": lambda store: store.exists("a"),
    "delete": lambda store: store.delete("a"),
}


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("name", CALLS)
def test_every_call_survives_an_outage(name: str) -> None:
    def answer(number: int, method: str, path: str) -> Answer:
        if number <= 7:
            return 503, {}, s3_error("ServiceUnavailable")
        return 200, {"ETag": '"e"'}, LISTING if "list-type" in path else b""

    with answering(answer) as server:
        result = CALLS[name](patient_store(server.endpoint_url))
        assert len(server.requests) >= 8
    assert result == {"list": ["a"], "exists": True, "read": b"", "read_versioned": (b"", "e"), "write_if": "e"}.get(
        name
    )


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("check", ["check_readable", "check_writable"])
def test_checks_do_not_wait(check: str) -> None:
    with answering(lambda *_: (503, {}, s3_error("ServiceUnavailable"))) as server, pytest.raises(EndpointError):
        getattr(patient_store(server.endpoint_url, max_outage_s=1e9), check)()
    with pytest.raises(EndpointError):
        getattr(patient_store("http://127.0.0.1:1", max_outage_s=1e9), check)()


@pytest.mark.usefixtures("no_waits")
def test_a_file_that_a_command_begins_with_is_not_waited_for() -> None:
    with pytest.raises(EndpointError):
        read_bytes("s3://bucket/a", S3Options(endpoint_url="http://127.0.0.1:1", anonymous=True, max_outage_s=1e9))


@pytest.mark.usefixtures("no_waits")
def test_one_bad_object_is_a_failed_row_even_if_nothing_else_is_read() -> None:
    def answer(_: int, __: str, path: str) -> Answer:
        if "list-type" in path:
            return 200, {}, LISTING
        return (500, {}, s3_error("InternalError")) if path.endswith("bad") else (200, {}, b"good")

    with answering(answer) as server:
        store = patient_store(server.endpoint_url, max_outage_s=1e9)
        with pytest.raises(ObjectUnreadableError, match="InternalError"):
            store.read("bad")  # nothing was read before: the server is asked for its listing
        assert store.read("good") == b"good"
        with pytest.raises(ObjectUnreadableError, match="InternalError"):
            store.read("bad")
        assert server.requests[-1] == ("GET", "/bucket/good")


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [(404, "NoSuchBucket", NotFoundError), (403, "InvalidAccessKeyId", CredentialsError), (404, "NoSuchKey", None)],
)
def test_lasting_errors_come_at_once(status: int, code: str, error: type[Exception] | None) -> None:
    with answering(lambda *_: (status, {}, s3_error(code))) as server:
        with pytest.raises(error or ObjectNotFoundError):
            patient_store(server.endpoint_url, max_outage_s=1e9).read("a")
        assert len(server.requests) == 1


@pytest.mark.usefixtures("no_waits")
def test_a_listing_goes_on_with_the_page_at_which_the_server_went_away() -> None:
    def page(key: str, token: str) -> bytes:
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>" if token else ""
        return (
            f"<ListBucketResult><Name>bucket</Name><Contents><Key>{key}</Key><Size>1</Size></Contents>{more}"
            "</ListBucketResult>"
        ).encode()

    def answer(number: int, _: str, path: str) -> Answer:
        if number in (2, 3, 5):
            return 500, {}, s3_error("InternalError")
        return 200, {}, page("3", "") if "=t2" in path else page("2", "t2") if "=t1" in path else page("1", "t1")

    with answering(answer) as server:
        assert [info.key for info in patient_store(server.endpoint_url).list()] == ["1", "2", "3"]
        assert len(server.requests) == 6


@pytest.mark.usefixtures("no_aws_settings")
def test_stores_of_one_server_know_the_same() -> None:
    here = [S3Options(endpoint_url="http://host:1", max_attempts=number) for number in (1, 2)]
    assert server_of(here[0]) is server_of(here[1])
    assert server_of(here[0]) is not server_of(S3Options(endpoint_url="http://host:2"))


@contextmanager
def stalling(num_stalls: int) -> Iterator[str]:
    """A server that sends half of the body and then nothing more, so often; then it sends all."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                connection, _ = listener.accept()
                held.append(connection)
                connection.recv(65536)
                body = b"da" if len(held) <= num_stalls else b"data"
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n" + body)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in (listener, *held):
            each.close()


@pytest.mark.usefixtures("no_waits")
def test_a_body_that_stalls_is_fetched_again() -> None:
    with stalling(2) as endpoint_url:
        store = patient_store(endpoint_url, max_attempts=3, read_timeout_s=0.1, max_outage_s=0)
        assert store.read("a") == b"data"
    with stalling(3) as endpoint_url, pytest.raises(ObjectUnreadableError, match="broke off"):
        patient_store(endpoint_url, max_attempts=3, read_timeout_s=0.1, max_outage_s=0).read("a")
