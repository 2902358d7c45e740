"""Spans, listings that go on, and conditional writes, on a server with its own order of keys (SeaweedFS)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from raycap.storage import Anywhere, S3Options, Span, Store, open_store
from tests.integration.test_storage_s3 import fill
from tests.s3 import S3Server

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_aws_settings")]

# "é", "ｚ", "t" and "t/u" are objects and folders.
KEYS = [
    *["a-b", "a/b", "a/b2/c", "a.b", "a/z", "a0", "a b/c", "a-b.d/x", "A/x", "d/e/f/g", "d/e/f-1", "d/e.x", "d-1/x"],
    *[
        "é/x",
        "é/y/z",
        "é",
        "é-b",
        "é.c",
        "日本/1.jpg",
        "ｚ",
        "ｚ/1",
        "😀",
        "t",
        "t/u",
        "t/u/v",
    ],  # objects that are folders
]
MARKERS = ["full/", "empty/", "d/e/"]


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    return s3_server.make_bucket()


def put_in_turn(s3_server: S3Server, bucket: str, keys: list[str]) -> None:
    """Not at once: SeaweedFS may lose an object that is a folder, or what is in it, where both come together."""
    client = s3_server.client()
    for key in keys:
        client.put_object(Bucket=bucket, Key=key, Body=b"")


def listed(store: Store, span: Span, after: str = "") -> list[str]:
    return [info.key for info in store.list_span(span, after=after)]


def test_a_listing_goes_on_after_any_key(s3_server: S3Server, bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    put_in_turn(s3_server, bucket, [*KEYS, *MARKERS, "full/1"])
    whole = [info.key for info in store.list()]
    assert sorted(whole) == sorted([*KEYS, *MARKERS, "full/1"])
    assert whole != sorted(whole)  # else this would not be the server to test with
    for number, key in enumerate(whole):
        assert listed(store, Span(), after=key) == whole[number + 1 :], key
    for span in (Span("a/"), Span("a"), Span("d/", level=True), Span("é/"), Span(level=True), Span("full/")):
        part = listed(store, span)
        assert part
        for number, key in enumerate(part):
            assert listed(store, span, after=key) == part[number + 1 :], (span, key)


def test_spans_are_disjoint_and_the_whole(s3_server: S3Server, bucket: str) -> None:
    fill(open_store(f"s3://{bucket}"), [f"many/{number % 3}/{number:04d}" for number in range(1100)])
    put_in_turn(s3_server, bucket, KEYS + MARKERS)
    for location in (f"s3://{bucket}", f"s3://{bucket}/many"):
        store = open_store(location)
        whole = sorted(info.key for info in store.list())
        spans = store.split(4)
        assert len(spans) >= 3
        assert sorted(key for span in spans for key in listed(store, span)) == whole
        assert store.split(1) == [Span()]


def test_of_many_conditional_writes_one_succeeds(bucket: str) -> None:
    store = open_store(f"s3://{bucket}/out")
    version = None
    with ThreadPoolExecutor(16) as threads:
        for content in (b"first", b"second", b"third"):
            tries = [
                threads.submit(store.write_if, "lock", content + str(number).encode(), version=version)
                for number in range(16)
            ]
            versions = [each for each in (one.result() for one in tries) if each is not None]
            assert len(versions) == 1
            version = versions[0]
            found = store.read_versioned("lock")
            assert found is not None
            assert found[0].startswith(content)
            assert found[1] == version
    store.delete("lock")
    assert store.read_versioned("lock") is None
    assert store.write_if("lock", b"", version=version) is None
    assert not store.exists("lock")


def test_anywhere_reads_what_listings_name(s3_server: S3Server, bucket: str) -> None:
    other = s3_server.make_bucket()
    for name in (bucket, other):
        open_store(f"s3://{name}/a").write("b c/é%20", name.encode())
    anywhere = Anywhere(S3Options())
    for name in (bucket, other):
        (info,) = open_store(f"s3://{name}").list()
        assert anywhere.read(info.uri) == name.encode()
