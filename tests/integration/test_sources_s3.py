"""Sources on a real S3 server: prefixes, manifest files and an S3 Inventory that lie there."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycap.bulk.config import Selection
from raycap.bulk.sources import Source, SourceRow, copies, open_source
from raycap.errors import ConfigurationError, NotFoundError, StorageError
from raycap.storage import S3Options, open_store
from tests.s3 import S3Server

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_aws_settings", "server")]

KEYS = ["a b+c%2B.jpg", "ünï/日本語/😀.jpg", "#1/100%.jpg", "new\nline.jpg", "notes.txt"]


@pytest.fixture
def server(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The server, with the owner's keys and its address in the environment; temporary files go to a new folder."""
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return s3_server


@pytest.fixture
def photos(server: S3Server) -> str:
    """A bucket with the KEYS, each object holding its own key."""
    bucket = server.make_bucket()
    fill(bucket, *KEYS)
    return bucket


@pytest.fixture
def lists(server: S3Server) -> str:
    """An empty bucket."""
    return server.make_bucket()


def fill(bucket: str, *keys: str) -> None:
    for key in keys:
        open_store(f"s3://{bucket}").write(key, key.encode())


def source_of(location: str, **selection: Any) -> Source:
    return open_source(location, Selection(**selection), S3Options())


def rows_of(source: Source, num_spans: int = 4) -> list[SourceRow]:
    return [row for span in source.spans(num_spans) for row in source.rows(span)]


def contents(source: Source) -> list[bytes]:
    reader = pickle.loads(pickle.dumps(source.reader))
    return [reader.read(getattr(row, source.reads_by)) for row in rows_of(source)]


def assert_goes_on_anywhere(source: Source) -> None:
    for span in source.spans(4):
        rows = list(source.rows(span))
        for place, row in enumerate(rows):
            assert list(source.rows(span, after=row.position, taken=place + 1)) == rows[place + 1 :]


def test_a_prefix(server: S3Server, photos: str) -> None:
    server.client().put_object(Bucket=photos, Key="folder/")
    source = source_of(f"s3://{photos}")
    source.check()
    rows = {row.key: row for row in rows_of(source)}
    assert sorted(rows) == sorted([*KEYS, "folder/"])
    assert {key: row.skip for key, row in rows.items() if row.skip} == {
        "notes.txt": "other_suffix",
        "folder/": "folder_marker",
    }
    assert all(rows[key].uri == f"s3://{photos}/{key}" and rows[key].size == len(key.encode()) for key in KEYS)
    assert_goes_on_anywhere(source)


def test_a_text_list_of_two_buckets(server: S3Server, photos: str, lists: str) -> None:
    fill(lists, "more/ü 1.jpg", "more/2.jpg")
    keys = [key for key in KEYS if "\n" not in key]
    lines = [f"s3://{photos}/{key}" for key in keys] + [f"s3://{lists}/more/ü 1.jpg", "2.jpg"]
    open_store(f"s3://{lists}").write("more/list.txt.gz", gzip.compress("\r\n".join(lines).encode()))
    source = source_of(f"s3://{lists}/more/list.txt.gz")  # relative: to its own prefix
    source.check()
    assert contents(source) == [key.encode() for key in [*keys, "more/ü 1.jpg", "more/2.jpg"]]
    assert_goes_on_anywhere(source)


def test_a_parquet_manifest_is_copied_once_and_in_parts(photos: str, lists: str, tmp_path: Path) -> None:
    sink = io.BytesIO()
    table = pa.table({"bucket": [photos] * 50, "key": KEYS * 10, "size": range(50)})
    pq.write_table(table, sink, row_group_size=7)
    open_store(f"s3://{lists}").write("m.parquet", sink.getvalue())
    source = source_of(f"s3://{lists}/m.parquet")
    source.check()
    assert len(source.spans(4)) == 4
    assert [(row.key, row.size) for row in rows_of(source)] == [(KEYS[n % len(KEYS)], n) for n in range(50)]
    assert contents(source) == [key.encode() for key in KEYS * 10]
    assert_goes_on_anywhere(source)
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del source
    assert list((tmp_path / "temporary").iterdir()) == []


