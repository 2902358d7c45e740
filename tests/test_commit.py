"""Exactly one row for every manifest row: chunk files, the check, the final files, in the first round and later."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycap.bulk import commit
from raycap.bulk.commit import (
    CHUNK_COLUMNS,
    Tally,
    commit_chunk,
    delete_parts,
    missing_chunks,
    plan_parts,
    tally,
    write_part,
)
from raycap.bulk.layout import CHUNK_ROWS, Round, num_chunks, part_key
from raycap.bulk.listing import list_again, make_manifest
from raycap.bulk.manifest import Manifest, ManifestReader
from raycap.bulk.previous import Previous
from raycap.bulk.rows import OUTPUT_SCHEMA, STAGES
from raycap.bulk.sources import SourceRow
from raycap.errors import NotFoundError, StorageError
from raycap.storage import LocalStore, Span
from tests.outputs import FakeSource, captioned, commit_all, join, numbered

NUM_ROWS = 2 * CHUNK_ROWS + 10
FIRST, SECOND = Round(0), Round(1)


@pytest.fixture
def output(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


@pytest.fixture
def manifest(output: LocalStore) -> Manifest:
    return make_manifest(FakeSource(numbered(NUM_ROWS)), output, FIRST)


def chunk_table(output: LocalStore, manifest: Manifest, chunk: int) -> pa.Table:
    return captioned(ManifestReader(output, manifest).chunk(chunk))


def read(output: LocalStore, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(output.read(key)))


def rows_of(output: LocalStore) -> list[dict[str, Any]]:
    keys = sorted(info.key for info in output.list("captions/"))
    return pa.concat_tables([read(output, key) for key in keys]).to_pylist()


def test_chunk_file_is_named_by_its_place(output: LocalStore, manifest: Manifest) -> None:
    for _ in range(2):  # a chunk that is done twice is one file
        assert commit_chunk(chunk_table(output, manifest, 1), output, manifest) == 1
        assert [info.key for info in output.list(FIRST.chunks)] == [FIRST.chunk(1)]
    assert read(output, FIRST.chunk(1)).schema.names == CHUNK_COLUMNS


def test_commit_refuses_lost_doubled_and_shuffled_rows(output: LocalStore, manifest: Manifest) -> None:
    whole = chunk_table(output, manifest, 1)
    broken = {
        "the last is lost": whole.slice(0, CHUNK_ROWS - 1),
        "one inside is lost": pa.concat_tables([whole.slice(0, 5), whole.slice(6)]),
        "one is doubled": pa.concat_tables([whole.slice(0, 6), whole.slice(5)]),
        "one is replaced by its neighbour": whole.take([0, 0, *range(2, CHUNK_ROWS)]),
        "order": whole.take([0, 2, 1, *range(3, CHUNK_ROWS)]),
        "two chunks": pa.concat_tables([whole, chunk_table(output, manifest, 2)]),
    }
    for name, rows in broken.items():
        with pytest.raises(AssertionError, match="rows lost or doubled"):
            commit_chunk(rows, output, manifest)
        assert list(output.list(FIRST.chunks)) == [], name


def test_missing_chunks(output: LocalStore, manifest: Manifest) -> None:
    assert missing_chunks(output, manifest).tolist() == [0, 1, 2]
    commit_chunk(chunk_table(output, manifest, 1), output, manifest)
    assert missing_chunks(output, manifest).tolist() == [0, 2]
    commit_all(output, manifest)
    assert missing_chunks(output, manifest).tolist() == []


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", "00000001.parquet.bak", "00000099.parquet", "-1.parquet"])
def test_other_files_among_the_chunks_do_not_matter(output: LocalStore, manifest: Manifest, name: str) -> None:
    output.write(f"{FIRST.chunks}{name}", b"")
    assert missing_chunks(output, manifest).tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_rows", [1, CHUNK_ROWS, NUM_ROWS, 7 * CHUNK_ROWS])
@pytest.mark.parametrize("bytes_per_file", [1, 10_000, 25_000, 10**9])
def test_parts_take_every_chunk_once(output: LocalStore, num_rows: int, bytes_per_file: int) -> None:
    manifest = make_manifest(FakeSource(numbered(num_rows)), output, FIRST)
    commit_all(output, manifest)
    parts = plan_parts(output, manifest, bytes_per_file)
    assert [chunk for part in parts for chunk in part] == list(range(num_chunks(num_rows)))
    join(output, manifest, bytes_per_file)
    for number, part in enumerate(parts):
        size = len(output.read(part_key(number)))
        assert len(part) == 1 or size < 1.5 * bytes_per_file
    assert len(parts) == 1 or len(output.read(part_key(0))) > bytes_per_file / 3 or len(parts[0]) == 1


def test_parts_join_the_chunks_in_order(output: LocalStore, manifest: Manifest) -> None:
    commit_all(output, manifest)
    total = join(output, manifest, 5000)
    parts = [read(output, info.key) for info in output.list("captions/")]
    assert len(parts) == 3
    assert all(part.schema.equals(OUTPUT_SCHEMA) for part in parts)
    chunks = [chunk_table(output, manifest, chunk).select(OUTPUT_SCHEMA.names) for chunk in range(3)]
    assert rows_of(output) == pa.concat_tables(chunks).to_pylist()
    assert total.num_rows == NUM_ROWS


def test_row_groups_are_larger_than_chunks(
    output: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "CHUNKS_PER_ROW_GROUP", 2)
    commit_all(output, manifest)
    write_part(output, 0, range(3), manifest)
    metadata = pq.ParquetFile(io.BytesIO(output.read(part_key(0)))).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [2 * CHUNK_ROWS, 10]


def test_changed_chunk_files_are_refused(output: LocalStore, manifest: Manifest) -> None:
    key, good, others = FIRST.chunk(1), chunk_table(output, manifest, 1), chunk_table(output, manifest, 0)

    def refused(data: bytes | None, message: str) -> None:
        commit_all(output, manifest)
        output.delete(key) if data is None else output.write(key, data)
        with pytest.raises(StorageError, match=message) as raised:
            write_part(output, 0, range(3), manifest)
        assert output.uri(key) in str(raised.value)
        assert "run the same command again" in str(raised.value)
        assert not output.exists(part_key(0))

    def written(rows: pa.Table) -> bytes:
        sink = io.BytesIO()
        pq.write_table(rows, sink)
        return sink.getvalue()

    renamed = good.set_column(good.schema.get_field_index("uri"), "uri", others["uri"])
    refused(written(good.slice(1)), "was changed")
    refused(written(others), "was changed")
    refused(written(renamed), "was changed")  # the captions of other objects
    refused(written(good.drop_columns(["caption"])), "was changed")
    refused(written(pa.table({"x": [1]})), "was changed")
    refused(written(good)[:-20], "not a Parquet file")
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


# Later rounds


def update(output: LocalStore, objects: dict[str, str], retry: list[str] | None = None, **settings: Any) -> Manifest:
    manifest = make_manifest(FakeSource(objects, **settings), output, SECOND, Previous(output, retry))
    commit_all(output, manifest, text="a newer picture")
    return manifest


def finished(output: LocalStore, num_rows: int = NUM_ROWS, failing: tuple[str, ...] = ()) -> None:
    manifest = make_manifest(FakeSource(numbered(num_rows)), output, FIRST)
    commit_all(output, manifest, failing)
    join(output, manifest, 5000)


@pytest.mark.parametrize("num_spans", [1, 5])
def test_update_does_what_is_new_or_changed_and_drops_what_is_deleted(output: LocalStore, num_spans: int) -> None:
    finished(output)
    before = rows_of(output)
    objects = {key: etag for key, etag in numbered(NUM_ROWS).items() if key not in ("000003.jpg", "000300.jpg")}
    objects = {"000000-new.jpg": "n"} | objects | {"000005.jpg": "changed", "000400.jpg": "changed", "z-new.jpg": "n"}
    manifest = update(output, objects, num_spans=num_spans)
    assert (manifest.num_rows, manifest.num_new, manifest.num_replaced, manifest.num_deleted) == (4, 2, 2, 2)
    assert manifest.num_total == NUM_ROWS
    for _ in range(2):  # a join that is killed is done again
        total = join(output, manifest)
        assert total.num_rows == manifest.num_total
        rows = rows_of(output)
        assert {row["key"]: row["etag"] for row in rows} == objects
        assert len({row["row_id"] for row in rows}) == len(rows) == len(objects)
        assert [row["row_id"] for row in rows] == sorted(row["row_id"] for row in rows)
        newer = {row["key"] for row in rows if row["caption"].startswith("a newer")}
        assert newer == {"000000-new.jpg", "000005.jpg", "000400.jpg", "z-new.jpg"}
        old = {row["key"]: row for row in before}
        assert all(row == old[row["key"]] for row in rows if row["key"] not in newer)
        assert all(row["row_id"] == old[row["key"]]["row_id"] for row in rows if row["key"] in old), "ids are for good"
    gone = read(output, SECOND.deleted).to_pylist()
    assert [row["key"] for row in gone] == ["000003.jpg", "000300.jpg"]


def test_update_without_changes_has_nothing_to_do(output: LocalStore) -> None:
    finished(output)
    manifest = update(output, numbered(NUM_ROWS))
    assert (manifest.num_rows, manifest.num_deleted, manifest.num_total) == (0, 0, NUM_ROWS)
    assert not output.exists(SECOND.deleted)


def test_update_to_an_empty_source_is_refused(output: LocalStore) -> None:
    finished(output)
    with pytest.raises(NotFoundError, match="--update would drop all captions"):
        update(output, {})
    assert len(rows_of(output)) == NUM_ROWS


def test_ids_of_deleted_rows_are_not_given_again(output: LocalStore) -> None:
    finished(output)
    objects = numbered(NUM_ROWS + 1)
    del objects[f"{NUM_ROWS - 1:06d}.jpg"]
    previous = Previous(output, next_row_id=NUM_ROWS + 7)
    assert make_manifest(FakeSource(objects), output, SECOND, previous).first_row_id == NUM_ROWS + 7


def test_what_was_skipped_is_done_when_it_is_no_longer(output: LocalStore) -> None:
    manifest = make_manifest(FakeSource(numbered(5)), output, FIRST)
    rows = chunk_table(output, manifest, 0)
    status = rows.schema.get_field_index("status")
    commit_chunk(rows.set_column(status, "status", pa.array(["ok", "skipped", "ok", "ok", "ok"])), output, manifest)
    join(output, manifest)
    assert update(output, numbered(5)).num_replaced == 1


def test_address_that_is_named_twice_keeps_both_rows(output: LocalStore) -> None:
    class Twice(FakeSource):
        def _candidates(self, span: Span, after: str) -> Iterator[SourceRow]:
            for row in super()._candidates(span, after):
                yield row
                yield row._replace(etag=f"old {row.etag}")

    manifest = make_manifest(Twice(numbered(3)), output, FIRST)
    commit_all(output, manifest)
    join(output, manifest)
    before = rows_of(output)
    assert len(before) == 6
    same = make_manifest(Twice(numbered(3)), output, SECOND, Previous(output))
    assert (same.num_rows, same.num_deleted) == (0, 0)
    changed = make_manifest(Twice(numbered(3) | {"000001.jpg": "changed"}), output, SECOND, Previous(output))
    assert (changed.num_replaced, changed.num_new, changed.num_deleted) == (2, 0, 0)
    commit_all(output, changed, text="a newer picture")
    assert join(output, changed).num_rows == 6
    after = rows_of(output)
    assert [row["row_id"] for row in after] == list(range(6))
    assert [row for row in after if row["key"] != "000001.jpg"] == [row for row in before if row["key"] != "000001.jpg"]


def test_update_that_broke_off_starts_its_listing_again(output: LocalStore) -> None:
    finished(output)
    update(output, numbered(NUM_ROWS + 5000))
    output.delete(SECOND.manifest)
    manifest = update(output, numbered(NUM_ROWS + 3))
    assert manifest.num_rows == manifest.num_new == 3


@pytest.mark.parametrize(("codes", "num_retried"), [([], 2), (["fetch_failed"], 2), (["corrupt"], 0)])
def test_failed_rows_are_tried_again(output: LocalStore, codes: list[str], num_retried: int) -> None:
    finished(output, failing=("000007.jpg", "000511.jpg"))
    assert sum(row["status"] == "failed" for row in rows_of(output)) == 2
    manifest = list_again(output, SECOND, Previous(output, codes))
    assert (manifest.num_rows, manifest.num_replaced, manifest.num_new) == (num_retried, num_retried, 0)
    commit_all(output, manifest)
    assert join(output, manifest).num_rows == NUM_ROWS
    rows = rows_of(output)
    assert [row["row_id"] for row in rows] == list(range(NUM_ROWS))
    assert sum(row["status"] == "failed" for row in rows) == 2 - num_retried


def test_update_can_try_failed_rows_again_too(output: LocalStore) -> None:
    finished(output, failing=("000007.jpg",))
    assert update(output, numbered(NUM_ROWS)).num_rows == 0
    output.delete(SECOND.manifest)
    assert update(output, numbered(NUM_ROWS), retry=[]).num_replaced == 1


def test_addresses_with_the_same_half_digest_are_told_apart(
    output: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raycap.bulk import previous

    digests = previous._digests

    def colliding(texts: list[str]) -> Any:
        result = digests(texts).copy()
        result["high"] %= 3
        return result

    monkeypatch.setattr(previous, "_digests", colliding)
    finished(output, 50)
    objects = numbered(52) | {"000009.jpg": "changed"}
    del objects["000001.jpg"]
    manifest = update(output, objects)
    join(output, manifest)
    assert {row["key"]: row["etag"] for row in rows_of(output)} == objects
    assert (manifest.num_new, manifest.num_replaced, manifest.num_deleted) == (2, 1, 1)


# Counts


def row(row_id: int, **changes: Any) -> dict[str, Any]:
    good = dict.fromkeys(OUTPUT_SCHEMA.names) | {"row_id": row_id, "uri": f"/images/{row_id}.jpg", "size": 10}
    return good | {"status": "ok"} | dict.fromkeys(STAGES, 0.5) | changes


def failed(row_id: int, code: str) -> dict[str, Any]:
    return row(row_id, status="failed", error_code=code, error=f"{code} at {row_id}")


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, pa.schema([*OUTPUT_SCHEMA, *(pa.field(name, pa.float64()) for name in STAGES)]))


def test_tally_counts_rows_errors_bytes_and_seconds() -> None:
    skipped = failed(3, "other_suffix") | {"status": "skipped", "size": None}
    counted = tally(table([row(0), failed(1, "corrupt"), failed(2, "corrupt"), skipped, row(4, size=2**40)]))
    assert counted.num_rows == 5
    assert counted.to_dict() == {
        "num_objects": 5,
        "num_bytes": 30 + 2**40,
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
