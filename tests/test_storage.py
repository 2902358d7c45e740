"""Local stores, addresses and options; S3 failures, by a local HTTP server that answers what it is told to."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raycap.errors import (
    ConfigurationError,
    CredentialsError,
    EndpointError,
    ImageTooLargeError,
    NotFoundError,
    ObjectAccessDeniedError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    RaycapError,
    StorageError,
)
from raycap.storage import (
    ObjectInfo,
    S3Options,
    S3Store,
    Span,
    Store,
    is_s3,
    open_store,
    read_bytes,
    write_bytes,
)
from raycap.storage.client import _session_and_address, s3_client
from tests.answering import Answer, answering, s3_error

ACCESS_KEY = "AKIATESTACCESSKEY"
SECRET_KEY = "very-secret-key-of-the-tests"
ODD_KEYS = [
    "with space.jpg",
    " leading and trailing ",
    "ünïcödé/日本語/😀.jpg",
    "100%.jpg",
    "a%20b.jpg",
    "a+b.jpg",
    "a#b?c=d&e.jpg",
    ".hidden/.file",
    "new\nline.jpg",
    "tab\tquote\"'.jpg",
    "<xml>&amp;.jpg",
    "/".join(["k" * 200] * 5),
]


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


# Addresses


def test_open_store_by_scheme(tmp_path: Path) -> None:
    assert isinstance(open_store("s3://bucket/a"), S3Store)
    assert open_store(tmp_path).location == str(tmp_path)
    assert open_store(f"file://{tmp_path}/a%20b").location == f"{tmp_path}/a b"
    assert open_store(f"{tmp_path}/x/../y/").location == f"{tmp_path}/y"
    assert is_s3("s3://b")
    assert not is_s3("/s3")


@pytest.mark.parametrize(
    ("location", "hint"),
    [
        ("", "s3://bucket/prefix"),
        ("s3:/bucket/a", "type s3://bucket/a"),
        ("s3:bucket", "type s3://bucket"),
        ("S3://bucket", "type s3://bucket"),
        ("s3a://bucket/a", "type s3://bucket/a"),
        ("s3://", "without a bucket"),
        ("s3:///key", "without a bucket"),
        ("s3://localhost:9000/bucket", "endpoint URL"),
        ("s3://buck et/a", "no bucket name"),
        ("gs://bucket/a", "storage.googleapis.com"),
        ("https://bucket.s3.amazonaws.com/a", "endpoint URL"),
        ("ftp://host/a", "not supported"),
        ("file://host/a", "file:///"),
        ("a\0b", "NUL"),
    ],
)
def test_open_store_says_what_to_type(location: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=hint):
        open_store(location)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_store("https://user:hunter2@host/bucket?X-Amz-Signature=abc123")
    assert "hunter2" not in str(caught.value)
    assert "abc123" not in str(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        S3Options(endpoint_url="http://user:hunter2@host")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"endpoint_url": "localhost:9000"},
        {"endpoint_url": "http://"},
        {"endpoint_url": "http://host:port"},
        {"endpoint_url": "http://host/bucket"},
        {"connect_timeout_s": 0},
        {"read_timeout_s": -1},
        {"max_attempts": 0},
        {"max_outage_s": -1},
    ],
)
def test_options_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        S3Options(**settings)


def test_importing_storage_imports_no_heavy_library() -> None:
    heavy = {"boto3", "botocore", "pyarrow", "ray", "torch"}
    code = f"import sys, raycap.storage; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# Local directories


def test_local_round_trip_of_odd_keys(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for key in ODD_KEYS:
        store.write(key, key.encode())
    infos = list(store.list())
    assert [info.key for info in infos] == sorted(ODD_KEYS, key=str.encode)
    for info in infos:
        assert store.read(info.key) == info.key.encode()
        assert read_bytes(info.uri) == info.key.encode()
        assert info.uri == store.uri(info.key)
        assert info.size == len(info.key.encode())
        assert store.exists(info.key)
    assert pickle.loads(pickle.dumps(store)).read(ODD_KEYS[0]) == ODD_KEYS[0].encode()


def test_local_keys_come_in_byte_order_like_those_of_s3(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    wanted = ["photos", "photos-old/1", "photos.txt", "photosé", "x/a-b", "x/a/1", "x/a/2", "x/a0", "é", "ｚ", "😀"]
    for key in reversed(wanted):
        if key != "photos":
            store.write(key, b"")
    assert keys(store) == wanted[1:]
    assert keys(store, "photos") == wanted[1:4]
    assert keys(store, "x/a") == wanted[4:8]
    assert keys(store, "x/a/") == wanted[5:7]
    assert keys(store, "nothing/here/") == []
    assert keys(store, "../") == []
    level = Span("x/", level=True)
    assert [info.key for info in store.list_span(level)] == ["x/a-b", "x/a0"]


def test_local_links_are_followed_but_never_round(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"1")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert keys(open_store(tmp_path)) == ["a/1.jpg", "b/1.jpg"]


def test_local_deepest_possible_s3_key(tmp_path: Path) -> None:
    key = "d/" * 511 + "ab"
    open_store(tmp_path).write(key, b"deep")
    assert keys(open_store(tmp_path)) == [key]


def test_local_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"latin")
    store = open_store(tmp_path)
    (info,) = store.list()
    assert info.key == "caf\\xe9.jpg"
    assert info.key.encode()
    assert store.read(info.key) == b"latin"
    assert read_bytes(info.uri) == b"latin"


def test_local_single_file(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(b"1")
    (tmp_path / "two.jpg").write_bytes(b"2")
    store = open_store(tmp_path / "one.jpg")
    (info,) = store.list()
    assert info == ObjectInfo("one.jpg", f"{tmp_path}/one.jpg", 1, info.etag)
    assert store.read("one.jpg") == b"1"
    assert keys(store, "t") == []
    store.check_readable()
    with pytest.raises(StorageError, match="is a file"):
        store.check_writable()


def test_local_etag_changes_with_the_content(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("a", b"old")
    (before,) = store.list()
    os.utime(tmp_path / "a", ns=(1, 1))
    (after,) = store.list()
    assert before.etag != after.etag
    assert after.etag == "3-1"


def test_local_read_errors(tmp_path: Path) -> None:
    store = open_store(tmp_path / "data")
    store.write("a/b", b"12345")
    (tmp_path / "outside").write_bytes(b"secret")
    os.mkfifo(tmp_path / "data" / "pipe")
    for key in [
        "",
        "a",
        "a/",
        "a/b/c",
        "missing",
        "../outside",
        "/etc/hostname",
        "a/../../outside",
        "pipe",
        "k" * 300,
        "a\0b",
    ]:
        with pytest.raises(ObjectNotFoundError):
            store.read(key)
        assert not store.exists(key)
    assert store.read("a/b", max_bytes=5) == b"12345"
    with pytest.raises(ImageTooLargeError, match="5 bytes, more than the limit of 4"):
        store.read("a/b", max_bytes=4)


def test_local_read_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.write("a", b"1")

    def refuse(*_: object) -> int:  # as root, which tests often are, nothing is refused
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ObjectAccessDeniedError, match="permission denied"):
        store.read("a")
    with pytest.raises(StorageError, match="permission denied"):
        store.write("b", b"2")
    with pytest.raises(StorageError, match="permission denied"):
        store.check_writable()


def test_local_root_that_vanished_stops_the_run(tmp_path: Path) -> None:
    store = open_store(tmp_path / "mount")
    with pytest.raises(NotFoundError):
        store.read("a")


def test_local_write_replaces_and_leaves_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.write("x/a", b"old")
    store.write("x/a", b"new")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        store.write("x/a", b"newest")
    with pytest.raises(StorageError, match="disk is full"):
        store.check_writable()
    assert store.read("x/a") == b"new"
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "a"]


@pytest.mark.parametrize("key", ["", "a/", "/a", "../a", "a/../../b", "a\0"])
def test_local_write_refuses_keys_outside(tmp_path: Path, key: str) -> None:
    store = open_store(tmp_path / "root")
    with pytest.raises(StorageError):
        store.write(key, b"")
    assert list(tmp_path.iterdir()) == []


def test_local_half_written_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".raycap-tmp-0123").write_bytes(b"half")
    assert keys(open_store(tmp_path)) == []


def test_local_delete(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("a/b", b"")
    for key in ("a/b", "a/b", "nothing/there", "../x"):
        store.delete(key)
    assert keys(store) == []
    with pytest.raises(StorageError):
        store.delete("a")


def test_local_checks(tmp_path: Path) -> None:
    open_store(tmp_path).check_readable()
    open_store(tmp_path / "new" / "folder").check_writable()
    assert list(tmp_path.iterdir()) == []
    for method in ("check_readable", "list"):
        with pytest.raises(NotFoundError, match="missing"):
            list(getattr(open_store(tmp_path / "missing"), method)())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="is a file"):
        open_store(tmp_path / "file" / "below").check_writable()


def test_whole_files_by_their_path(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b.json", b"{}")
    assert read_bytes(f"{tmp_path}/a/b.json") == b"{}"
    with pytest.raises(NotFoundError):
        read_bytes(tmp_path / "a" / "missing.json")
    for folder in (f"{tmp_path}/", "s3://bucket", "s3://bucket/a/"):
        with pytest.raises(ConfigurationError, match="one file"):
            read_bytes(folder)


# S3: a local HTTP server answers with what the test says

GOOD_LISTING = b'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount></ListBucketResult>'
WEB_PAGE = b"<html><head><title>Sign in</title></head><body>Welcome</body></html>"


@pytest.fixture
def s3_keys(no_aws_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def instant_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without their random waits."""
    monkeypatch.setattr("random.random", lambda: 0.0)
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)


