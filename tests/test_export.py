"""The other formats: what is in them, that their files are whole, and that common tools read them back."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO

from raycap.bulk.commit import write_json
from raycap.bulk.config import ExportConfig
from raycap.bulk.export import coco, export, files, parquet
from raycap.bulk.export.parquet import escape
from raycap.bulk.layout import SUMMARY, part_key
from raycap.bulk.rows import OUTPUT_SCHEMA
from raycap.coco import read_results
from raycap.errors import ConfigurationError, ObjectAccessDeniedError, StorageError
from raycap.storage import LocalStore
from tests.hostile import base_picture, encode

NOW = datetime(2026, 3, 1, 12, 30, 0, 123456, tzinfo=UTC)
CAPTIONS = [
    "a \"quoted\" dog, says 'woof'",
    "two\nlines\r\nand a tab\t.",
    "ein Hund läuft 犬 🐕 \u2028 \u0085 \\ ",
    "",
    "a;b,c|d",
    "null",
    "{} [] \x01",
]
KEYS = ["2024/a b.jpg", "2024/%2F+#.jpg", "ü=1/犬.png", "a:b/deep/er/x", "flat.jpg", "2025/new\nline.jpg", '"q"/x.jpg']


def row(row_id: int, **changes: Any) -> dict[str, Any]:
    """A row with a caption."""
    key = f"{row_id}-{KEYS[row_id % len(KEYS)]}" if row_id >= len(KEYS) else KEYS[row_id]
    return {
        "row_id": row_id,
        "uri": f"s3://photos/{key}",
        "key": key,
        "etag": f"{row_id:x}-e",
        "size": 2**33 + row_id,
        "status": "ok",
        "error_code": None,
        "error": None,
        "caption": CAPTIONS[row_id % len(CAPTIONS)],
        "log_prob": -1.5 - row_id,
        "alternatives": [{"caption": f"another {row_id}", "log_prob": -2.0}] if row_id % 2 else [],
        "width": 640,
        "height": 480,
        "model_id": "tiny@1",
        "captioned_at": NOW + timedelta(microseconds=row_id),
    } | changes


def without_caption(row_id: int, status: str, code: str, **changes: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("caption", "log_prob", "alternatives", "width", "height"))
    return row(row_id, status=status, error_code=code, error=f'{code}: "bad"\nfile', **nothing) | changes


def some_rows(num_rows: int = 40) -> list[dict[str, Any]]:
    """All kinds of rows: every fifth failed, every seventh skipped."""
    rows = []
    for row_id in range(num_rows):
        if row_id % 5 == 4:
            rows.append(without_caption(row_id, "failed", "corrupt"))
        elif row_id % 7 == 6:
            rows.append(without_caption(row_id, "skipped", "other_suffix", size=None))
        else:
            rows.append(row(row_id))
    return rows


def is_ok(entry: dict[str, Any]) -> bool:
    return entry["status"] == "ok"


def write_output(folder: Path, rows: list[dict[str, Any]], *, num_files: int = 2) -> str:
    """A finished output, as the bulk job leaves it; returns its location."""
    store = LocalStore(str(folder))
    per_file = -(-len(rows) // num_files) or 1
    for part, start in enumerate(range(0, len(rows), per_file)):
        sink = io.BytesIO()
        table = pa.Table.from_pylist(rows[start : start + per_file], OUTPUT_SCHEMA)
        pq.write_table(table, sink, compression="zstd")
        store.write(part_key(part), sink.getvalue())
    write_json(store, SUMMARY, {"status": "complete", "num_objects": len(rows), "finished_at": NOW.isoformat()})
    return store.location


def found(output: str, folder: str) -> dict[str, bytes]:
    """Names below a folder of the output, and contents."""
    root = Path(output) / folder
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def run(output: str, format_: str, *, reader: Any = None, **options: Any) -> dict[str, Any]:
    return export(ExportConfig(output=output, format=format_, **options), reader=reader)


def as_json(entry: dict[str, Any]) -> dict[str, Any]:
    return entry | {"captioned_at": entry["captioned_at"].strftime("%Y-%m-%dT%H:%M:%S.%fZ")}


@pytest.fixture
def output(tmp_path: Path) -> str:
    return write_output(tmp_path / "out", some_rows())


# captions/ itself, in the tools that the other formats are checked with


def test_captions_are_read_by_pandas_pyarrow_and_duckdb(output: str) -> None:
    expected = [{name: entry[name] for name in OUTPUT_SCHEMA.names} for entry in some_rows()]
    assert ds.dataset(f"{output}/captions").to_table().to_pylist() == expected
    frame = pd.read_parquet(f"{output}/captions")
    assert frame["caption"].dropna().tolist() == [entry["caption"] for entry in expected if is_ok(entry)]
    assert frame["captioned_at"].tolist() == [entry["captioned_at"] for entry in expected]
    table = duckdb.sql(f"select * from '{output}/captions/*.parquet' order by row_id").to_arrow_table()
    assert table.drop_columns(["captioned_at"]).to_pylist() == [
        {name: value for name, value in entry.items() if name != "captioned_at"} for entry in expected
    ]
    assert [time.timestamp() for time in table["captioned_at"].to_pylist()] == [
        entry["captioned_at"].timestamp() for entry in expected
    ]


# JSON Lines


def test_jsonl_has_every_row_and_column(output: str) -> None:
    outcome = run(output, "jsonl")
    (content,) = [data for name, data in found(output, "jsonl").items() if name != "_SUCCESS"]
    lines = content.decode().removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == [as_json(entry) for entry in some_rows()]
    assert list(json.loads(lines[0])) == OUTPUT_SCHEMA.names
    assert (outcome["rows"], outcome["files"], outcome["left_out"]) == (40, 1, {})


def test_jsonl_is_cut_at_rows(output: str) -> None:
    outcome = run(output, "jsonl", file_size_mb=0.002)
    parts = found(output, "jsonl")
    assert list(parts) == ["_SUCCESS", *(f"part-{part:05d}.jsonl" for part in range(outcome["files"]))]
    del parts["_SUCCESS"]
    whole = b"".join(parts.values())
    assert [json.loads(line)["row_id"] for line in whole.splitlines() if line.startswith(b"{")] == list(range(40))
    assert all(data.endswith(b"}\n") and data.startswith(b"{") for data in parts.values())
    longest = max(map(len, whole.split(b"\n")))
    assert all(2000 <= len(data) < 2000 + longest + 1 for data in list(parts.values())[:-1])
    assert len(parts) > 3
    assert outcome["num_bytes"] == len(whole)


def test_jsonl_is_read_by_pandas_pyarrow_and_duckdb(output: str) -> None:
    run(output, "jsonl", file_size_mb=0.004)
    expected = some_rows()
    frame = pd.concat([pd.read_json(path, lines=True) for path in sorted(Path(output, "jsonl").glob("*.jsonl"))])
    assert frame["row_id"].tolist() == list(range(40))
    assert frame["caption"].dropna().tolist() == [entry["caption"] for entry in expected if is_ok(entry)]
    assert frame["captioned_at"].tolist() == [entry["captioned_at"] for entry in expected]
    table = ds.dataset(f"{output}/jsonl", format="json").to_table()
    assert table["caption"].to_pylist() == [entry["caption"] for entry in expected]
    assert table["alternatives"].to_pylist() == [entry["alternatives"] for entry in expected]
    database = duckdb.sql(f"select * from '{output}/jsonl/*.jsonl' order by row_id")
    columns = dict(zip(database.columns, map(str, database.types), strict=True))
    assert columns["alternatives"] == "STRUCT(caption VARCHAR, log_prob DOUBLE)[]"
    assert columns["captioned_at"].startswith("TIMESTAMP")
    table = database.to_arrow_table()
    assert table.select(["key", "caption", "size", "log_prob", "alternatives", "error"]).to_pylist() == [
        {name: entry[name] for name in ("key", "caption", "size", "log_prob", "alternatives", "error")}
        for entry in expected
    ]


def test_jsonl_has_null_for_what_json_has_no_number_for(tmp_path: Path) -> None:
    odd = [{"caption": "x", "log_prob": float("-inf")}]
    output = write_output(tmp_path, [row(0, log_prob=float("nan"), alternatives=odd)])
    run(output, "jsonl")
    entry = json.loads(found(output, "jsonl")["part-00000.jsonl"])
    assert (entry["log_prob"], entry["alternatives"]) == (None, [{"caption": "x", "log_prob": None}])
    assert entry["caption"] == CAPTIONS[0]


# COCO


def coco_output(tmp_path: Path, *keys: str) -> str:
    return write_output(tmp_path, [row(row_id + 5, key=key) for row_id, key in enumerate(keys)])


def image_ids(output: str) -> list[int]:
    return [entry["image_id"] for entry in json.loads(found(output, "coco")["results.json"])]


def test_coco_has_the_captioned_rows(output: str) -> None:
    outcome = run(output, "coco")
    good = [entry for entry in some_rows() if is_ok(entry)]
    assert json.loads(found(output, "coco")["results.json"]) == [
        {"image_id": entry["row_id"], "caption": entry["caption"]} for entry in good
    ]
    assert json.loads(found(output, "coco")["images.json"])["images"] == [
        {"id": entry["row_id"], "file_name": entry["key"], "width": 640, "height": 480} for entry in good
    ]
    assert outcome["left_out"] == {"failed": 8, "skipped": 4}
    assert (outcome["image_id"], outcome["rows"], outcome["files"]) == ("row_id", 28, 2)


def test_coco_is_read_by_pycocotools_and_raycap(output: str) -> None:
    run(output, "coco")
    results = COCO(f"{output}/coco/images.json").loadRes(f"{output}/coco/results.json")
    expected = {entry["row_id"]: entry["caption"] for entry in some_rows() if is_ok(entry)}
    assert {image_id: results.imgToAnns[image_id][0]["caption"] for image_id in results.getImgIds()} == expected
    assert read_results(f"{output}/coco/results.json") == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["val2014/COCO_val2014_000000391895.jpg", "000000000042.png"], [391895, 42]),
        (["a/000000000042.jpg", "b/COCO_val2014_000000000042.jpg"], [5, 6]),  # one number, two images
        (["000000000006.jpg", "holiday.jpg"], [5, 6]),  # 6 would be both
        (["0000000000042.jpg", "00000000042.jpg"], [5, 6]),  # 13 and 11 digits
        (["000000000042", "000000000043.jpg"], [5, 6]),
        (["000000000042.d/1.jpg", "000000000043.jpg"], [5, 6]),
    ],
)
def test_coco_image_ids(tmp_path: Path, keys: list[str], expected: list[int]) -> None:
    output = coco_output(tmp_path, *keys)
    outcome = run(output, "coco")
    assert image_ids(output) == expected
    assert [image["id"] for image in json.loads(found(output, "coco")["images.json"])["images"]] == expected
    assert outcome["image_id"] == ("file_name" if expected[0] > 6 else "row_id")


def test_coco_of_no_captions_is_still_json(tmp_path: Path) -> None:
    output = write_output(tmp_path, [without_caption(0, "failed", "empty")])
    run(output, "coco")
    assert image_ids(output) == []
    assert json.loads(found(output, "coco")["images.json"])["images"] == []


def test_coco_refuses_more_than_a_document_holds(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "MAX_IMAGES", 27)
    with pytest.raises(ConfigurationError, match=r"at most 27 images.*--format jsonl"):
        run(output, "coco")
    assert found(output, "coco") == {}


# Parquet


def test_parquet_is_cut_anew(tmp_path: Path) -> None:
    rows = some_rows(3000)
    output = write_output(tmp_path, rows, num_files=7)
    outcome = run(output, "parquet", file_size_mb=0.02)
    parts = {name: data for name, data in found(output, "parquet").items() if name != "_SUCCESS"}
    assert list(parts) == [f"part-{part:05d}.parquet" for part in range(outcome["files"])]
    tables = [pq.read_table(io.BytesIO(data)) for data in parts.values()]
    assert all(table.schema.equals(OUTPUT_SCHEMA) for table in tables)
    assert pa.concat_tables(tables).to_pylist() == rows
    sizes = [len(data) for data in parts.values()]
    assert len(sizes) > 3
    assert all(15_000 < size < 40_000 for size in sizes[:-1]), sizes
    assert (outcome["rows"], outcome["partition_by"]) == (3000, None)


@pytest.mark.parametrize("column", ["status", "model_id"])
def test_parquet_in_partitions_of_a_column(tmp_path: Path, column: str) -> None:
    rows = [entry | {"model_id": f"tiny/{entry['row_id'] % 3}"} for entry in some_rows()]
    output = write_output(tmp_path, rows)
    run(output, "parquet", partition_by=column)
    names = [name for name in found(output, "parquet") if name != "_SUCCESS"]
    values = sorted({str(entry[column]) for entry in rows})
    assert names == [f"{column}={value.replace('/', '%2F')}/part-00000.parquet" for value in values]
    assert column not in pq.ParquetFile(Path(output, "parquet", names[0])).schema_arrow.names
    back = ds.dataset(f"{output}/parquet", partitioning="hive").to_table().sort_by("row_id")
    assert back.select(OUTPUT_SCHEMA.names).to_pylist() == rows
    frame = pd.read_parquet(f"{output}/parquet").sort_values("row_id")
    assert frame[column].tolist() == [entry[column] for entry in rows]
    sql = f"select row_id, caption, {column} from '{output}/parquet/*/*.parquet' order by row_id"
    assert duckdb.sql(sql).fetchall() == [(entry["row_id"], entry["caption"], entry[column]) for entry in rows]


def test_parquet_in_partitions_of_folders(tmp_path: Path) -> None:
    rows = [entry | {"key": entry["key"].replace("2024", "Y2024")} for entry in some_rows(14)]
    output = write_output(tmp_path, rows)
    run(output, "parquet", partition_by="folder")
    folders = [entry["key"].partition("/")[0] if "/" in entry["key"] else None for entry in rows]
    assert {name.split("/")[0] for name in found(output, "parquet") if name != "_SUCCESS"} >= {
        "folder=Y2024",
        "folder=ü%3D1",
        "folder=a%3Ab",
        "folder=%22q%22",
        "folder=__HIVE_DEFAULT_PARTITION__",
    }
    text = ds.partitioning(pa.schema([("folder", pa.string())]), flavor="hive")
    back = ds.dataset(f"{output}/parquet", partitioning=text).to_table().sort_by("row_id")
    assert back["folder"].to_pylist() == folders
    assert back.select(OUTPUT_SCHEMA.names).to_pylist() == rows
    sql = f"""select row_id, folder from read_parquet('{output}/parquet/*/*.parquet', hive_types_autocast = false)
              order by row_id"""
    assert duckdb.sql(sql).fetchall() == list(enumerate(folders))


def test_partition_names_are_escaped_as_hive_does() -> None:
    assert escape("a b-c_d.e~ü犬") == "a b-c_d.e~ü犬"
    assert escape("\x01\n\"#%'*/:=?\\\x7f{[]^") == "%01%0A%22%23%25%27%2A%2F%3A%3D%3F%5C%7F%7B%5B%5D%5E"
    assert escape("}<>|&$@") == "}<>|&$@"
    assert escape("") == escape(None) == "__HIVE_DEFAULT_PARTITION__"


@pytest.mark.parametrize("max_open", [1, 3, 256])
def test_few_open_files_lose_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_open: int) -> None:
    monkeypatch.setattr(parquet, "MAX_OPEN_FILES", max_open)
    rows = [row(row_id, key=f"{row_id % 5}/x.jpg") for row_id in range(200)]
    output = write_output(tmp_path, rows, num_files=9)
    outcome = run(output, "parquet", partition_by="folder", file_size_mb=0.01)
    for folder in range(5):
        parts = sorted(Path(output, "parquet", f"folder={folder}").iterdir())
        ids = [row_id for part in parts for row_id in pq.ParquetFile(part).read()["row_id"].to_pylist()]
        assert ids == list(range(folder, 200, 5))
    assert outcome["rows"] == 200


def test_open_files_hold_no_more_than_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    add = parquet._OpenFiles.add

    def watched(self: Any, folder: str, rows: pa.Table) -> None:
        add(self, folder, rows)
        held.append(sum(file.memory for file in self._open.values()))
        assert held[-1] == self._memory

    monkeypatch.setattr(parquet._OpenFiles, "add", watched)
    output = write_output(tmp_path, [row(row_id, key=f"{row_id % 30}/x.jpg") for row_id in range(3000)])
    run(output, "parquet", partition_by="folder", file_size_mb=0.1)
    assert max(held) <= 200_000
    assert max(held) > 100_000


def test_too_many_partitions_are_refused_before_anything_is_written(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_PARTITIONS", 3)
    with pytest.raises(ConfigurationError, match=r"more than 3 partitions.*status or model_id"):
        run(output, "parquet", partition_by="folder")
    assert found(output, "parquet") == {}


# WebDataset


FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def images_output(folder: Path, num_images: int = 12) -> tuple[str, list[dict[str, Any]]]:
    """An output over image files of all formats, all named .jpg; its last row is a failed one."""
    source = folder / "in put"
    source.mkdir(parents=True)
    rows = []
    for row_id in range(num_images):
        path = source / f"{row_id} %20ü.x.jpg"
        path.write_bytes(encode(base_picture().resize((30 + row_id, 20)), FORMATS[row_id % len(FORMATS)]))
        rows.append(row(row_id, uri=str(path), key=path.name, size=path.stat().st_size, width=30 + row_id, height=20))
    rows.append(without_caption(num_images, "failed", "corrupt"))
    return write_output(folder / "out", rows), rows


def samples(output: str) -> dict[str, dict[str, bytes]]:
    """Key -> suffix -> content, over all shards, by the convention: a sample's files follow each other."""
    result: dict[str, dict[str, bytes]] = {}
    for name, data in found(output, "webdataset").items():
        if name == "_SUCCESS":
            continue
        before = None
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                assert member.isfile()
                key, _, suffix = member.name.partition(".")
                if key != before:
                    assert key not in result
                    result[key] = {}
                assert suffix not in result[key]
                file = tar.extractfile(member)
                assert file is not None
                result[key][suffix] = file.read()
                before = key
    return result


