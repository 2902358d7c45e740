"""One chunk's way from manifest rows to output rows.

Every step takes a table and gives a table of as many rows: an object that fails keeps its row, with a typed error.
Knows nothing of Ray; the model comes in as a `Captioner`.

Shapes: N rows of the chunk, S x S pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from raycap.bulk.sources import skip_message
from raycap.bulk.sources.base import Reader
from raycap.errors import ObjectError
from raycap.images import DecodedImage, ImageLimits, Preprocessing, decode_image

if TYPE_CHECKING:
    from raycap.model.captioner import Caption, Captioner

OK, FAILED, SKIPPED = "ok", "failed", "skipped"

OUTPUT_SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        ("uri", pa.string()),
        ("key", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error", pa.string()),
        ("caption", pa.string()),
        ("log_prob", pa.float64()),
        ("alternatives", pa.list_(pa.struct([("caption", pa.string()), ("log_prob", pa.float64())]))),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("model_id", pa.string()),
        ("captioned_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""The columns of the captions output, from first to last."""

STAGES = ("fetch_s", "decode_s", "caption_s")
"""Columns that carry each row's share of the stage times, in seconds, to the commit; not part of the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetcher:
    """Manifest rows to pixels: reads many objects at a time, decodes them as they arrive."""

    reader: Reader
    reads_by: Literal["key", "uri"]
    preprocessing: Preprocessing
    limits: ImageLimits
    requests_in_flight: int

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Add status, error, original size and `pixels` (fixed-size binary, S * S * 3 bytes of RGB; zeros without an
        image); fill in sizes that the manifest did not tell.

        Raises StorageError if the storage fails in a way that will not pass.
        """
        size = self.preprocessing.size_px
        pixels_NSSC = np.zeros((rows.num_rows, size, size, 3), np.uint8)
        columns: dict[str, list[Any]] = {
            name: [None] * rows.num_rows for name in ("status", "error_code", "error", "width", "height")
        }
        sizes = rows["size"].to_pylist()
        waited_s = decode_s = 0.0
        clock = time.perf_counter()
        for row, data in self._fetched(rows):
            waited_s, clock = waited_s + time.perf_counter() - clock, time.perf_counter()
            if isinstance(data, bytes) and sizes[row] is None:
                sizes[row] = len(data)
            result = _decode(data, self.preprocessing, self.limits)
            if isinstance(result, DecodedImage):
                pixels_NSSC[row] = result.pixels_HWC
                columns["status"][row], columns["width"][row], columns["height"][row] = OK, result.width, result.height
            else:
                columns["status"][row] = SKIPPED if isinstance(result, _NotTried) else FAILED
                columns["error_code"][row], columns["error"][row] = result.code, str(result)
            decode_s, clock = decode_s + time.perf_counter() - clock, time.perf_counter()
        rows = rows.set_column(rows.schema.get_field_index("size"), "size", pa.array(sizes, pa.int64()))
        for name, values in columns.items():
            rows = rows.append_column(OUTPUT_SCHEMA.field(name), pa.array(values, OUTPUT_SCHEMA.field(name).type))
        rows = rows.drop_columns(["skip"]).append_column("pixels", _to_binary(pixels_NSSC))
        rows = _with_seconds(rows, "fetch_s", waited_s)
        return _with_seconds(rows, "decode_s", decode_s)

    def _fetched(self, rows: pa.Table) -> Iterator[tuple[int, bytes | ObjectError | _NotTried]]:
        """Row, and its bytes or why there are none; as they arrive, so that a slow object holds up no other one.

        At most `requests_in_flight` objects are asked for or waiting to be decoded.
        """
        keys, skips = rows[self.reads_by].to_pylist(), rows["skip"].to_pylist()
        to_read = []
        for row, skip in enumerate(skips):
            if skip is None:
                to_read.append(row)
            else:
                yield row, _NotTried(skip, skip_message(skip, keys[row]))
        remaining = iter(to_read)
        with ThreadPoolExecutor(self.requests_in_flight, thread_name_prefix="raycap-fetch") as pool:
            try:
                pending: dict[Future[bytes | ObjectError], int] = {}
                while True:
                    for row in islice(remaining, self.requests_in_flight - len(pending)):
                        pending[pool.submit(self._read, keys[row])] = row
                    if not pending:
                        return
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield pending.pop(future), future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, key: str) -> bytes | ObjectError:
        try:
            return self.reader.read(key, max_bytes=self.limits.max_bytes)
        except ObjectError as error:
            return error


