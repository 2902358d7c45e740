"""Conditional writes, and objects by their full address."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raycap.errors import (
    ConditionalWritesUnsupportedError,
    CredentialsError,
    ImageTooLargeError,
    NotFoundError,
    ObjectNotFoundError,
    StorageError,
)
from raycap.storage import Anywhere, S3Options, Store, open_store
from raycap.storage.base import TEMPORARY_PREFIX
from tests.answering import Answer, answering, s3_error

# Local files


def test_a_local_file_is_written_only_at_the_version_that_was_read(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new")
    assert store.read_versioned("x/lock") is None
    first = store.write_if("x/lock", b"1", version=None)
    assert store.read_versioned("x/lock") == (b"1", first)
    assert store.write_if("x/lock", b"2", version=None) is None
    second = store.write_if("x/lock", b"2", version=first)
    assert second not in (None, first)
    assert store.write_if("x/lock", b"3", version=first) is None
    assert store.read("x/lock") == b"2"
    store.delete("x/lock")
    assert store.write_if("x/lock", b"3", version=second) is None
    assert not store.exists("x/lock")
    assert list((tmp_path / "new" / "x").iterdir()) == []
    with pytest.raises(StorageError, match="key of a file"):
        store.write_if("../lock", b"", version=None)


COUNT = """
import sys
from raycap.storage import open_store
store = open_store(sys.argv[1])
for _ in range(int(sys.argv[2])):
    while True:
        found = store.read_versioned("count")
        number = int(found[0]) + 1 if found else 1
        if store.write_if("count", str(number).encode(), version=found and found[1]):
            break
"""


def test_processes_and_threads_that_count_miss_nothing(tmp_path: Path) -> None:
    def count(_: int) -> None:
        subprocess.run([sys.executable, "-c", COUNT, str(tmp_path), "20"], check=True)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(count, range(3)))
    assert (tmp_path / "count").read_bytes() == b"60"
    store = open_store(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        versions = list(threads.map(lambda n: store.write_if("one", str(n).encode(), version=None), range(50)))
    assert sum(version is not None for version in versions) == 1


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    code = """
import os, sys, time
from raycap.storage import files, open_store
def die(path, data):
    print(flush=True)
    time.sleep(60)
import raycap.storage.local as local
local.replace_file = die
open_store(sys.argv[1]).write_if("a", b"1", version=None)
"""
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()  # now it holds the lock
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert [path.name.startswith(TEMPORARY_PREFIX) for path in tmp_path.iterdir()] == [True]
    store = open_store(tmp_path)
    assert list(store.list()) == []
    assert store.write_if("a", b"2", version=None)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# S3


def s3_store(endpoint_url: str, **settings: Any) -> Store:
    return open_store("s3://bucket/", S3Options(endpoint_url=endpoint_url, anonymous=True, max_outage_s=0, **settings))


@pytest.fixture
def no_waits(no_aws_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 0.0)
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize(
    ("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict"), (404, "NoSuchKey")]
)
def test_a_condition_that_does_not_hold(status: int, code: str) -> None:
    with answering(lambda *_: (status, {}, s3_error(code))) as server:
        assert s3_store(server.endpoint_url).write_if("a", b"1", version="e") is None
        assert [method for method, _ in server.requests] == ["PUT"]


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize(("content", "version"), [(b"mine", "e"), (b"of another", None)])
@pytest.mark.parametrize("lost_answer", ["cut off", "500"])
def test_a_write_whose_answer_was_lost(content: bytes, version: str | None, lost_answer: str) -> None:
    def answer(number: int, method: str, _: str) -> Answer:
        if method == "GET":
            return 200, {"ETag": '"e"'}, content
        if number > 1:
            return 412, {}, s3_error("PreconditionFailed")
        if lost_answer == "500":
            return 500, {}, s3_error("InternalError")
        raise ConnectionAbortedError

    with answering(answer) as server:
        assert s3_store(server.endpoint_url).write_if("a", b"mine", version=None) == version
        assert [method for method, _ in server.requests] == ["PUT", "PUT", "GET"]


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (501, "NotImplemented", ConditionalWritesUnsupportedError),
        (404, "NoSuchBucket", NotFoundError),
        (403, "AccessDenied", CredentialsError),
    ],
)
def test_conditional_writes_that_cannot_be(status: int, code: str, error: type[StorageError]) -> None:
    with answering(lambda *_: (status, {}, s3_error(code))) as server:
        with pytest.raises(error):
            s3_store(server.endpoint_url).write_if("a", b"1", version=None)
        assert len(server.requests) == 1


@pytest.mark.usefixtures("no_waits")
def test_reading_a_version_that_may_not_be_read() -> None:
    with answering(lambda *_: (403, {}, s3_error("AccessDenied"))) as server, pytest.raises(CredentialsError):
        s3_store(server.endpoint_url).read_versioned("a")


# Anywhere


def test_anywhere_reads_local_files_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "a b%20").mkdir()
    (tmp_path / "a b%20" / "c").write_bytes(b"12345")
    anywhere = pickle.loads(pickle.dumps(Anywhere(S3Options())))
    assert anywhere.read(f"{tmp_path}/a b%20/c") == b"12345"
    assert anywhere.read(f"{tmp_path}/x/..//a b%20/c") == b"12345"
    with pytest.raises(ImageTooLargeError):
        anywhere.read(f"{tmp_path}/a b%20/c", max_bytes=4)
    for key in (f"{tmp_path}/missing/c", f"{tmp_path}/a b%20", "", "c", "/", "s3://", "s3://bucket", "s3://b@d/a"):
        with pytest.raises(ObjectNotFoundError):
            anywhere.read(key)


@pytest.mark.usefixtures("no_waits")
def test_anywhere_reads_many_buckets_with_one_request_each() -> None:
    def answer(_: int, __: str, path: str) -> Answer:
        return (404, {}, s3_error("NoSuchBucket")) if path.startswith("/none") else (200, {}, path.encode())

    with answering(answer) as server:
        anywhere = Anywhere(S3Options(endpoint_url=server.endpoint_url, anonymous=True))
        for key in ("bucket/a", "other/a%20b/é+", "other/folder/"):
            assert anywhere.read(f"s3://{key}") == f"/{key}".encode()
        assert len(server.requests) == 3
        with pytest.raises(ObjectNotFoundError, match="no such bucket"):
            anywhere.read("s3://none/a")
        with pytest.raises(ObjectNotFoundError):
            anywhere.read("s3://bucket/" + "k" * 1025)


@pytest.mark.usefixtures("no_aws_settings")
def test_anywhere_goes_to_the_same_server_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://here:9000")
    pickled = pickle.dumps(Anywhere(S3Options()))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere:9000")
    assert pickle.loads(pickled).s3.endpoint_url == "http://here:9000"