def test_webdataset_has_image_caption_and_row(tmp_path: Path) -> None:
    output, rows = images_output(tmp_path)
    outcome = run(output, "webdataset")
    got = samples(output)
    assert list(got) == [f"{row_id:012d}" for row_id in range(12)]
    suffixes = ["jpg", "png", "webp", "gif", "bmp", "tiff"]
    for row_id, (sample, entry) in enumerate(zip(got.values(), rows, strict=False)):
        assert list(sample) == [suffixes[row_id % 6], "json", "txt"]
        assert sample[suffixes[row_id % 6]] == Path(entry["uri"]).read_bytes()
        assert sample["txt"].decode() == entry["caption"]
        assert json.loads(sample["json"]) == as_json(entry)
    assert (outcome["rows"], outcome["files"], outcome["left_out"]) == (12, 1, {"failed": 1})


def test_webdataset_is_cut_between_samples_and_repeats_exactly(tmp_path: Path) -> None:
    output, _ = images_output(tmp_path)
    outcome = run(output, "webdataset", file_size_mb=0.008)
    first = found(output, "webdataset")
    assert list(first) == ["_SUCCESS", *(f"shard-{shard:06d}.tar" for shard in range(outcome["files"]))]
    assert outcome["files"] > 2
    assert [set(sample) >= {"json", "txt"} and len(sample) for sample in samples(output).values()] == [3] * 12
    run(output, "webdataset", file_size_mb=0.008)
    assert found(output, "webdataset") == first


