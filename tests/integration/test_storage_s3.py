"""S3Store against a real S3 server."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from raycap.errors import (
    CredentialsError,
    ImageTooLargeError,
    NotFoundError,
    ObjectAccessDeniedError,
    ObjectNotFoundError,
    StorageError,
)
from raycap.storage import ObjectInfo, S3Options, Span, Store, open_store, read_bytes, s3, write_bytes
from tests.s3 import S3Keys, S3Server

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_aws_settings")]

# SeaweedFS keeps objects as files: it refuses `.` and `..`, takes `//` for `/`, drops the content of `a/`, and allows
# 255 bytes for each part of a key. So those are not here.
ODD_KEYS = [
    " leading and trailing ",
    "ünïcödé/日本語/😀.jpg",
    "100%.jpg",
    "a%20b.jpg",
    "a%2Fb.jpg",
    "a+b.jpg",
    "a b+c%2B.jpg",
    "a#b?c=d&e.jpg",
    ".hidden/.file",
    "new\nline\r\n.jpg",
    "tab\t\x01quote\"'.jpg",
    "<xml>&amp;.jpg",
    "/".join(["k" * 200] * 5)[:1000],
]


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, with the owner's keys and the server's address in the environment."""
    use(s3_server, s3_server.owner, monkeypatch)
    return s3_server.make_bucket()


def use(server: S3Server, keys: S3Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env(keys).items():
        monkeypatch.setenv(name, value)


def fill(store: Store, keys: list[str]) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.write(key, key.encode()), keys))


def test_listing_goes_on_after_the_first_thousand(bucket: str) -> None:
    keys = [f"{number:05d}.jpg" for number in range(1234)]
    store = open_store(f"s3://{bucket}/many")
    fill(store, keys)
    infos = list(store.list())
    assert [info.key for info in infos] == keys
    assert infos[7].uri == f"s3://{bucket}/many/00007.jpg"
    assert infos[7].size == 9
    assert len({info.etag for info in infos}) == len(keys)
    assert '"' not in infos[7].etag
    assert [info.key for info in store.list("0012")] == keys[120:130]


def test_odd_keys_round_trip(bucket: str) -> None:
    for location in (f"s3://{bucket}", f"s3://{bucket}/odd prefix é%20+/"):
        store = open_store(location)
        fill(store, ODD_KEYS)
        infos = [info for info in store.list() if not info.key.startswith("odd prefix")]
        assert {info.key for info in infos} == set(ODD_KEYS)
        for info in infos:
            assert store.read(info.key) == info.key.encode()
            assert read_bytes(info.uri) == info.key.encode()
            assert store.uri(info.key) == info.uri
            assert [again.uri for again in open_store(info.uri).list()] == [info.uri]
            assert store.exists(info.key)
            store.delete(info.key)
            assert not store.exists(info.key)


def test_a_prefix_is_a_folder(bucket: str) -> None:
    fill(open_store(f"s3://{bucket}"), ["photos/1", "photos/deep/2", "photos-old/1", "photos.txt"])
    for location in (f"s3://{bucket}/photos", f"s3://{bucket}/photos/"):
        store = open_store(location)
        assert [info.key for info in store.list()] == ["1", "deep/2"]
        assert [info.key for info in store.list("deep/")] == ["deep/2"]
        assert [info.key for info in store.list_span(Span(level=True))] == ["1"]
        assert store.read("deep/2") == b"photos/deep/2"
        store.check_readable()
        store.check_writable()
        assert len(list(store.list())) == 2


def test_a_prefix_that_is_an_object_is_that_object(bucket: str) -> None:
    fill(open_store(f"s3://{bucket}"), ["a/photo.jpg", "a/photo.jpg.bak"])
    store = open_store(f"s3://{bucket}/a/photo.jpg")
    (info,) = store.list()
    assert info == ObjectInfo("photo.jpg", f"s3://{bucket}/a/photo.jpg", 11, info.etag, info.storage_class)
    assert pickle.loads(pickle.dumps(store)).read("photo.jpg") == b"a/photo.jpg"
    assert open_store(f"s3://{bucket}/a/photo.jpg").read("photo.jpg") == b"a/photo.jpg"
    store.check_readable()
    with pytest.raises(StorageError, match="not a folder"):
        store.check_writable()