def put_inventory(bucket: str, source_bucket: str, kind: str, files: list[bytes]) -> str:
    """An inventory as S3 delivers it into `bucket`; the address of its manifest.json."""
    store, folder = open_store(f"s3://{bucket}"), f"inventory/{source_bucket}/daily"
    entries = []
    for number, data in enumerate(files):
        key = f"{folder}/data/{number}.{kind.lower()}"
        store.write(key, data)
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        entries.append({"key": key, "size": len(data), "MD5checksum": md5})
    manifest = {
        "sourceBucket": source_bucket,
        "destinationBucket": f"arn:aws:s3:::{bucket}",
        "version": "2016-11-30",
        "creationTimestamp": "1514944800000",
        "fileFormat": kind,
        "fileSchema": "Bucket, Key, Size, ETag" if kind == "CSV" else "message s3.inventory {...}",
        "files": entries,
    }
    store.write(f"{folder}/2026-01-01T01-00Z/manifest.json", json.dumps(manifest).encode())
    return f"s3://{bucket}/{folder}/2026-01-01T01-00Z/manifest.json"


def inventory_file(kind: str, bucket: str, keys: list[str]) -> bytes:
    if kind == "CSV":
        lines = (f'"{bucket}","{quote_plus(key, safe="/")}","{len(key.encode())}","e"\n' for key in keys)
        return gzip.compress("".join(lines).encode())
    sink = io.BytesIO()
    sizes = [len(key.encode()) for key in keys]
    pq.write_table(
        pa.table({"bucket": [bucket] * len(keys), "key": keys, "size": sizes, "e_tag": ["e"] * len(keys)}), sink
    )
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_an_inventory(photos: str, lists: str, kind: str, tmp_path: Path) -> None:
    files = [inventory_file(kind, photos, KEYS[:2]), inventory_file(kind, photos, KEYS[2:])]
    source = source_of(put_inventory(lists, photos, kind, files))
    source.check()
    rows = rows_of(source)
    assert [(row.uri, row.key, row.size, row.etag) for row in rows] == [
        (f"s3://{photos}/{key}", key, len(key.encode()), "e") for key in KEYS
    ]
    assert [row.skip for row in rows] == [None] * 4 + ["other_suffix"]
    assert len(source.spans(4)) == 2
    assert contents(source) == [key.encode() for key in KEYS]
    assert_goes_on_anywhere(source)
    assert list((tmp_path / "temporary").iterdir()) == []  # each data file is deleted when it was read


def test_an_inventory_whose_data_is_not_whole(photos: str, lists: str) -> None:
    data = inventory_file("CSV", photos, KEYS)
    source = source_of(put_inventory(lists, photos, "CSV", [data]))
    key = f"inventory/{photos}/daily/data/0.csv"
    open_store(f"s3://{lists}").write(key, data[:-1])
    with pytest.raises(StorageError, match=r"0\.csv: expected a file with the MD5"):
        rows_of(source)
    open_store(f"s3://{lists}").delete(key)
    with pytest.raises(NotFoundError, match=r"0\.csv"):
        source_of(source.location).check()


def test_a_manifest_that_is_not_there_or_a_folder(lists: str) -> None:
    with pytest.raises(NotFoundError):
        source_of(f"s3://{lists}/no.csv").check()
    fill(lists, "table.parquet/part-0.parquet")
    with pytest.raises(NotFoundError, match=r"expected one file, found none; .* type s3://.*/table\.parquet/"):
        source_of(f"s3://{lists}/table.parquet").check()
    with pytest.raises(ConfigurationError, match="a manifest is a single file"):
        source_of(f"s3://{lists}/table.parquet/").check()


def test_a_manifest_that_is_too_large(lists: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(f"s3://{lists}").write("m.txt", b"a.jpg\n" * 10)
    monkeypatch.setattr(copies, "MAX_COPIED_BYTES", 59)
    with pytest.raises(StorageError, match="expected a manifest file of at most 59 bytes, got 60; copy it"):
        source_of(f"s3://{lists}/m.txt").check()


def test_goes_on_with_the_same_object_alone(lists: str) -> None:
    open_store(f"s3://{lists}").write("m.txt", b"a.jpg\n")
    (span,) = source_of(f"s3://{lists}/m.txt").spans(1)
    open_store(f"s3://{lists}").write("m.txt", b"b.jpg\n")
    with pytest.raises(ConfigurationError, match="was changed after the listing"):
        list(source_of(f"s3://{lists}/m.txt").rows(span))