def test_images_that_have_gone_or_changed_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output, rows = images_output(tmp_path)
    paths = [Path(entry["uri"]) for entry in rows[:-1]]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes() + b"more")
    paths[2].write_bytes(paths[2].read_bytes()[:-7])
    paths[3].write_bytes(b"x" * rows[3]["size"])
    turned = encode(Image.open(paths[4]).transpose(Image.Transpose.ROTATE_90), "BMP")
    assert len(turned) > rows[4]["size"] - 200
    paths[4].write_bytes(turned[: rows[4]["size"]].ljust(rows[4]["size"], b"\0"))
    paths[5].rename(tmp_path / "in put" / "elsewhere.jpg")
    with caplog.at_level(logging.WARNING, "raycap"):
        outcome = run(output, "webdataset")
    assert list(samples(output)) == [f"{row_id:012d}" for row_id in range(6, 12)]
    assert outcome["left_out"] == {"not_found": 2, "changed": 4, "failed": 1}
    assert outcome["rows"] == 6
    assert "it has changed since it was captioned" in caplog.text
    assert str(paths[0]) in caplog.text
    assert len(caplog.records) == 5  # and the sixth is counted alone


def test_size_that_nobody_told_is_not_compared(tmp_path: Path) -> None:
    output, rows = images_output(tmp_path, 2)
    write_output(Path(output), [entry | {"size": None} for entry in rows])
    assert run(output, "webdataset")["rows"] == 2


