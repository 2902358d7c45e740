"""Exactly one row for every manifest row: chunk files, the check, the final files."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycap.bulk import commit
from raycap.bulk.commit import Tally, chunks_of_parts, commit_chunk, delete_parts, finish_part, missing_chunks, tally
from raycap.bulk.layout import CHUNK_ROWS, CHUNKS_PREFIX, chunk_key, chunk_rows, num_chunks, part_key
from raycap.bulk.rows import OUTPUT_SCHEMA, STAGES
from raycap.errors import StorageError
from raycap.storage import LocalStore

NUM_ROWS = 2 * CHUNK_ROWS + 10


@pytest.fixture
def output(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def row(row_id: int, **changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "row_id": row_id,
        "uri": f"/images/{row_id}\n%20 ü.jpg",
        "key": f"{row_id}\n%20 ü.jpg",
        "etag": "e",
        "size": 10,
        "status": "ok",
        "error_code": None,
        "error": None,
        "caption": f"a picture of {row_id}",
        "log_prob": -1.0,
        "alternatives": [{"caption": "another", "log_prob": -2.0}],
        "width": 4,
        "height": 3,
        "model_id": "m",
        "captioned_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return good | dict.fromkeys(STAGES, 0.5) | changes


def failed(row_id: int, code: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("caption", "log_prob", "alternatives", "width", "height"))
    return row(row_id, status="failed", error_code=code, error=f"{code} at {row_id}", **nothing)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    stages = [pa.field(name, pa.float64()) for name in STAGES]
    return pa.Table.from_pylist(rows, pa.schema([*OUTPUT_SCHEMA, *stages]))


def chunk_table(chunk: int, num_rows: int = NUM_ROWS) -> pa.Table:
    return table([row(row_id) for row_id in chunk_rows(chunk, num_rows)])


def commit_all(output: LocalStore, num_rows: int = NUM_ROWS) -> None:
    for chunk in range(num_chunks(num_rows)):
        assert commit_chunk(chunk_table(chunk, num_rows), output, num_rows) == chunk


def read(output: LocalStore, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(output.read(key)))


def test_chunk_file_is_named_by_its_rows(output: LocalStore) -> None:
    assert commit_chunk(chunk_table(1), output, NUM_ROWS) == 1
    assert [info.key for info in output.list()] == [chunk_key(1)]
    assert read(output, chunk_key(1)).schema.names == [*OUTPUT_SCHEMA.names, *STAGES]


def test_chunk_that_is_done_twice_is_one_file(output: LocalStore) -> None:
    commit_chunk(chunk_table(2), output, NUM_ROWS)
    commit_chunk(chunk_table(2), output, NUM_ROWS)
    assert [info.key for info in output.list()] == [chunk_key(2)]
    assert read(output, chunk_key(2)).num_rows == 10


def test_commit_refuses_lost_doubled_and_shuffled_rows(output: LocalStore) -> None:
    whole = chunk_table(1)
    broken = {
        "the last is lost": whole.slice(0, CHUNK_ROWS - 1),
        "one inside is lost": pa.concat_tables([whole.slice(0, 5), whole.slice(6)]),
        "one is doubled": pa.concat_tables([whole.slice(0, 6), whole.slice(5)]),
        "one is replaced by its neighbour": whole.take([0, 0, *range(2, CHUNK_ROWS)]),
        "order": whole.take([0, 2, 1, *range(3, CHUNK_ROWS)]),
        "two chunks": pa.concat_tables([whole, chunk_table(2)]),
        "past the end": table([row(row_id) for row_id in range(2 * CHUNK_ROWS, 3 * CHUNK_ROWS)]),
    }
    for name, rows in broken.items():
        with pytest.raises(AssertionError, match="rows lost or doubled"):
            commit_chunk(rows, output, NUM_ROWS)
        assert list(output.list()) == [], name


def test_missing_chunks(output: LocalStore) -> None:
    Path(output.location).mkdir(exist_ok=True)
    assert missing_chunks(output, NUM_ROWS).tolist() == [0, 1, 2]
    commit_chunk(chunk_table(1), output, NUM_ROWS)
    assert missing_chunks(output, NUM_ROWS).tolist() == [0, 2]
    commit_all(output)
    assert missing_chunks(output, NUM_ROWS).tolist() == []


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", "00000001.parquet.bak", "00000099.parquet", "-1.parquet"])
def test_other_files_among_the_chunks_do_not_matter(output: LocalStore, name: str) -> None:
    output.write(f"{CHUNKS_PREFIX}{name}", b"")
    assert missing_chunks(output, NUM_ROWS).tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_rows", [1, CHUNK_ROWS, NUM_ROWS, 7 * CHUNK_ROWS])
@pytest.mark.parametrize("rows_per_file", [1, CHUNK_ROWS, 3 * CHUNK_ROWS - 1, 10**9])
def test_parts_take_every_chunk_once(num_rows: int, rows_per_file: int) -> None:
    parts = chunks_of_parts(num_rows, rows_per_file)
    assert [chunk for part in parts for chunk in part] == list(range(num_chunks(num_rows)))
    assert all(len(part) * CHUNK_ROWS <= max(rows_per_file, CHUNK_ROWS) for part in parts)


def test_parts_join_the_chunks_in_order(output: LocalStore) -> None:
    commit_all(output)
    total = Tally()
    for part, chunks in enumerate(chunks_of_parts(NUM_ROWS, 2 * CHUNK_ROWS)):
        total.add(finish_part(output, part, chunks, NUM_ROWS))
    parts = [read(output, part_key(part)) for part in range(2)]
    assert [part.num_rows for part in parts] == [2 * CHUNK_ROWS, 10]
    assert all(part.schema.equals(OUTPUT_SCHEMA) for part in parts)
    assert pa.concat_tables(parts).to_pylist() == [
        {name: row(row_id)[name] for name in OUTPUT_SCHEMA.names} for row_id in range(NUM_ROWS)
    ]
    assert total.num_rows == NUM_ROWS


def test_row_groups_are_larger_than_chunks(output: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "CHUNKS_PER_ROW_GROUP", 2)
    commit_all(output)
    finish_part(output, 0, range(3), NUM_ROWS)
    metadata = pq.ParquetFile(io.BytesIO(output.read(part_key(0)))).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [2 * CHUNK_ROWS, 10]


def test_changed_chunk_files_are_refused(output: LocalStore) -> None:
    def refused(data: bytes | None, message: str) -> None:
        commit_all(output)
        output.delete(chunk_key(1)) if data is None else output.write(chunk_key(1), data)
        with pytest.raises(StorageError, match=message) as raised:
            finish_part(output, 0, range(3), NUM_ROWS)
        assert output.uri(chunk_key(1)) in str(raised.value)
        assert "run the same command again" in str(raised.value)
        assert not output.exists(part_key(0))

    def written(rows: pa.Table) -> bytes:
        sink = io.BytesIO()
        pq.write_table(rows, sink)
        return sink.getvalue()

    refused(written(chunk_table(1).slice(1)), "was changed")
    refused(written(chunk_table(0)), "was changed")
    refused(written(chunk_table(1).drop_columns(["caption"])), "was changed")
    refused(written(pa.table({"x": [1]})), "was changed")
    refused(written(chunk_table(1))[:-20], "not a Parquet file")
    refused(b"", "not a Parquet file")
    refused(None, "has gone")


def test_parts_of_an_earlier_try_are_deleted(output: LocalStore) -> None:
    for part in range(4):
        output.write(part_key(part), b"old")
    output.write("captions/notes.txt", b"the user's own")
    output.write("captions/part-of-speech.parquet", b"the user's own")
    delete_parts(output, 2)
    kept = {info.key for info in output.list()}
    assert kept == {part_key(0), part_key(1), "captions/notes.txt", "captions/part-of-speech.parquet"}


def test_tally_counts_rows_errors_bytes_and_seconds() -> None:
    skipped = failed(3, "other_suffix") | {"status": "skipped"}
    counted = tally(table([row(0), failed(1, "corrupt"), failed(2, "corrupt"), skipped, row(4, size=2**40)]))
    assert counted.num_rows == 5
    assert counted.to_dict() == {
        "num_objects": 5,
        "num_bytes": 40 + 2**40,
        "counts": {"ok": 2, "failed": 2, "skipped": 1},
        "errors": [
            {"code": "corrupt", "count": 2, "example_uri": row(1)["uri"], "example_error": "corrupt at 1"},
            {"code": "other_suffix", "count": 1, "example_uri": row(3)["uri"], "example_error": "other_suffix at 3"},
        ],
        "stage_s": {"fetch": 2.5, "decode": 2.5, "caption": 2.5},
    }
    json.dumps(counted.to_dict())


def test_tallies_of_parts_add_up_to_that_of_the_whole() -> None:
    rows = [row(0), failed(1, "corrupt"), failed(2, "empty"), row(3), failed(4, "corrupt"), failed(5, "truncated")]
    total = Tally()
    for start in range(0, len(rows), 2):
        total.add(tally(table(rows[start : start + 2])))
    assert total == tally(table(rows))