def test_folder_markers_are_objects_but_for_that_of_the_root(s3_server: S3Server, bucket: str) -> None:
    s3_server.client().put_object(Bucket=bucket, Key="empty/", Body=b"")
    s3_server.client().put_object(Bucket=bucket, Key="full/", Body=b"")
    open_store(f"s3://{bucket}/full").write("1", b"1")
    infos = list(open_store(f"s3://{bucket}").list())
    assert [(info.key, info.size) for info in infos] == [("empty/", 0), ("full/", 0), ("full/1", 1)]
    assert [info.key for info in open_store(f"s3://{bucket}/full").list()] == ["1"]
    assert list(open_store(f"s3://{bucket}/empty").list()) == []


def test_reading(bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    store.write("a", b"12345")
    store.write("a", b"123456")
    store.write("empty", b"")
    assert store.read("a", max_bytes=6) == b"123456"
    assert store.read("empty", max_bytes=0) == b""
    with pytest.raises(ImageTooLargeError, match="6 bytes, more than the limit of 5"):
        store.read("a", max_bytes=5)
    with pytest.raises(ObjectNotFoundError):
        store.read("b")
    with pytest.raises(NotFoundError):
        read_bytes(f"s3://{bucket}/b")
    store.delete("b")


def test_a_big_object_goes_in_parts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 20 * 1024 * 1024)
    data = os.urandom(21 * 1024 * 1024)
    write_bytes(f"s3://{bucket}/big", data)
    (info,) = open_store(f"s3://{bucket}").list()
    assert "-" in info.etag  # S3's mark of an upload in parts
    assert read_bytes(f"s3://{bucket}/big") == data


@pytest.mark.parametrize("method", ["check_readable", "check_writable"])
def test_checks_name_the_one_thing_that_is_wrong(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def message(location: str, keys: S3Keys, error: type[StorageError]) -> str:
        use(s3_server, keys, monkeypatch)
        with pytest.raises(error) as caught:
            getattr(open_store(location), method)()
        assert type(caught.value) is error
        for secret in (keys.access_key, keys.secret_key):
            assert secret not in str(caught.value)
        return str(caught.value)

    for location in (f"s3://{bucket}", f"s3://{bucket}/prefix"):
        assert "AWS_ACCESS_KEY_ID" in message(location, S3Keys(), CredentialsError)
        wrong_secret = S3Keys(access_key=s3_server.access_key)
        assert "AWS_SECRET_ACCESS_KEY" in message(location, wrong_secret, CredentialsError)
        assert "access denied" in message(location, s3_server.outsider, CredentialsError)
    for location in ("s3://raycap-no-such-bucket", "s3://raycap-no-such-bucket/prefix"):
        assert "no such bucket" in message(location, s3_server.owner, NotFoundError)


def test_keys_that_may_only_read(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"s3://{bucket}/photos")
    store.write("1", b"1")
    use(s3_server, s3_server.reader, monkeypatch)
    store.check_readable()
    assert store.read("1") == b"1"
    with pytest.raises(CredentialsError, match="access denied"):
        store.check_writable()
    with pytest.raises(CredentialsError, match="access denied"):
        store.write("2", b"2")
    use(s3_server, s3_server.outsider, monkeypatch)
    with pytest.raises(ObjectAccessDeniedError):
        store.read("1")
    with pytest.raises(CredentialsError):
        list(store.list())


def test_nothing_below_a_prefix(bucket: str) -> None:
    open_store(f"s3://{bucket}").check_readable()
    with pytest.raises(NotFoundError, match="nothing below this prefix"):
        open_store(f"s3://{bucket}/typo").check_readable()


def test_an_unpickled_store_works_in_another_process(bucket: str) -> None:
    store = open_store(f"s3://{bucket}/photos", S3Options(max_attempts=2))
    store.write("1", b"from here")
    code = "import pickle, sys; sys.stdout.buffer.write(pickle.load(sys.stdin.buffer).read('1'))"
    output = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True)
    assert output.stdout == b"from here"


def test_one_store_serves_many_threads(bucket: str) -> None:
    store = open_store(f"s3://{bucket}/photos")
    keys = [f"{number}" for number in range(200)]
    fill(store, keys)
    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(store.read, keys)) == [key.encode() for key in keys]