class DictReader:
    """Reads what a test hands it: bytes, or an error to raise."""

    def __init__(self, content: dict[str, bytes | Exception]) -> None:
        self.content = content

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        value = self.content[key]
        if isinstance(value, Exception):
            raise value
        return value


def test_reader_is_asked_by_uri_and_its_errors_have_codes(tmp_path: Path) -> None:
    output, rows = images_output(tmp_path, 3)
    content: dict[str, bytes | Exception] = {entry["uri"]: Path(entry["uri"]).read_bytes() for entry in rows[:3]}
    content[rows[1]["uri"]] = ObjectAccessDeniedError("you may not")
    outcome = run(output, "webdataset", reader=DictReader(content))
    assert list(samples(output)) == ["000000000000", "000000000002"]
    assert outcome["left_out"] == {"access_denied": 1, "failed": 1}


def test_storage_that_fails_stops_the_export_without_its_marker(tmp_path: Path) -> None:
    output, rows = images_output(tmp_path)
    run(output, "webdataset", file_size_mb=0.008)
    before = found(output, "webdataset")
    content: dict[str, bytes | Exception] = {entry["uri"]: Path(entry["uri"]).read_bytes() for entry in rows[:-1]}
    content[rows[9]["uri"]] = StorageError("the endpoint is down")
    with pytest.raises(StorageError, match="the endpoint is down"):
        run(output, "webdataset", file_size_mb=0.008, reader=DictReader(content))
    del before["_SUCCESS"]
    assert found(output, "webdataset") == before


