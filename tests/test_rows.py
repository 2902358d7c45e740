"""Fetching, decoding and captioning of one chunk: every row stays, with a typed error where there is one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raycap.bulk.manifest import WORK_SCHEMA
from raycap.bulk.rows import (
    FAILED,
    OK,
    OUTPUT_SCHEMA,
    SKIPPED,
    STAGES,
    Fetcher,
    _from_binary,
    _to_binary,
    caption_rows,
)
from raycap.errors import CredentialsError, ObjectNotFoundError
from raycap.images import ImageLimits, Preprocessing, decode_image
from raycap.storage import LocalStore, Store
from tests.hostile import base_picture, encode, hostile_files

SIZE = 16
PREPROCESSING = Preprocessing(size_px=SIZE)


@dataclass(frozen=True)
class FakeAlternative:
    text: str
    log_prob: float


@dataclass(frozen=True)
class FakeCaption:
    text: str
    log_prob: float
    alternatives: tuple[FakeAlternative, ...]


class FakeCaptioner:
    """Says the mean of the pixels. Notes its batches."""

    preprocessing = PREPROCESSING
    model_id = "fake-1"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def caption_array(self, pixels_BHWC: np.ndarray) -> list[FakeCaption]:
        assert pixels_BHWC.dtype == np.uint8
        assert pixels_BHWC.shape[1:] == (SIZE, SIZE, 3)
        assert pixels_BHWC.flags.writeable  # torch warns of the others
        self.batches.append(len(pixels_BHWC))
        return [self.says(pixels_HWC) for pixels_HWC in pixels_BHWC]

    def says(self, pixels_HWC: np.ndarray) -> FakeCaption:
        mean = f"{pixels_HWC.mean():.3f}"
        return FakeCaption(mean, -1.5, (FakeAlternative(f"not {mean}", -2.5),))


def fetcher(source: Store, *, requests_in_flight: int = 4) -> Fetcher:
    return Fetcher(
        reader=source,
        reads_by="key",
        preprocessing=PREPROCESSING,
        limits=ImageLimits(),
        requests_in_flight=requests_in_flight,
    )


def manifest_of(keys: Sequence[str], skip: str | None = None, size: int | None = 1) -> pa.Table:
    num = len(keys)
    columns = {"position": range(num), "row_id": range(num), "uri": [f"/{key}" for key in keys], "key": keys}
    return pa.table(columns | {"etag": keys, "size": [size] * num, "skip": [skip] * num}, schema=WORK_SCHEMA)


def write_all(folder: Path, files: dict[str, bytes]) -> LocalStore:
    store = LocalStore(str(folder))
    for key, data in files.items():
        store.write(key, data)
    return store


def pixels_table(pixels_NSSC: np.ndarray) -> pa.Table:
    return pa.table({"pixels": _to_binary(pixels_NSSC)})


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return write_all(tmp_path_factory.mktemp("hostile"), {key: data for key, (data, _) in hostile_files().items()})


# Fetch and decode


def test_every_hostile_file_keeps_its_row_and_gets_its_own_code(hostile: LocalStore) -> None:
    keys = list(hostile_files())
    rows = fetcher(hostile)(manifest_of(keys))
    assert rows["key"].to_pylist() == keys
    codes = {row["key"]: row["error_code"] or "ok" for row in rows.drop_columns("pixels").to_pylist()}
    assert codes == {key: code for key, (_, code) in hostile_files().items()}
    for row in rows.drop_columns("pixels").to_pylist():
        good = row["error_code"] is None
        assert row["status"] == (OK if good else FAILED)
        assert (row["error"] is None) == good
        assert (row["width"] is None) == (row["height"] is None) == (not good)


def test_pixels_are_those_of_the_one_preprocessing(hostile: LocalStore) -> None:
    keys = list(hostile_files())
    pixels_NSSC = _from_binary(fetcher(hostile)(manifest_of(keys))["pixels"], SIZE)
    for key, pixels_HWC in zip(keys, pixels_NSSC, strict=True):
        data, code = hostile_files()[key]
        expected = decode_image(data, PREPROCESSING).pixels_HWC if code == "ok" else np.zeros((SIZE, SIZE, 3))
        assert np.array_equal(pixels_HWC, expected), key


def test_skipped_objects_are_not_fetched_and_say_why() -> None:
    class Untouchable(LocalStore):
        def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
            raise AssertionError(key)

    (row,) = fetcher(Untouchable("/"))(manifest_of(["a.txt"], skip="other_suffix")).drop_columns("pixels").to_pylist()
    assert (row["status"], row["error_code"]) == (SKIPPED, "other_suffix")
    assert "--all-files" in row["error"]


def test_sizes_that_the_manifest_does_not_tell_are_filled_in(tmp_path: Path) -> None:
    data = encode(base_picture(), "PNG")
    rows = fetcher(write_all(tmp_path, {"a.png": data}))(manifest_of(["a.png", "gone.png"], size=None))
    assert rows["size"].to_pylist() == [len(data), None]


def test_objects_can_be_read_by_address(tmp_path: Path) -> None:
    store = write_all(tmp_path, {"a.png": encode(base_picture(), "PNG")})
    by_uri = replace(fetcher(store), reads_by="uri")
    rows = manifest_of(["another name"])
    rows = rows.set_column(rows.schema.get_field_index("uri"), "uri", pa.array(["a.png"]))
    assert by_uri(rows)["status"].to_pylist() == [OK]


def test_object_that_has_gone_since_the_listing(tmp_path: Path) -> None:
    rows = fetcher(LocalStore(str(tmp_path)))(manifest_of(["gone.jpg"]))
    assert rows["error_code"].to_pylist() == ["not_found"]


def test_limits_are_kept(tmp_path: Path) -> None:
    data = encode(base_picture(), "PNG")
    store = write_all(tmp_path, {"a.png": data})
    for limits in (ImageLimits(max_bytes=len(data) - 1), ImageLimits(max_pixels=100)):
        small = replace(fetcher(store), limits=limits)
        assert small(manifest_of(["a.png"]))["error_code"].to_pylist() == ["too_large"]


def test_order_stays_though_later_objects_arrive_first() -> None:
    class Backwards(LocalStore):
        """The first of four objects asked for arrives when the fourth has."""

        def __init__(self) -> None:
            super().__init__("/")
            self.fourth_arrived = threading.Event()

        def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
            if key == "3":
                self.fourth_arrived.set()
            elif key == "0":
                assert self.fourth_arrived.wait(30)
            return encode(base_picture().resize((int(key) + 1, 1)), "PNG")

    rows = fetcher(Backwards(), requests_in_flight=4)(manifest_of([str(number) for number in range(9)]))
    assert rows["width"].to_pylist() == list(range(1, 10))


@pytest.mark.parametrize("bound", [1, 3, 8])
def test_requests_in_flight_are_bounded_and_reached(bound: int) -> None:
    class Crowded(LocalStore):
        def __init__(self) -> None:
            super().__init__("/")
            self.lock = threading.Lock()
            self.now = self.most = self.num_reads = 0
            self.full = threading.Barrier(bound)

        def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
            with self.lock:
                self.now, self.num_reads = self.now + 1, self.num_reads + 1
                self.most = max(self.most, self.now)
            if int(key) < bound:
                self.full.wait(30)  # the first ones are all under way at once
            with self.lock:
                self.now -= 1
            raise ObjectNotFoundError(key)

    source = Crowded()
    rows = fetcher(source, requests_in_flight=bound)(manifest_of([str(number) for number in range(5 * bound)]))
    assert source.most == bound
    assert source.num_reads == rows.num_rows == 5 * bound


def test_storage_that_will_not_get_better_stops_the_chunk() -> None:
    class Expired(LocalStore):
        num_reads = 0

        def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
            Expired.num_reads += 1
            raise CredentialsError("the session token has expired")

    with pytest.raises(CredentialsError, match="expired"):
        fetcher(Expired("/"), requests_in_flight=2)(manifest_of([str(number) for number in range(100)]))
    assert Expired.num_reads < 10  # the others were not asked for


def test_stage_seconds_are_shared_out_over_the_rows(hostile: LocalStore) -> None:
    rows = fetcher(hostile)(manifest_of(list(hostile_files())))
    for name in ("fetch_s", "decode_s"):
        seconds = rows[name].to_numpy()
        assert len(set(seconds)) == 1
        assert 0 <= seconds.sum() < 60


# Pixels as a column


@pytest.mark.parametrize("size", [15, 16])
def test_pixels_survive_the_column(size: int) -> None:
    pixels_NSSC = np.random.default_rng(0).integers(0, 256, (10, size, size, 3), np.uint8)
    table = pixels_table(pixels_NSSC)
    views = {
        "whole": (table, pixels_NSSC),
        "slice": (table.slice(3, 4), pixels_NSSC[3:7]),
        "slice of a slice": (table.slice(3, 6).slice(2, 2), pixels_NSSC[5:7]),
        "in pieces": (pa.concat_tables([table.slice(7), table.slice(0, 2)]), pixels_NSSC[[7, 8, 9, 0, 1]]),
        "taken": (table.take([4, 4, 1]), pixels_NSSC[[4, 4, 1]]),
        "one": (table.slice(9), pixels_NSSC[9:]),
    }
    for name, (view, expected) in views.items():
        assert np.array_equal(_from_binary(view["pixels"], size), expected), name


def test_pixels_survive_serialisation() -> None:
    pixels_NSSC = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 3), np.uint8)
    sink = pa.BufferOutputStream()
    table = pixels_table(pixels_NSSC).slice(1, 3)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    read = pa.ipc.open_stream(sink.getvalue()).read_all()
    assert np.array_equal(_from_binary(read["pixels"], 3), pixels_NSSC[1:4])


def test_column_shares_the_pixels_memory() -> None:
    pixels_NSSC = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    assert np.shares_memory(_from_binary(pixels_table(pixels_NSSC)["pixels"], SIZE), pixels_NSSC)


# Captions


def captioned(rows: pa.Table, batch_size: int = 4) -> tuple[pa.Table, FakeCaptioner, list[int]]:
    captioner, done = FakeCaptioner(), []
    result = caption_rows(rows, captioner, batch_size=batch_size, on_batch=done.append)  # type: ignore[arg-type]
    return result, captioner, done


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_captions_keep_every_row_in_order(hostile: LocalStore, batch_size: int) -> None:
    keys = list(hostile_files())
    rows, captioner, done = captioned(fetcher(hostile)(manifest_of(keys)), batch_size)
    assert rows["key"].to_pylist() == keys
    assert rows["row_id"].to_pylist() == list(range(len(keys)))
    num_good = sum(code == "ok" for _, code in hostile_files().values())
    assert sum(captioner.batches) == num_good
    assert max(captioner.batches) <= batch_size
    assert sum(done) == len(keys)
    for row in rows.to_pylist():
        data, code = hostile_files()[row["key"]]
        assert row["model_id"] == "fake-1"
        assert row["captioned_at"] is not None
        if code == "ok":
            expected = FakeCaptioner().says(decode_image(data, PREPROCESSING).pixels_HWC)
            assert (row["caption"], row["log_prob"]) == (expected.text, -1.5)
            assert row["alternatives"] == [{"caption": f"not {expected.text}", "log_prob": -2.5}]
        else:
            assert (row["caption"], row["log_prob"], row["alternatives"]) == (None, None, None)


def test_chunk_without_a_single_image(tmp_path: Path) -> None:
    rows, captioner, done = captioned(fetcher(LocalStore(str(tmp_path)))(manifest_of(["gone.jpg", "too.jpg"])))
    assert rows["status"].to_pylist() == [FAILED, FAILED]
    assert captioner.batches == []
    assert done == [2]
    assert rows.select(OUTPUT_SCHEMA.names).schema.equals(OUTPUT_SCHEMA)


def test_columns_are_those_of_the_output(hostile: LocalStore) -> None:
    rows, _, _ = captioned(fetcher(hostile)(manifest_of(["plain.jpg", "empty.jpg"])))
    assert set(rows.schema.names) == {"position", *OUTPUT_SCHEMA.names, *STAGES}
    assert rows.select(OUTPUT_SCHEMA.names).schema.equals(OUTPUT_SCHEMA)


def test_the_output_schema_is_as_documented() -> None:
    documented = """
        row_id int64, uri string, key string, etag string, size int64, status string, error_code string, error string,
        caption string, log_prob double, alternatives list<element: struct<caption: string, log_prob: double>>,
        width int32, height int32, model_id string, captioned_at timestamp[us, tz=UTC]
    """
    found = ", ".join(f"{field.name} {field.type}" for field in OUTPUT_SCHEMA)
    assert found.replace("list<item:", "list<element:") == " ".join(documented.split())
