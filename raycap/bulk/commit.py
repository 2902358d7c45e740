"""What makes the output exactly one row for every manifest row: chunk files, the check, the final files, the summary.

Knows nothing of Ray or torch.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raycap.bulk.layout import CAPTIONS_PREFIX, CHUNK_ROWS, CHUNKS_PREFIX, chunk_key, chunk_rows, num_chunks, part_key
from raycap.bulk.rows import OUTPUT_SCHEMA, STAGES
from raycap.errors import ObjectError, ObjectNotFoundError, StorageError
from raycap.storage import Store

CHUNKS_PER_ROW_GROUP = 64
"""Chunks in each row group of the final files, 16,384 rows: what a reader decodes at a time."""

_CHUNK_NAME = re.compile(r"(\d{8,})\.parquet")
_PART_NAME = re.compile(r"part-\d{5,}\.parquet")


def commit_chunk(rows: pa.Table, output: Store, num_rows: int) -> int:
    """Write the captions of one chunk; returns its number. Asserts that its rows are all there, and in order."""
    row_ids = rows["row_id"].to_numpy()
    chunk = int(row_ids[0]) // CHUNK_ROWS
    expected = chunk_rows(chunk, num_rows)
    assert np.array_equal(row_ids, np.arange(expected.start, expected.stop)), f"chunk {chunk}: rows lost or doubled"
    sink = io.BytesIO()
    pq.write_table(rows.select([*OUTPUT_SCHEMA.names, *STAGES]), sink, compression="zstd")
    output.write(chunk_key(chunk), sink.getvalue())
    return chunk


def missing_chunks(output: Store, num_rows: int) -> np.ndarray:
    """Numbers of the chunks without a file, int64."""
    missing = np.ones(num_chunks(num_rows), bool)
    for info in output.list(CHUNKS_PREFIX):
        name = _CHUNK_NAME.fullmatch(info.key.removeprefix(CHUNKS_PREFIX))
        if name and int(name[1]) < len(missing):  # other files are nothing of ours
            missing[int(name[1])] = False
    return np.flatnonzero(missing)


@dataclass(kw_only=True)
class Tally:
    """Counts over output rows; tallies of parts add up to that of the whole."""

    counts: Counter[str] = field(default_factory=Counter)
    """Rows by status."""
    errors: Counter[str] = field(default_factory=Counter)
    """Rows by error code."""
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The first uri and message of each error code."""
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Seconds by stage, summed over workers."""
    num_bytes: int = 0

    def add(self, other: Tally) -> None:
        """Take in another part's counts."""
        self.counts.update(other.counts)
        self.errors.update(other.errors)
        self.examples = other.examples | self.examples
        for name, seconds in other.stage_s.items():
            self.stage_s[name] += seconds
        self.num_bytes += other.num_bytes

    @property
    def num_rows(self) -> int:
        """Rows counted."""
        return self.counts.total()

    def to_dict(self) -> dict[str, Any]:
        """As in the summary."""
        return {
            "num_objects": self.num_rows,
            "num_bytes": self.num_bytes,
            "counts": {status: self.counts[status] for status in ("ok", "failed", "skipped")},
            "errors": [
                {
                    "code": code,
                    "count": count,
                    "example_uri": self.examples[code][0],
                    "example_error": self.examples[code][1],
                }
                for code, count in self.errors.most_common()
            ],
            "stage_s": {name.removesuffix("_s"): round(seconds, 3) for name, seconds in self.stage_s.items()},
        }


def tally(rows: pa.Table) -> Tally:
    """Count one table of output rows with their stage seconds."""
    result = Tally(num_bytes=int(np.sum(rows["size"].to_numpy())), counts=Counter(rows["status"].to_pylist()))
    codes = rows["error_code"].to_pylist()
    for row, code in enumerate(codes):
        if code is not None:
            result.errors[code] += 1
            result.examples.setdefault(code, (rows["uri"][row].as_py(), rows["error"][row].as_py()))
    for name in STAGES:
        result.stage_s[name] += float(np.sum(rows[name].to_numpy()))
    return result


def chunks_of_parts(num_rows: int, rows_per_file: int) -> list[range]:
    """The chunks that go into each output file: whole chunks, about `rows_per_file` rows."""
    total, per_part = num_chunks(num_rows), max(1, rows_per_file // CHUNK_ROWS)
    return [range(start, min(start + per_part, total)) for start in range(0, total, per_part)]


def delete_parts(output: Store, num_parts: int) -> None:
    """Delete final files past the first `num_parts`: an earlier try with fewer rows in each file may have left them."""
    expected = {part_key(part) for part in range(num_parts)}
    stale = [
        info.key
        for info in output.list(CAPTIONS_PREFIX)
        if info.key not in expected and _PART_NAME.fullmatch(info.key.removeprefix(CAPTIONS_PREFIX))
    ]
    for key in stale:
        output.delete(key)


def finish_part(output: Store, part: int, chunks: Iterable[int], num_rows: int) -> Tally:
    """Join chunk files into one output file, in order. Raises StorageError if a chunk is not whole."""
    total = Tally()
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, OUTPUT_SCHEMA, compression="zstd") as writer:
        for group in _groups(chunks):
            tables = [_read_chunk(output, chunk, num_rows) for chunk in group]
            for rows in tables:
                total.add(tally(rows))
            writer.write_table(pa.concat_tables(tables).select(OUTPUT_SCHEMA.names))
    output.write(part_key(part), sink.getvalue())
    return total


def _groups(chunks: Iterable[int]) -> Iterator[list[int]]:
    remaining = list(chunks)
    for start in range(0, len(remaining), CHUNKS_PER_ROW_GROUP):
        yield remaining[start : start + CHUNKS_PER_ROW_GROUP]


def _read_chunk(output: Store, chunk: int, num_rows: int) -> pa.Table:
    key, expected = chunk_key(chunk), chunk_rows(chunk, num_rows)
    advice = "delete it and run the same command again"
    try:
        rows = pq.read_table(io.BytesIO(output.read(key)))
    except ObjectNotFoundError as error:
        raise StorageError(f"{output.uri(key)} has gone; run the same command again") from error
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{output.uri(key)}: not a Parquet file any more; {advice}") from error
    if rows.schema.names != [*OUTPUT_SCHEMA.names, *STAGES] or not np.array_equal(
        rows["row_id"].to_numpy(), np.arange(expected.start, expected.stop)
    ):
        raise StorageError(f"{output.uri(key)} was changed; {advice}")
    return rows


def write_json(output: Store, key: str, value: object) -> None:
    """One small JSON file."""
    output.write(key, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def read_json(output: Store, key: str) -> dict[str, Any]:
    """A small JSON object of ours. Raises StorageError if it is none any more."""
    try:
        value = json.loads(output.read(key))
    except (ValueError, ObjectError) as error:
        raise StorageError(f"{output.uri(key)} was changed: {error}; choose another output") from error
    if not isinstance(value, dict):
        raise StorageError(f"{output.uri(key)} was changed: it holds no JSON object; choose another output")
    return value
