"""The manifest of a round: the objects that it captions, in an order that is decided before anything is captioned.

    listing.py makes it, in shards; `ManifestReader` gives its chunks

Knows nothing of Ray or torch.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raycap.bulk.layout import SHARD_ROWS, Round, chunk_rows
from raycap.errors import ObjectError, StorageError
from raycap.storage import Store

_OBJECT = [
    ("uri", pa.string()),
    ("key", pa.string()),
    ("etag", pa.string()),
    ("size", pa.int64()),
    ("skip", pa.string()),
]
SHARD_SCHEMA = pa.schema([("replaces", pa.int64()), *_OBJECT])
"""Of the files. `replaces`: id of the row of an earlier round that this one takes the place of; null for new objects.
`size` is null where a manifest file does not tell it; `skip` is why the object is not tried."""
WORK_SCHEMA = pa.schema([("position", pa.int64()), ("row_id", pa.int64()), *_OBJECT])
"""Of `ManifestReader.chunk`. `position` counts the rows of this manifest; `row_id` is the number of the row in the
output, for good."""
_START_OVER = "choose another output, or delete this one and start over"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A complete manifest."""

    round: int
    span_rows: tuple[int, ...]
    """Rows of each part of the listing."""
    num_bytes: int
    """Of all objects whose size is known."""
    num_filtered: int
    """Objects of the source that the selection left out."""
    fingerprint: str
    """Digest of all addresses and etags, in order."""
    first_row_id: int = 0
    """New rows are numbered from here."""
    parts: tuple[tuple[int, int], ...] = ()
    """First and last row id of each file in captions/ that earlier rounds left."""
    num_before: int = 0
    """Rows of earlier rounds."""
    num_replaced: int = 0
    """Of these, rows that this round does again."""
    num_deleted: int = 0
    """Of these, rows whose object has gone."""

    @property
    def num_rows(self) -> int:
        """Rows to do in this round."""
        return sum(self.span_rows)

    @property
    def num_new(self) -> int:
        """Rows that no earlier round had."""
        return self.num_rows - self.num_replaced

    @property
    def num_total(self) -> int:
        """Rows of the output when this round is done."""
        return self.num_before - self.num_deleted + self.num_new


def save_manifest(output: Store, manifest: Manifest) -> None:
    """Say that the manifest of this round is complete."""
    output.write(Round(manifest.round).manifest, (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def load_manifest(output: Store, round_: Round) -> Manifest | None:
    """The manifest of this round; None where it is not complete yet. Raises StorageError if it was changed."""
    try:
        if not output.exists(round_.manifest):
            return None
        value = json.loads(output.read(round_.manifest))
        value["span_rows"] = tuple(value["span_rows"])
        value["parts"] = tuple((first, last) for first, last in value["parts"])
        return Manifest(**value)
    except (ValueError, TypeError, KeyError, ObjectError) as error:
        raise StorageError(f"{output.uri(round_.manifest)} was changed: {error}; {_START_OVER}") from error


def shard_bytes(table: pa.Table) -> bytes:
    """One shard as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def parquet_table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The content of a Parquet file. Raises pa.ArrowException or OSError if it is none.

    Not `pq.read_table`: its threads may still run when a short command ends, and then abort it (pyarrow 26).
    """
    return pq.ParquetFile(io.BytesIO(data)).read(columns=columns, use_threads=False)


class ManifestReader:
    """Gives the rows of a manifest chunk by chunk. Keeps the shard that it read last; for one thread, one task."""

    def __init__(self, output: Store, manifest: Manifest) -> None:
        self.output = output
        self.manifest = manifest
        self._round = Round(manifest.round)
        self._starts = [0, *accumulate(manifest.span_rows)]
        self._last: tuple[tuple[int, int], pa.Table] | None = None

    def chunk(self, chunk: int) -> pa.Table:
        """The rows of one chunk, as WORK_SCHEMA. Raises StorageError if they are not those that were written down."""
        places = chunk_rows(chunk, self.manifest.num_rows)
        pieces, place = [], places.start
        while place < places.stop:
            span = bisect_right(self._starts, place) - 1  # of parts without rows, the one after them
            shard, within = divmod(place - self._starts[span], SHARD_ROWS)
            count = min(places.stop, self._starts[span + 1]) - place
            pieces.append(self._shard(span, shard).slice(within, min(count, SHARD_ROWS - within)))
            place += pieces[-1].num_rows
        rows = pa.concat_tables(pieces).combine_chunks()
        positions = pa.array(np.arange(places.start, places.stop))
        new_ids = pc.add(positions, self.manifest.first_row_id)
        columns = [positions, pc.coalesce(rows["replaces"], new_ids), *rows.columns[1:]]
        return pa.Table.from_arrays(columns, schema=WORK_SCHEMA)

    def _shard(self, span: int, shard: int) -> pa.Table:
        if self._last is not None and self._last[0] == (span, shard):
            return self._last[1]
        key = self._round.shard(span, shard)
        try:
            rows = parquet_table(self.output.read(key))
        except (pa.ArrowException, OSError, ObjectError) as error:
            raise StorageError(
                f"{self.output.uri(key)}: not a manifest shard of this run: {error}; {_START_OVER}"
            ) from error
        expected = min(SHARD_ROWS, self.manifest.span_rows[span] - shard * SHARD_ROWS)
        if not rows.schema.equals(SHARD_SCHEMA) or rows.num_rows != expected:
            raise StorageError(f"{self.output.uri(key)} was changed; {_START_OVER}")
        self._last = (span, shard), rows
        return rows