def s3_store(endpoint_url: str, location: str = "s3://bucket/", *, max_outage_s: float = 0.0, **settings: Any) -> Store:
    """Without patience: test_storage_patience.py is about that."""
    return open_store(location, S3Options(endpoint_url=endpoint_url, max_outage_s=max_outage_s, **settings))


@pytest.mark.usefixtures("s3_keys", "instant_retries")
class TestS3Failures:
    def test_body_cut_short_is_fetched_again(self) -> None:
        with answering(lambda n, *_: (200, {"Content-Length": "4"}, b"da" if n < 3 else b"data")) as server:
            assert s3_store(server.endpoint_url).read("a") == b"data"
            assert len(server.requests) == 3

    def test_body_that_stays_short(self) -> None:
        with answering(lambda *_: (200, {"Content-Length": "4"}, b"da")) as server:
            with pytest.raises(ObjectUnreadableError, match="broke off"):
                s3_store(server.endpoint_url, max_attempts=2).read("a")
            assert len(server.requests) == 2

    @pytest.mark.parametrize(
        ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (503, "ServiceUnavailable")]
    )
    def test_throttling_then_success(self, status: int, code: str) -> None:
        with answering(lambda n, *_: (status, {}, s3_error(code)) if n == 1 else (200, {}, b"data")) as server:
            assert s3_store(server.endpoint_url).read("a") == b"data"

    def test_throttling_for_ever(self) -> None:
        with answering(lambda *_: (503, {}, s3_error("SlowDown"))) as server:
            with pytest.raises(ObjectUnreadableError, match="SlowDown"):
                s3_store(server.endpoint_url, max_attempts=3).read("a")
            assert len(server.requests) == 3
            with pytest.raises(EndpointError, match="SlowDown"):
                list(s3_store(server.endpoint_url, max_attempts=1).list())

    def test_max_bytes_is_known_before_the_body_is_read(self) -> None:
        with (
            answering(lambda *_: (200, {"Content-Length": "1000000000000"}, b"")) as server,
            pytest.raises(ImageTooLargeError, match="limit of 10"),
        ):
            s3_store(server.endpoint_url).read("a", max_bytes=10)

    @pytest.mark.parametrize(
        ("status", "code", "error", "says"),
        [
            (404, "NoSuchKey", ObjectNotFoundError, "no such object"),
            (404, "NoSuchBucket", NotFoundError, "no such bucket"),
            (403, "AccessDenied", ObjectAccessDeniedError, "may not read"),
            (403, "InvalidObjectState", ObjectUnreadableError, "restore"),
            (403, "InvalidAccessKeyId", CredentialsError, "AWS_ACCESS_KEY_ID"),
            (403, "SignatureDoesNotMatch", CredentialsError, "AWS_SECRET_ACCESS_KEY"),
            (400, "ExpiredToken", CredentialsError, "expired"),
            (400, "InvalidToken", CredentialsError, "AWS_SESSION_TOKEN"),
            (403, "RequestTimeTooSkewed", CredentialsError, "clock"),
            (400, "InvalidRequest", ObjectUnreadableError, "InvalidRequest"),
        ],
    )
    def test_read(self, status: int, code: str, error: type[RaycapError], says: str) -> None:
        leak = f"{ACCESS_KEY} {SECRET_KEY} X-Amz-Signature=abc"
        with (
            answering(lambda *_: (status, {}, s3_error(code, leak))) as server,
            pytest.raises(error, match=says) as caught,
        ):
            s3_store(server.endpoint_url, max_attempts=1).read("a")
        assert type(caught.value) is error
        for secret in (ACCESS_KEY, SECRET_KEY, "X-Amz-Signature"):
            assert secret not in str(caught.value)

    @pytest.mark.parametrize(
        ("status", "code", "error", "says"),
        [
            (404, "NoSuchBucket", NotFoundError, "no such bucket"),
            (403, "AccessDenied", CredentialsError, "access denied"),
            (403, "InvalidAccessKeyId", CredentialsError, "AWS_ACCESS_KEY_ID"),
            (400, "ExpiredToken", CredentialsError, "expired"),
            (400, "AuthorizationHeaderMalformed", EndpointError, "region"),
            (507, "XMinioStorageFull", EndpointError, "XMinioStorageFull"),
            (400, "QuotaExceeded", StorageError, "QuotaExceeded"),
        ],
    )
    @pytest.mark.parametrize("method", ["check_readable", "check_writable"])
    def test_checks(self, method: str, status: int, code: str, error: type[StorageError], says: str) -> None:
        with (
            answering(lambda *_: (status, {}, s3_error(code))) as server,
            pytest.raises(error, match=says) as caught,
        ):
            getattr(s3_store(server.endpoint_url), method)()
        assert type(caught.value) is error

    @pytest.mark.parametrize("status", [200, 302, 400, 403, 404])
    @pytest.mark.parametrize("method", ["check_readable", "check_writable"])
    def test_a_web_page_instead_of_s3(self, method: str, status: int) -> None:
        headers = {"Content-Type": "text/html", "Location": "/login"}
        with (
            answering(lambda *_: (status, headers, WEB_PAGE)) as server,
            pytest.raises(EndpointError, match="does not speak S3"),
        ):
            getattr(s3_store(server.endpoint_url), method)()
        assert len(server.requests) <= 4, "redirects are not followed round and round"

    def test_something_that_is_no_xml(self) -> None:
        with (
            answering(lambda *_: (200, {}, b'{"status": "ok"}')) as server,
            pytest.raises(EndpointError, match="no S3 answer"),
        ):
            list(s3_store(server.endpoint_url, max_attempts=1).list())

    @pytest.mark.parametrize("method", ["check_readable", "check_writable"])
    def test_nobody_answers(self, method: str) -> None:
        with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:1 refuses the connection"):
            getattr(s3_store("http://127.0.0.1:1", "s3://bucket/a"), method)()
        with pytest.raises(EndpointError, match=r"raycap\.invalid does not resolve"):
            getattr(s3_store("http://raycap.invalid"), method)()

    def test_nobody_answers_while_reading_stops_the_run(self) -> None:
        with pytest.raises(EndpointError):
            s3_store("http://127.0.0.1:1", max_attempts=2).read("a")

    def test_https_where_http_is_spoken(self) -> None:
        with answering(lambda *_: (200, {}, GOOD_LISTING)) as server, pytest.raises(EndpointError, match="TLS"):
            s3_store(server.endpoint_url.replace("http:", "https:")).check_readable()

    def test_a_server_that_hangs_up(self) -> None:
        with answering(lambda *_: (200, {}, b"")) as server:
            server.answer = lambda *_: (_ for _ in ()).throw(ConnectionAbortedError)
            with pytest.raises(EndpointError, match="closed the connection"):
                s3_store(server.endpoint_url).check_readable()

    def test_objects_that_may_be_listed_but_not_read(self) -> None:
        listing = b"<ListBucketResult><Name>b</Name><Contents><Key>a</Key><Size>1</Size></Contents></ListBucketResult>"
        with (
            answering(lambda _, method, path: (200, {}, listing) if "list-type" in path else (403, {}, b"")) as server,
            pytest.raises(CredentialsError, match="list the objects but not read"),
        ):
            s3_store(server.endpoint_url).check_readable()

    def test_an_empty_bucket_is_readable_an_empty_prefix_is_not(self) -> None:
        with answering(lambda _, method, path: (200 if method == "GET" else 404, {}, GOOD_LISTING)) as server:
            s3_store(server.endpoint_url).check_readable()
            with pytest.raises(NotFoundError, match="nothing below"):
                s3_store(server.endpoint_url, "s3://bucket/typo").check_readable()

    def test_a_bucket_that_writing_would_make_is_missing(self) -> None:
        with (
            answering(lambda _, method, __: (404 if method == "GET" else 200, {}, s3_error("NoSuchBucket"))) as server,
            pytest.raises(NotFoundError, match="no such bucket"),
        ):
            s3_store(server.endpoint_url).check_writable()

    def test_keys_that_may_write_but_not_list(self) -> None:
        def answer(_: int, method: str, path: str) -> Answer:
            if method == "PUT":
                return 200, {"ETag": '"e"'}, b""
            return 403, {}, s3_error("AccessDenied")

        with answering(answer) as server:
            s3_store(server.endpoint_url, "s3://bucket/out").check_writable()
            assert [method for method, _ in server.requests] == ["HEAD", "GET", "PUT", "DELETE"]

    def test_no_request_is_made_for_an_impossible_key(self) -> None:
        with answering(lambda *_: (200, {}, b"")) as server:
            store = s3_store(server.endpoint_url)
            for key in ("", "k" * 1025, "lone \udce9 surrogate"):
                with pytest.raises(ObjectNotFoundError):
                    store.read(key)
                with pytest.raises(StorageError):
                    store.write(key, b"")
                assert not store.exists(key)
            assert server.requests == []

    def test_foreign_keys_and_the_marker_of_the_root_are_not_listed(self) -> None:
        contents = "".join(
            f'<Contents><Key>{key}</Key><Size>{size}</Size><ETag>"e"</ETag></Contents>'
            for key, size in [
                ("p/", 0),
                ("p/a/", 0),
                ("p/full/", 5),
                ("p/x", 1),
                ("p/.raycap-tmp-check", 1),
                ("q/y", 1),
            ]
        )
        listing = f"<ListBucketResult><Name>bucket</Name>{contents}</ListBucketResult>".encode()
        with answering(lambda *_: (200, {}, listing)) as server:
            infos = list(s3_store(server.endpoint_url, "s3://bucket/p/").list())
        assert [(info.key, info.uri, info.size) for info in infos] == [
            ("a/", "s3://bucket/p/a/", 0),
            ("full/", "s3://bucket/p/full/", 5),
            ("x", "s3://bucket/p/x", 1),
        ]


