"""The manifest: a listing, numbered and frozen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa
import pytest

from raycap.bulk import listing as module
from raycap.bulk.config import Selection
from raycap.bulk.layout import CHUNK_ROWS, CHUNKS_PER_SHARD, SHARD_ROWS, Round, num_chunks
from raycap.bulk.listing import make_manifest
from raycap.bulk.manifest import WORK_SCHEMA, Manifest, ManifestReader, load_manifest
from raycap.bulk.sources import Rows, SourceRow, open_source
from raycap.errors import NotFoundError, StorageError
from raycap.storage import LocalStore, S3Options, Span
from tests.outputs import FakeSource, numbered

FIRST = Round(0)
ODD_KEYS = [
    "ünï/日本語/😀.jpg",
    "new\nline.jpg",
    "100%.jpg",
    "a%20b+c.jpg",
    "quote\"'`.jpg",
    " lead and trail ",
    "tab\t.jpg",
    "/".join(["k" * 200] * 4) + ".jpg",
]


class BrokenSource(FakeSource):
    """The network goes before a key is listed."""

    broken_at: str | None = None

    def _candidates(self, span: Span, after: str) -> Iterator[SourceRow]:
        for row in super()._candidates(span, after):
            if row.key == self.broken_at:
                raise StorageError("the network is gone")
            yield row


class NotingOutput(LocalStore):
    """Notes how many objects were listed at each write."""

    def __init__(self, path: Path, source: FakeSource) -> None:
        super().__init__(str(path))
        self.source = source
        self.listed_at: dict[str, int] = {}

    def write(self, key: str, data: bytes) -> None:
        self.listed_at[key] = len(self.source.listed)
        super().write(key, data)


def make(folder: Path, *keys: str) -> LocalStore:
    for key in keys:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())
    return LocalStore(str(folder))


def listed(source: LocalStore, output: LocalStore, **selection: Any) -> tuple[Manifest, list[str]]:
    """The manifest of a folder, and its keys."""
    settings = {"all_files": True} | selection
    chosen = open_source(source.location, Selection(**settings), S3Options(), output=output.location)
    manifest = make_manifest(chosen, output, FIRST)
    return manifest, table_of(output, manifest)["key"].to_pylist()


def table_of(output: LocalStore, manifest: Manifest) -> pa.Table:
    reader = ManifestReader(output, manifest)
    return pa.concat_tables([reader.chunk(chunk) for chunk in range(num_chunks(manifest.num_rows))])


def test_listing_is_written_in_bounded_pieces(tmp_path: Path) -> None:
    source = FakeSource(numbered(2 * SHARD_ROWS + 10))
    output = NotingOutput(tmp_path, source)
    manifest = make_manifest(source, output, FIRST)
    assert manifest.num_rows == 2 * SHARD_ROWS + 10
    assert manifest.num_bytes == sum(crc32(key.encode()) % 7 for key in source.objects)
    # Each shard is written when its rows are listed, before the next ones are; the manifest's own file comes last.
    assert output.listed_at == {
        FIRST.listing: 0,
        FIRST.shard(0, 0): SHARD_ROWS,
        FIRST.shard(0, 1): 2 * SHARD_ROWS,
        FIRST.shard(0, 2): manifest.num_rows,
        FIRST.manifest: manifest.num_rows,
    }


@pytest.mark.parametrize("num_rows", [1, CHUNK_ROWS, CHUNK_ROWS + 1, SHARD_ROWS, SHARD_ROWS + 1, 2 * SHARD_ROWS])
@pytest.mark.parametrize("num_spans", [1, 3, 50])
def test_chunks_hold_every_row_once_and_in_order(tmp_path: Path, num_rows: int, num_spans: int) -> None:
    output = LocalStore(str(tmp_path))
    manifest = make_manifest(FakeSource(numbered(num_rows), num_spans), output, FIRST)
    reader = ManifestReader(output, manifest)
    chunks = [reader.chunk(chunk) for chunk in range(num_chunks(num_rows))]
    table = pa.concat_tables(chunks)
    assert table.schema.equals(WORK_SCHEMA)
    assert table["row_id"].to_pylist() == table["position"].to_pylist() == list(range(num_rows))
    assert table["key"].to_pylist() == list(numbered(num_rows))
    assert all(chunk.num_rows == CHUNK_ROWS for chunk in chunks[:-1])
    assert [reader.chunk(chunk) for chunk in reversed(range(num_chunks(num_rows)))] == chunks[::-1]


def test_parts_of_the_listing_without_rows_do_not_matter(tmp_path: Path) -> None:
    class Gaps(FakeSource):
        def rows(self, span: Span, *, after: str = "", taken: int = 0) -> Rows:
            keep = [] if span.prefix == "empty" else self._candidates(span, after)
            return Rows(keep, Selection(all_files=True), taken)

        def spans(self, num: int) -> list[Span]:
            empty = Span(prefix="empty")
            return [empty, *(each for span in super().spans(num) for each in (span, empty, empty))]

    output = LocalStore(str(tmp_path))
    manifest = make_manifest(Gaps(numbered(600), 7), output, FIRST)
    assert table_of(output, manifest)["key"].to_pylist() == list(numbered(600))


def test_every_column_is_the_listing(tmp_path: Path) -> None:
    source, output = make(tmp_path / "images", "a.jpg", "b/c.png", "d.txt"), LocalStore(str(tmp_path / "out"))
    manifest, _ = listed(source, output, all_files=False)
    assert table_of(output, manifest).to_pylist() == [
        {
            **{"position": number, "row_id": number, "uri": info.uri, "key": info.key},
            **{"etag": info.etag, "size": info.size, "skip": "other_suffix" if info.key == "d.txt" else None},
        }
        for number, info in enumerate(source.list())
    ]


def test_selection_chooses_and_is_counted(tmp_path: Path) -> None:
    source, output = make(tmp_path / "images", "a.jpg", "b/c.png", "b/d.jpg"), LocalStore(str(tmp_path / "out"))
    manifest, keys = listed(source, output, include=("*.jpg",))
    assert (keys, manifest.num_filtered) == (["a.jpg", "b/d.jpg"], 1)


def test_selection_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "a.jpg")
    with pytest.raises(NotFoundError, match="the selection left out all 1"):
        listed(source, LocalStore(str(tmp_path / "out")), include=("*.png",))


def test_odd_keys_survive(tmp_path: Path) -> None:
    source = make(tmp_path / "images", *ODD_KEYS)
    _, keys = listed(source, LocalStore(str(tmp_path / "out")))
    assert sorted(keys) == sorted(ODD_KEYS)
    assert [source.read(key) for key in keys] == [key.encode() for key in keys]


def test_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "good.jpg")
    (tmp_path / "images" / os.fsdecode(b"bad\xff.jpg")).write_bytes(b"x")
    _, keys = listed(source, LocalStore(str(tmp_path / "out")))
    assert [source.read(key) for key in keys] == [b"x", b"good.jpg"]


@pytest.mark.parametrize("inside", ["out", "deep/er/out"])
def test_output_inside_the_source_is_left_out(tmp_path: Path, inside: str) -> None:
    source = make(tmp_path, "a.jpg", "out-of-doors.jpg", f"{inside}/_raycap/run.json", f"{inside}/summary.json")
    assert listed(source, LocalStore(str(tmp_path / inside)))[1] == ["a.jpg", "out-of-doors.jpg"]


def test_output_inside_the_source_is_left_out_behind_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", "a.jpg", "out/_raycap/run.json")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    source, output = LocalStore(str(tmp_path / "link")), LocalStore(str(tmp_path / "real" / "out"))
    assert listed(source, output)[1] == ["a.jpg"]


def test_output_beside_the_source_hides_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "images-out/a.jpg", "b.jpg")
    assert len(listed(source, LocalStore(str(tmp_path / "images-out")))[1]) == 2


def test_empty_source_is_an_error_and_freezes_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    output = LocalStore(str(tmp_path / "out"))
    with pytest.raises(NotFoundError, match="there are no objects here"):
        listed(LocalStore(str(tmp_path / "images")), output)
    assert load_manifest(output, FIRST) is None


def test_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    def fingerprint(name: str, objects: dict[str, str]) -> str:
        return make_manifest(FakeSource(objects), LocalStore(str(tmp_path / name)), FIRST).fingerprint

    base = fingerprint("1", {"a": "e", "b": "f"})
    assert base == fingerprint("2", {"a": "e", "b": "f"})
    others = [{"a": "e"}, {"a": "changed", "b": "f"}, {"renamed": "e", "b": "f"}, {"b": "f", "a": "e"}]
    assert len({base, *(fingerprint(f"other {number}", other) for number, other in enumerate(others))}) == 5


@pytest.mark.parametrize("num_spans", [1, 4])
@pytest.mark.parametrize("num_rows", [SHARD_ROWS + 50, 3 * SHARD_ROWS, 5 * SHARD_ROWS + 1])
def test_listing_that_broke_off_goes_on_after_its_last_shards(tmp_path: Path, num_rows: int, num_spans: int) -> None:
    whole = make_manifest(FakeSource(numbered(num_rows), num_spans), LocalStore(str(tmp_path / "whole")), FIRST)
    output, source = LocalStore(str(tmp_path / "out")), BrokenSource(numbered(num_rows), num_spans)
    source.broken_at = f"{num_rows - 10:06d}.jpg"
    with pytest.raises(StorageError, match="the network is gone"):
        make_manifest(source, output, FIRST)
    assert load_manifest(output, FIRST) is None
    source.broken_at, source.listed = None, []
    manifest = make_manifest(source, output, FIRST)
    assert manifest == whole
    assert table_of(output, manifest)["key"].to_pylist() == list(numbered(num_rows))
    assert len(source.listed) < num_rows


def test_shards_without_their_listing_are_no_start(tmp_path: Path) -> None:
    output, source = LocalStore(str(tmp_path)), BrokenSource(numbered(3 * SHARD_ROWS))
    source.broken_at = f"{2 * SHARD_ROWS + 1:06d}.jpg"
    with pytest.raises(StorageError, match="the network is gone"):
        make_manifest(source, output, FIRST)
    output.delete(FIRST.listing)
    output.delete(FIRST.shard(0, 0))
    source.broken_at = None
    assert len(table_of(output, make_manifest(source, output, FIRST))) == 3 * SHARD_ROWS


def test_progress_of_a_long_listing_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOG_EVERY_ROWS", 4000)
    caplog.set_level("INFO", "raycap")
    told: list[int] = []
    make_manifest(FakeSource(numbered(9000)), LocalStore(str(tmp_path)), FIRST, on_listed=told.append)
    assert told == list(range(1000, 10_000, 1000))
    assert [record.args for record in caplog.records] == [("/nowhere", 4000), ("/nowhere", 8000)]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"num_rows": 1}', b"3"])
def test_changed_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    output = LocalStore(str(tmp_path))
    output.write(FIRST.manifest, content)
    with pytest.raises(StorageError, match=r"manifest\.json was changed: .*start over"):
        load_manifest(output, FIRST)


def test_manifest_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    output = LocalStore(str(tmp_path))
    manifest = make_manifest(FakeSource(numbered(3)), output, FIRST)
    assert load_manifest(output, FIRST) == manifest
    assert set(json.loads(output.read(FIRST.manifest))) == set(asdict(manifest))


def test_changed_or_missing_shard_is_refused(tmp_path: Path) -> None:
    output, other = LocalStore(str(tmp_path / "1")), LocalStore(str(tmp_path / "2"))
    manifest = make_manifest(FakeSource(numbered(SHARD_ROWS + 3)), output, FIRST)
    make_manifest(FakeSource(numbered(4)), other, FIRST)

    def refused(data: bytes | None, message: str) -> None:
        key = FIRST.shard(0, 1)
        output.delete(key) if data is None else output.write(key, data)
        with pytest.raises(StorageError, match=message):
            ManifestReader(output, manifest).chunk(CHUNKS_PER_SHARD)

    refused(other.read(FIRST.shard(0, 0)), "was changed")  # rows of another manifest
    refused(b"no parquet", "not a manifest shard")
    refused(None, "not a manifest shard")


def test_chunks_of_a_manifest_that_was_deleted_do_not_pass_for_those_of_the_next(tmp_path: Path) -> None:
    output = LocalStore(str(tmp_path))
    make_manifest(FakeSource(numbered(1)), output, FIRST)
    output.write(FIRST.chunk(0), b"captions of something")
    for key in (FIRST.manifest, FIRST.listing, FIRST.shard(0, 0)):
        output.delete(key)
    make_manifest(FakeSource(numbered(2)), output, FIRST)
    assert not output.exists(FIRST.chunk(0))
