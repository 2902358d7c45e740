"""The fault-injecting proxy does to requests what it says: other tests rest on it."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from raycap.errors import EndpointError
from raycap.storage import S3Options, Store, open_store
from tests.faulty_s3 import Faults, FaultyS3
from tests.s3 import S3Server

pytestmark = pytest.mark.integration

KEY, DATA = "a b/ü%20+.bin", b"0123456789" * 100


@pytest.fixture
def bucket(s3_server: S3Server, no_aws_settings: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with one object; this process has the keys to it."""
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.make_bucket()
    s3_server.client().put_object(Bucket=bucket, Key=KEY, Body=DATA)
    return bucket


def store_at(proxy: FaultyS3, bucket: str) -> Store:
    return open_store(
        f"s3://{bucket}/", S3Options(endpoint_url=proxy.endpoint_url, read_timeout_s=1, max_attempts=2, max_outage_s=0)
    )


@pytest.fixture
def signed_url(s3_server: S3Server, bucket: str) -> Iterator[str]:
    url: str = s3_server.client().generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": KEY})
    parts = urlsplit(url)
    yield f"{parts.path}?{parts.query}"


def get(proxy: FaultyS3, target: str, host: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=1)
    try:
        connection.request("GET", target, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("fault", "error"),
    [("reset", ConnectionResetError), ("truncate", http.client.IncompleteRead), ("stall", TimeoutError)],
)
def test_each_fault_is_what_its_name_says(
    s3_server: S3Server, signed_url: str, fault: str, error: type[Exception]
) -> None:
    host = urlsplit(s3_server.endpoint_url).netloc
    with FaultyS3(s3_server.endpoint_url, faults=Faults(**{fault: 1.0}), attempts_with_faults=1) as proxy:
        with pytest.raises(error):
            get(proxy, signed_url, host)
        assert get(proxy, signed_url, host) == (200, DATA)
        assert proxy.injected == {fault: 1}


def test_slow_down_is_an_answer_of_s3(s3_server: S3Server, signed_url: str) -> None:
    host = urlsplit(s3_server.endpoint_url).netloc
    with FaultyS3(s3_server.endpoint_url, faults=Faults(slow_down=1.0), attempts_with_faults=2) as proxy:
        for _ in range(2):
            status, body = get(proxy, signed_url, host)
            assert status == 503
            assert b"<Code>SlowDown</Code>" in body
        assert get(proxy, signed_url, host) == (200, DATA)


def test_signed_requests_pass_and_kinds_are_told_apart(s3_server: S3Server, bucket: str) -> None:
    with FaultyS3(s3_server.endpoint_url, faults=Faults(slow_down=1.0), kinds=frozenset()) as proxy:
        store = store_at(proxy, bucket)
        assert store.read(KEY) == DATA
        store.write("new/ü.bin", DATA)
        assert [info.key for info in store.list()] == [KEY, "new/ü.bin"]
        store.delete("new/ü.bin")
        assert proxy.requests == {"get": 1, "put": 1, "list": 1, "delete": 1}
        assert proxy.gets(f"/{bucket}/a") == [1]


def test_write_whose_answer_is_lost_was_done(s3_server: S3Server, bucket: str) -> None:
    faults, kinds = Faults(truncate=1.0), frozenset({"put"})
    with FaultyS3(s3_server.endpoint_url, faults=faults, kinds=kinds) as proxy:
        with pytest.raises(EndpointError):
            store_at(proxy, bucket).write("new.bin", DATA)
        assert proxy.injected == {"truncate": 2}
    assert s3_server.client().get_object(Bucket=bucket, Key="new.bin")["Body"].read() == DATA


def test_down_refuses_and_up_goes_on_at_the_same_address(s3_server: S3Server, bucket: str) -> None:
    with FaultyS3(s3_server.endpoint_url, faults=Faults()) as proxy:
        store = store_at(proxy, bucket)
        assert store.read(KEY) == DATA
        for _ in range(2):
            proxy.down()
            with pytest.raises(EndpointError, match="refuses the connection"):
                store.read(KEY)
            proxy.up()
            assert store.read(KEY) == DATA