@dataclass(frozen=True, slots=True)
class _NotTried:
    """The manifest says that the object is not to be tried."""

    code: str
    message: str

    def __str__(self) -> str:
        return self.message


def _decode(
    data: bytes | ObjectError | _NotTried, preprocessing: Preprocessing, limits: ImageLimits
) -> DecodedImage | ObjectError | _NotTried:
    if not isinstance(data, bytes):
        return data
    try:
        return decode_image(data, preprocessing, limits)
    except ObjectError as error:
        return error


def caption_rows(
    rows: pa.Table, captioner: Captioner, *, batch_size: int, on_batch: Callable[[int], None] = lambda done: None
) -> pa.Table:
    """Caption the pixels of the rows with status ok; gives the rows without their pixels and with all output columns.

    `on_batch(number of rows)` is called after each batch, once for the rows without an image.
    """
    size = captioner.preprocessing.size_px
    pixels_NSSC = _from_binary(rows["pixels"], size)
    good = [row for row, status in enumerate(rows["status"].to_pylist()) if status == OK]
    captions: list[Caption | None] = [None] * rows.num_rows
    times: list[datetime | None] = [datetime.now(UTC)] * rows.num_rows
    started = time.perf_counter()
    if len(good) < rows.num_rows:
        on_batch(rows.num_rows - len(good))
    for start in range(0, len(good), batch_size):
        batch = good[start : start + batch_size]
        for row, caption in zip(batch, captioner.caption_array(pixels_NSSC[batch]), strict=True):
            captions[row], times[row] = caption, datetime.now(UTC)
        on_batch(len(batch))
    columns: dict[str, list[Any]] = {
        "caption": [caption and caption.text for caption in captions],
        "log_prob": [caption and caption.log_prob for caption in captions],
        "alternatives": [
            caption and [{"caption": other.text, "log_prob": other.log_prob} for other in caption.alternatives]
            for caption in captions
        ],
        "model_id": [captioner.model_id] * rows.num_rows,
        "captioned_at": times,
    }
    rows = rows.drop_columns(["pixels"])
    for name, values in columns.items():
        rows = rows.append_column(OUTPUT_SCHEMA.field(name), pa.array(values, OUTPUT_SCHEMA.field(name).type))
    return _with_seconds(rows, "caption_s", time.perf_counter() - started)


def _with_seconds(rows: pa.Table, name: str, seconds: float) -> pa.Table:
    return rows.append_column(name, pa.array(np.full(rows.num_rows, seconds / max(1, rows.num_rows))))


def _to_binary(pixels_NSSC: np.ndarray) -> pa.Array:
    """The array's memory as fixed-size binary values, one an image, without a copy."""
    num_rows = len(pixels_NSSC)
    type_ = pa.binary(pixels_NSSC.nbytes // max(1, num_rows))
    return pa.FixedSizeBinaryArray.from_buffers(type_, num_rows, [None, pa.py_buffer(pixels_NSSC)])


def _from_binary(column: pa.ChunkedArray, size_px: int) -> np.ndarray:
    """What `_to_binary` was given, [N, S, S, 3], without a copy where the column is in one piece. Read-only."""
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    num_bytes = 3 * size_px**2
    pixels = np.frombuffer(array.buffers()[1], np.uint8, count=len(array) * num_bytes, offset=array.offset * num_bytes)
    return pixels.reshape(-1, size_px, size_px, 3)
