"""The manifest: a listing, numbered and frozen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raycap.bulk import manifest as module
from raycap.bulk.layout import CHUNK_ROWS, CHUNKS_PER_SHARD, MANIFEST, chunk_key, num_chunks, shard_key
from raycap.bulk.manifest import SCHEMA, open_manifest, read_chunk
from raycap.errors import NotFoundError, StorageError
from raycap.storage import LocalStore, ObjectInfo, open_store

SHARD_ROWS = CHUNK_ROWS * CHUNKS_PER_SHARD
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


class FakeSource(LocalStore):
    """Lists `num_objects` objects that do not exist; notes how far it was read when something else happens."""

    def __init__(self, num_objects: int, path: str = "/nowhere") -> None:
        super().__init__(path)
        self.num_objects = num_objects
        self.num_listed = 0

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for number in range(self.num_objects):
            self.num_listed = number + 1
            yield ObjectInfo(f"{number:06d}.jpg", f"/nowhere/{number:06d}.jpg", number % 7, f"e{number}")


class NotingOutput(LocalStore):
    """Notes how many objects were listed at each write."""

    def __init__(self, path: Path, source: FakeSource) -> None:
        super().__init__(str(path))
        self.source = source
        self.listed_at: dict[str, int] = {}

    def write(self, key: str, data: bytes) -> None:
        self.listed_at[key] = self.source.num_listed
        super().write(key, data)


def make(folder: Path, *keys: str) -> LocalStore:
    for key in keys:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())
    return LocalStore(str(folder))


def keys_of(output: LocalStore, num_rows: int) -> list[str]:
    return [
        key for chunk in range(num_chunks(num_rows)) for key in read_chunk(output, chunk, num_rows)["key"].to_pylist()
    ]


def test_listing_is_written_in_bounded_pieces(tmp_path: Path) -> None:
    source = FakeSource(2 * SHARD_ROWS + 10)
    output = NotingOutput(tmp_path, source)
    manifest = open_manifest(source, output)
    assert manifest.num_rows == 2 * SHARD_ROWS + 10
    assert manifest.num_bytes == sum(number % 7 for number in range(manifest.num_rows))
    # Each shard is written when its rows are listed, before the next ones are; the manifest's own file comes last.
    assert output.listed_at == {
        shard_key(0): SHARD_ROWS,
        shard_key(1): 2 * SHARD_ROWS,
        shard_key(2): manifest.num_rows,
        MANIFEST: manifest.num_rows,
    }


@pytest.mark.parametrize("num_rows", [1, CHUNK_ROWS, CHUNK_ROWS + 1, SHARD_ROWS, SHARD_ROWS + 1])
def test_chunks_hold_every_row_once_and_in_order(tmp_path: Path, num_rows: int) -> None:
    output = LocalStore(str(tmp_path))
    open_manifest(FakeSource(num_rows), output)
    chunks = [read_chunk(output, chunk, num_rows) for chunk in range(num_chunks(num_rows))]
    table = pa.concat_tables(chunks)
    assert table.schema.equals(SCHEMA)
    assert table["row_id"].to_pylist() == list(range(num_rows))
    assert table["key"].to_pylist() == [f"{number:06d}.jpg" for number in range(num_rows)]
    assert all(chunk.num_rows == CHUNK_ROWS for chunk in chunks[:-1])


def test_every_column_is_the_listing(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "a.jpg", "b/c.png")
    output = LocalStore(str(tmp_path / "out"))
    open_manifest(source, output)
    rows = read_chunk(output, 0, 2).to_pylist()
    assert rows == [
        {"row_id": number, "uri": info.uri, "key": info.key, "etag": info.etag, "size": info.size}
        for number, info in enumerate(source.list())
    ]


def test_odd_keys_survive(tmp_path: Path) -> None:
    source = make(tmp_path / "images", *ODD_KEYS)
    output = LocalStore(str(tmp_path / "out"))
    manifest = open_manifest(source, output)
    keys = keys_of(output, manifest.num_rows)
    assert sorted(keys) == sorted(ODD_KEYS)
    assert [source.read(key) for key in keys] == [key.encode() for key in keys]


def test_name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "good.jpg")
    (tmp_path / "images" / os.fsdecode(b"bad\xff.jpg")).write_bytes(b"x")
    output = LocalStore(str(tmp_path / "out"))
    assert [source.read(key) for key in keys_of(output, open_manifest(source, output).num_rows)] == [b"x", b"good.jpg"]


@pytest.mark.parametrize("inside", ["out", "deep/er/out"])
def test_output_inside_the_source_is_left_out(tmp_path: Path, inside: str) -> None:
    source = make(tmp_path, "a.jpg", "out-of-doors.jpg", f"{inside}/_raycap/run.json", f"{inside}/summary.json")
    output = LocalStore(str(tmp_path / inside))
    assert keys_of(output, open_manifest(source, output).num_rows) == ["a.jpg", "out-of-doors.jpg"]


def test_output_inside_the_source_is_left_out_behind_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", "a.jpg", "out/_raycap/run.json")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    source, output = LocalStore(str(tmp_path / "link")), LocalStore(str(tmp_path / "real" / "out"))
    assert keys_of(output, open_manifest(source, output).num_rows) == ["a.jpg"]


def test_output_beside_the_source_hides_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "images-out/a.jpg", "b.jpg")
    output = LocalStore(str(tmp_path / "images-out"))
    assert open_manifest(source, output).num_rows == 2


def test_empty_source_is_an_error_and_freezes_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    source, output = open_store(tmp_path / "images"), open_store(tmp_path / "out")
    with pytest.raises(NotFoundError, match="there are no objects here"):
        open_manifest(source, output)
    assert not output.exists(MANIFEST)


def test_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    def fingerprint(name: str, *infos: ObjectInfo) -> str:
        class Source(FakeSource):
            def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
                yield from infos

        return open_manifest(Source(0), LocalStore(str(tmp_path / name))).fingerprint

    base = fingerprint("1", ObjectInfo("a", "/a", 1, "e"), ObjectInfo("b", "/b", 1, "f"))
    assert base == fingerprint("2", ObjectInfo("a", "/a", 1, "e"), ObjectInfo("b", "/b", 1, "f"))
    others = [
        fingerprint("3", ObjectInfo("a", "/a", 1, "e")),
        fingerprint("4", ObjectInfo("a", "/a", 1, "changed"), ObjectInfo("b", "/b", 1, "f")),
        fingerprint("5", ObjectInfo("renamed", "/a", 1, "e"), ObjectInfo("b", "/b", 1, "f")),
        fingerprint("6", ObjectInfo("b", "/b", 1, "f"), ObjectInfo("a", "/a", 1, "e")),
    ]
    assert len({base, *others}) == 5


def test_resuming_reads_the_frozen_manifest(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "b.jpg")
    output = LocalStore(str(tmp_path / "out"))
    before = open_manifest(source, output)
    make(tmp_path / "images", "a.jpg", "c.jpg")
    assert open_manifest(source, output) == before
    assert keys_of(output, before.num_rows) == ["b.jpg"]


def test_listing_that_broke_off_is_done_again(tmp_path: Path) -> None:
    class Broken(FakeSource):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            for info in super().list(prefix):
                if info.key == f"{SHARD_ROWS + 5:06d}.jpg":
                    raise StorageError("the network is gone")
                yield info

    output = LocalStore(str(tmp_path))
    with pytest.raises(StorageError, match="the network is gone"):
        open_manifest(Broken(SHARD_ROWS + 50), output)
    assert output.exists(shard_key(0))
    manifest = open_manifest(FakeSource(100), output)  # smaller meanwhile: the old shard is overwritten
    assert manifest.num_rows == 100
    assert len(keys_of(output, 100)) == 100


def test_progress_of_a_long_listing_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOG_EVERY_ROWS", SHARD_ROWS)
    caplog.set_level("INFO", "raycap")
    open_manifest(FakeSource(2 * SHARD_ROWS + 1), LocalStore(str(tmp_path)))
    assert [record.args for record in caplog.records] == [("/nowhere", SHARD_ROWS), ("/nowhere", 2 * SHARD_ROWS)]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"num_rows": 1}', b"3"])
def test_changed_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    output = LocalStore(str(tmp_path))
    output.write(MANIFEST, content)
    with pytest.raises(StorageError, match=r"manifest\.json was changed: .*start over"):
        open_manifest(FakeSource(1), output)


def test_changed_or_missing_shard_is_refused(tmp_path: Path) -> None:
    output, other = LocalStore(str(tmp_path / "1")), LocalStore(str(tmp_path / "2"))
    open_manifest(FakeSource(SHARD_ROWS + 3), output)
    open_manifest(FakeSource(3), other)

    def refused(data: bytes | None, message: str) -> None:
        output.delete(shard_key(1)) if data is None else output.write(shard_key(1), data)
        with pytest.raises(StorageError, match=message):
            read_chunk(output, CHUNKS_PER_SHARD, SHARD_ROWS + 3)

    refused(other.read(shard_key(0)), "was changed")  # rows of another manifest
    refused(b"no parquet", "not a manifest shard")
    refused(None, "not a manifest shard")


def test_manifest_file_is_json_with_all_fields(tmp_path: Path) -> None:
    output = LocalStore(str(tmp_path))
    manifest = open_manifest(FakeSource(3), output)
    written: dict[str, Any] = json.loads(output.read(MANIFEST))
    assert written == {"num_rows": 3, "num_bytes": 0 + 1 + 2, "fingerprint": manifest.fingerprint}


def test_chunks_of_a_listing_that_was_deleted_do_not_pass_for_those_of_the_next(tmp_path: Path) -> None:
    source = make(tmp_path / "images", "a.jpg")
    output = LocalStore(str(tmp_path / "out"))
    open_manifest(source, output)
    output.write(chunk_key(0), b"captions of a.jpg")
    output.delete(MANIFEST)
    make(tmp_path / "images", "0.jpg")
    assert open_manifest(source, output).num_rows == 2
    assert not output.exists(chunk_key(0))