@pytest.mark.usefixtures("no_aws_settings")
def test_no_keys_at_all() -> None:
    with answering(lambda *_: (200, {}, GOOD_LISTING)) as server:
        for method in ("check_readable", "check_writable"):
            with pytest.raises(CredentialsError, match="set AWS_ACCESS_KEY_ID"):
                getattr(s3_store(server.endpoint_url), method)()
        s3_store(server.endpoint_url, anonymous=True).check_readable()


@pytest.mark.usefixtures("no_aws_settings")
def test_half_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    with pytest.raises(CredentialsError, match="incomplete"):
        s3_store("http://127.0.0.1:1").check_readable()


@pytest.mark.usefixtures("s3_keys")
class TestS3Settings:
    def address(self, **settings: Any) -> Any:
        return _session_and_address(S3Options(**settings))[1]

    def test_endpoint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.address().endpoint_url is None
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one")
        assert self.address().endpoint_url == "http://one"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two")
        assert self.address().endpoint_url == "http://two"
        assert self.address(endpoint_url="http://three").endpoint_url == "http://three"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "two")
        with pytest.raises(ConfigurationError, match="http://host:port"):
            open_store("s3://bucket/").check_readable()

    def test_region(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.address().region == "us-east-1"
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        assert self.address().region == "eu-west-1"
        monkeypatch.setenv("AWS_REGION", "eu-west-2")
        assert self.address().region == "eu-west-2"
        assert self.address(region="eu-west-3").region == "eu-west-3"

    def test_path_style(self) -> None:
        assert not self.address().path_style
        assert self.address(path_style=True).path_style
        assert self.address(endpoint_url="http://host").path_style
        assert not self.address(endpoint_url="http://host", path_style=False).path_style

    def test_checksums(self, monkeypatch: pytest.MonkeyPatch) -> None:
        custom = S3Options(endpoint_url="http://host")
        assert s3_client(custom).meta.config.request_checksum_calculation == "when_required"
        assert s3_client(S3Options()).meta.config.request_checksum_calculation == "when_supported"
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
        assert s3_client(custom).meta.config.request_checksum_calculation == "when_supported"

    def test_profile(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        config = tmp_path / "config"
        config.write_text(
            "[profile lab]\nregion = lab-1\nservices = lab\n[services lab]\ns3 =\n  endpoint_url = http://lab:9000\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        address = self.address(profile="lab")
        assert (address.endpoint_url, address.region) == ("http://lab:9000", "lab-1")
        with pytest.raises(ConfigurationError, match="nobody"):
            open_store("s3://bucket/", S3Options(profile="nobody")).check_readable()

    def test_one_client_for_a_process_until_the_keys_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        options = S3Options(endpoint_url="http://host")
        first = s3_client(options)
        assert s3_client(S3Options(endpoint_url="http://host")) is first
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        assert s3_client(options) is not first

    def test_pickles_hold_no_key(self) -> None:
        store = s3_store("http://127.0.0.1:1", max_attempts=1)
        with pytest.raises(EndpointError):
            store.read("a")  # makes the client
        pickled = pickle.dumps(store)
        assert SECRET_KEY.encode() not in pickled
        assert ACCESS_KEY.encode() not in pickled
        assert pickle.loads(pickled).location == "s3://bucket/"


@pytest.mark.parametrize(
    "location", ["s3a://KEY:SECRET@bucket/p", "s3://KEY:SECRET@bucket", "https://KEY:se/SECRET@h/b"]
)
def test_keys_in_a_location_are_not_repeated(location: str) -> None:
    with pytest.raises(ConfigurationError, match="AWS_ACCESS_KEY_ID") as error:
        open_store(location)
    assert "SECRET@" not in str(error.value)
    assert "KEY:" not in str(error.value)


def test_keys_in_an_endpoint_are_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as error:
        S3Options(endpoint_url="KEY:SECRET@host:9000")
    assert "SECRET" not in str(error.value).replace("AWS_SECRET_ACCESS_KEY", "")


def test_another_process_uses_the_same_server_whatever_its_environment_says(
    no_aws_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://here:9000")
    monkeypatch.setenv("AWS_REGION", "eu-west-9")
    pickled = pickle.dumps(open_store("s3://bucket/"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere:9000")
    store = pickle.loads(pickled)
    assert isinstance(store, S3Store)
    assert (store.options.endpoint_url, store.options.region) == ("http://here:9000", "eu-west-9")
    assert store.options.path_style is True
