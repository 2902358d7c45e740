"""Exports of an output on a real S3 server, over images that lie there too."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycap.bulk.commit import write_json
from raycap.bulk.config import ExportConfig
from raycap.bulk.export import export
from raycap.bulk.layout import SUMMARY, part_key
from raycap.bulk.rows import OUTPUT_SCHEMA
from raycap.errors import StorageError
from raycap.storage import Store, open_store
from tests.hostile import base_picture, encode
from tests.s3 import S3Keys, S3Server
from tests.test_export import as_json, row

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_aws_settings")]

KEYS = [
    "plain.jpg",
    "ü ñ/日本 😀.jpg",
    "100%/a%20b.jpg",
    "a+b/c&d=e.jpg",
    "a#b?/c.jpg",
    "a'b\"/new\nline.jpg",
    "x/gone.jpg",
]


def use(server: S3Server, keys: S3Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env(keys).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def output(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A finished output in a bucket, of images in another folder of it."""
    use(s3_server, s3_server.owner, monkeypatch)
    bucket = s3_server.make_bucket()
    source, store = open_store(f"s3://{bucket}/in put/"), open_store(f"s3://{bucket}/out %41/")
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows_of(source), OUTPUT_SCHEMA), sink)
    store.write(part_key(0), sink.getvalue())
    write_json(store, SUMMARY, {"num_objects": len(KEYS)})
    for key in KEYS[:-1]:
        source.write(key, image(key))
    return store


def image(key: str) -> bytes:
    return encode(base_picture().resize((40 + KEYS.index(key), 30)), "JPEG")


def rows_of(source: Store) -> list[dict[str, Any]]:
    return [
        row(i, key=key, uri=source.uri(key), size=len(image(key)), width=40 + i, height=30)
        for i, key in enumerate(KEYS)
    ]


def names(output: Store, folder: str) -> set[str]:
    return {info.key.removeprefix(f"{folder}/") for info in output.list(f"{folder}/")}


def test_webdataset_reads_the_images_from_s3(output: Store) -> None:
    outcome = export(ExportConfig(output=output.location, format="webdataset"))
    assert names(output, "webdataset") == {"_SUCCESS", "shard-000000.tar"}
    assert outcome["left_out"] == {"not_found": 1}
    with tarfile.open(fileobj=io.BytesIO(output.read("webdataset/shard-000000.tar"))) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(contents) == 3 * (len(KEYS) - 1)
    for i, key in enumerate(KEYS[:-1]):
        assert contents[f"{i:012d}.jpg"] == image(key)
        assert json.loads(contents[f"{i:012d}.json"])["key"] == key


def test_other_formats_and_what_an_earlier_export_left(output: Store) -> None:
    expected = rows_of(open_store(output.location.replace("out %41", "in put")))
    export(ExportConfig(output=output.location, format="jsonl", file_size_mb=0.0001))
    assert len(names(output, "jsonl")) == len(KEYS) + 1
    export(ExportConfig(output=output.location, format="jsonl"))
    assert names(output, "jsonl") == {"_SUCCESS", "part-00000.jsonl"}
    lines = output.read("jsonl/part-00000.jsonl").decode().removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == [as_json(entry) for entry in expected]
    export(ExportConfig(output=output.location, format="coco"))
    assert names(output, "coco") == {"_SUCCESS", "results.json", "images.json"}
    export(ExportConfig(output=output.location, format="parquet", partition_by="folder"))
    assert names(output, "parquet") == {
        "_SUCCESS",
        "folder=__HIVE_DEFAULT_PARTITION__/part-00000.parquet",
        "folder=ü ñ/part-00000.parquet",
        "folder=100%25/part-00000.parquet",
        "folder=a+b/part-00000.parquet",
        "folder=a%23b%3F/part-00000.parquet",
        "folder=a%27b%22/part-00000.parquet",
        "folder=x/part-00000.parquet",
    }
    export(ExportConfig(output=output.location, format="parquet"))
    assert names(output, "parquet") == {"_SUCCESS", "part-00000.parquet"}


def test_keys_that_may_only_read_are_one_clear_error(
    output: Store, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(s3_server, s3_server.reader, monkeypatch)
    with pytest.raises(StorageError, match="cannot write"):
        export(ExportConfig(output=output.location, format="jsonl"))