def test_source_that_has_gone_as_a_whole_is_an_error(tmp_path: Path) -> None:
    output, _ = images_output(tmp_path)
    run(output, "webdataset")
    before = samples(output)
    (tmp_path / "in put").rename(tmp_path / "moved")
    with pytest.raises(StorageError, match="not one image could be read again"):
        run(output, "webdataset")
    assert samples(output) == before


class MeetingReader:
    """Lets reads go only when 16 are in flight, and counts them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.barrier = threading.Barrier(16)
        self.lock = threading.Lock()
        self.in_flight = self.most = 0

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        with self.lock:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
        self.barrier.wait(timeout=60)
        with self.lock:
            self.in_flight -= 1
        return self.data


def test_16_images_are_read_at_a_time(tmp_path: Path) -> None:
    data = encode(base_picture(), "JPEG")
    width, height = base_picture().size
    output = write_output(tmp_path, [row(i, size=len(data), width=width, height=height) for i in range(16)])
    reader = MeetingReader(data)
    assert run(output, "webdataset", reader=reader)["rows"] == 16
    assert reader.most == 16


# What all formats share


def test_marker_says_what_the_export_holds(output: str) -> None:
    outcome = run(output, "jsonl")
    assert json.loads(found(output, "jsonl")["_SUCCESS"]) == outcome
    assert outcome["format"] == "jsonl"
    assert outcome["captions_finished_at"] == NOW.isoformat()


@pytest.mark.parametrize("format_", ["jsonl", "parquet", "webdataset"])
def test_export_with_fewer_files_removes_those_left_over(tmp_path: Path, format_: str) -> None:
    output, _ = images_output(tmp_path)
    run(output, format_, file_size_mb=0.001)
    assert len(found(output, format_)) > 3
    (Path(output) / format_ / "notes.txt").write_text("the user's own")
    (Path(output) / format_ / "part-of-speech.jsonl").write_text("the user's own")
    outcome = run(output, format_)
    assert outcome["files"] == 1
    kept = set(found(output, format_)) - {"part-00000.jsonl", "part-00000.parquet", "shard-000000.tar"}
    assert kept == {"_SUCCESS", "notes.txt", "part-of-speech.jsonl"}


def test_parquet_partitioned_otherwise_replaces_the_partitions(output: str) -> None:
    run(output, "parquet", partition_by="folder")
    run(output, "parquet", partition_by="status")
    assert {name.partition("=")[0] for name in found(output, "parquet")} == {"status", "_SUCCESS"}
    run(output, "parquet")
    assert set(found(output, "parquet")) == {"part-00000.parquet", "_SUCCESS"}


@pytest.mark.parametrize("format_", ["jsonl", "coco", "parquet", "webdataset"])
def test_unfinished_output_is_refused(tmp_path: Path, format_: str) -> None:
    output = write_output(tmp_path / "out", some_rows())
    (tmp_path / "out" / SUMMARY).unlink()
    with pytest.raises(ConfigurationError, match=r"no summary\.json here.*raycap caption command finish first"):
        run(output, format_)
    with pytest.raises(ConfigurationError, match="no finished output"):
        run(str(tmp_path / "nowhere"), format_)
    assert found(output, format_) == {}


@pytest.mark.parametrize("format_", ["jsonl", "coco", "parquet", "webdataset"])
def test_lost_rows_are_noticed(tmp_path: Path, format_: str) -> None:
    output, _ = images_output(tmp_path)
    run(output, format_)
    Path(output, part_key(1)).unlink()
    with pytest.raises(StorageError, match=r"expected 13 rows .* got 7"):
        run(output, format_)
    assert "_SUCCESS" not in found(output, format_)


def test_changed_captions_are_refused(output: str) -> None:
    def refused(data: bytes, message: str) -> None:
        Path(output, part_key(1)).write_bytes(data)
        with pytest.raises(StorageError, match=message):
            run(output, "jsonl")

    sink = io.BytesIO()
    pq.write_table(pa.table({"row_id": [1]}), sink)
    refused(sink.getvalue(), r"part-00001.parquet was not written by raycap: no column alternatives, caption")
    refused(b"PAR1", r"part-00001.parquet cannot be read")


def test_other_files_among_the_captions_do_not_matter(output: str) -> None:
    Path(output, "captions/notes.txt").write_text("the user's own")
    Path(output, "captions/part-00001.parquet.bak").write_text("the user's own")
    assert run(output, "jsonl")["rows"] == 40


def test_output_without_rows(tmp_path: Path) -> None:
    output = write_output(tmp_path, [])
    Path(output, "captions").mkdir()
    for format_ in ("jsonl", "coco", "parquet", "webdataset"):
        assert run(output, format_)["rows"] == 0
        assert "_SUCCESS" in found(output, format_)


def test_progress_is_logged(output: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(files, "LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, "raycap"):
        run(output, "coco")
    assert "exported 1 of 40 (2%), 0 left out" in caplog.messages[0]
    assert "exported 40 of 40 (100%), 12 left out" in caplog.messages[-2]
    assert "28 rows in 2 files" in caplog.messages[-1]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="--file-size-mb must be above 0, got 0"):
        ExportConfig(output="out", format="jsonl", file_size_mb=0)
    with pytest.raises(ConfigurationError, match="--partition-by is for --format parquet, not jsonl"):
        ExportConfig(output="out", format="jsonl", partition_by="status")
