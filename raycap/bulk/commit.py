"""What makes the output exactly one row for every manifest row: chunk files, the check, the final files, the summary.

Knows nothing of Ray or torch.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raycap.bulk.layout import CHUNK_ROWS, Round, chunk_rows, num_chunks, part_key, part_number
from raycap.bulk.manifest import Manifest, ManifestReader, parquet_table
from raycap.bulk.previous import part_keys, read_part
from raycap.bulk.rows import OUTPUT_SCHEMA, STAGES
from raycap.errors import ObjectError, ObjectNotFoundError, StorageError
from raycap.storage import Store

CHUNKS_PER_ROW_GROUP = 64
"""Chunks in each row group of the final files, 16,384 rows: what a reader decodes at a time."""

CHUNK_COLUMNS = ["position", *OUTPUT_SCHEMA.names, *STAGES]
"""Of the chunk files."""


def commit_chunk(rows: pa.Table, output: Store, manifest: Manifest) -> int:
    """Write the captions of one chunk; returns its number. Asserts that its rows are all there, and in order."""
    positions = rows["position"].to_numpy()
    chunk = int(positions[0]) // CHUNK_ROWS
    expected = chunk_rows(chunk, manifest.num_rows)
    assert np.array_equal(positions, np.arange(expected.start, expected.stop)), f"chunk {chunk}: rows lost or doubled"
    output.write(Round(manifest.round).chunk(chunk), _parquet(rows.select(CHUNK_COLUMNS)))
    return chunk


def missing_chunks(output: Store, manifest: Manifest) -> np.ndarray:
    """Numbers of the chunks without a file, int64."""
    round_ = Round(manifest.round)
    missing = np.ones(num_chunks(manifest.num_rows), bool)
    for info in output.list(round_.chunks):
        chunk = round_.chunk_number(info.key)
        if chunk is not None and chunk < len(missing):  # other files are nothing of ours
            missing[chunk] = False
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
    """Count one table of output rows, with their stage seconds where it has them."""
    result = Tally(num_bytes=pc.sum(rows["size"]).as_py() or 0, counts=Counter(rows["status"].to_pylist()))
    codes = rows["error_code"].to_pylist()
    for row, code in enumerate(codes):
        if code is not None:
            result.errors[code] += 1
            result.examples.setdefault(code, (rows["uri"][row].as_py(), rows["error"][row].as_py()))
    for name in STAGES:
        if name in rows.column_names:
            result.stage_s[name] += float(np.sum(rows[name].to_numpy()))
    return result


def plan_parts(output: Store, manifest: Manifest, bytes_per_file: int) -> list[range]:
    """The chunks whose new rows go into each new output file: whole chunks, about `bytes_per_file` bytes."""
    if not manifest.num_new:
        return []
    total = num_chunks(manifest.num_rows)
    per_part = max(1, int(bytes_per_file / _bytes_per_chunk(output, manifest)))
    if per_part > CHUNKS_PER_ROW_GROUP:
        per_part -= per_part % CHUNKS_PER_ROW_GROUP
    return [range(start, min(start + per_part, total)) for start in range(0, total, per_part)]


def _bytes_per_chunk(output: Store, manifest: Manifest) -> float:
    """Bytes of a chunk inside an output file, by the first row group."""
    chunks = range(min(CHUNKS_PER_ROW_GROUP, num_chunks(manifest.num_rows)))
    reader = ManifestReader(output, manifest)
    rows = pa.concat_tables([read_chunk(output, chunk, reader) for chunk in chunks])
    return len(_parquet(rows.select(OUTPUT_SCHEMA.names))) / len(chunks)


def _parquet(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd", row_group_size=CHUNKS_PER_ROW_GROUP * CHUNK_ROWS)
    return sink.getvalue()


def delete_parts(output: Store, num_parts: int) -> None:
    """Delete final files past the first `num_parts`: an earlier try with fewer rows in each file may have left them."""
    for key in part_keys(output):
        number = part_number(key)
        if number is not None and number >= num_parts:
            output.delete(key)


def write_part(output: Store, part: int, chunks: range, manifest: Manifest) -> Tally:
    """Join the new rows of some chunks into one output file, in order. Raises StorageError if a chunk is not whole."""
    total = Tally()
    sink = io.BytesIO()
    reader = ManifestReader(output, manifest)
    with pq.ParquetWriter(sink, OUTPUT_SCHEMA, compression="zstd") as writer:
        for start in range(chunks.start, chunks.stop, CHUNKS_PER_ROW_GROUP):
            group = range(start, min(start + CHUNKS_PER_ROW_GROUP, chunks.stop))
            tables = [read_chunk(output, chunk, reader) for chunk in group]
            rows = pa.concat_tables(tables)
            rows = rows.filter(pc.greater_equal(rows["row_id"], manifest.first_row_id))
            total.add(tally(rows))
            writer.write_table(rows.select(OUTPUT_SCHEMA.names))
    output.write(part_key(part), sink.getvalue())
    return total


def chunks_of_old_parts(output: Store, manifest: Manifest) -> list[list[int]]:
    """For each file of earlier rounds, the chunks that hold rows of it that this round did again."""
    chunks: list[list[int]] = [[] for _ in manifest.parts]
    if manifest.num_replaced:
        reader = ManifestReader(output, manifest)
        parts = np.array([part for part, (first, last) in enumerate(manifest.parts) if first <= last])
        first_ids = np.array([manifest.parts[part][0] for part in parts])  # ascending: later files have later rows
        for chunk in range(num_chunks(manifest.num_rows)):
            ids = reader.chunk(chunk)["row_id"].to_numpy()
            ids = ids[ids < manifest.first_row_id]
            for part in np.unique(np.searchsorted(first_ids, ids, side="right") - 1):
                chunks[parts[part]].append(chunk)
    return chunks


def renew_part(output: Store, part: int, chunks: list[int], deleted: np.ndarray, manifest: Manifest) -> Tally:
    """Bring one file of earlier rounds up to date: rows that this round did again, without those of deleted objects.

    `chunks` are those that may hold rows of it, `deleted` sorted row ids. Doing it twice gives the same file.
    Raises StorageError if a chunk is not whole.
    """
    first, last = manifest.parts[part]
    before = read_part(output, part_key(part))
    reader = ManifestReader(output, manifest)
    new = []
    for chunk in chunks:
        rows = read_chunk(output, chunk, reader)
        is_here = pc.and_(pc.greater_equal(rows["row_id"], first), pc.less_equal(rows["row_id"], last))
        new.append(rows.filter(is_here))
    renewed = pa.concat_tables(new) if new else None
    gone = deleted if renewed is None else np.concatenate([deleted, renewed["row_id"].to_numpy()])
    rows = before.filter(pa.array(~np.isin(before["row_id"].to_numpy(), gone)))
    result = tally(rows)
    if renewed is not None and renewed.num_rows:
        result.add(tally(renewed))
        rows = pa.concat_tables([rows, renewed.select(OUTPUT_SCHEMA.names)]).sort_by("row_id")
    if not rows.equals(before):
        output.write(part_key(part), _parquet(rows))
    return result


def read_chunk(output: Store, chunk: int, manifest: ManifestReader) -> pa.Table:
    """The captions of one finished chunk. Raises StorageError unless they are those of the manifest's rows."""
    key = Round(manifest.manifest.round).chunk(chunk)
    advice = "delete it and run the same command again"
    try:
        rows = parquet_table(output.read(key))
    except ObjectNotFoundError as error:
        raise StorageError(f"{output.uri(key)} has gone; run the same command again") from error
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{output.uri(key)}: not a Parquet file any more; {advice}") from error
    expected = manifest.chunk(chunk)
    same = rows.schema.names == CHUNK_COLUMNS and all(
        rows[name].equals(expected[name]) for name in ("position", "row_id", "uri")
    )
    if not same:
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
