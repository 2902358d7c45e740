"""Outputs of the bulk job, made by its own writers without Ray or a model: for tests of what works on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any
from zlib import crc32

import pyarrow as pa

from raycap.bulk import commit
from raycap.bulk.config import Selection
from raycap.bulk.layout import Round, num_chunks
from raycap.bulk.manifest import Manifest, ManifestReader
from raycap.bulk.previous import deleted_ids
from raycap.bulk.rows import OUTPUT_SCHEMA, STAGES
from raycap.bulk.sources import Rows, Source, SourceRow
from raycap.storage import LocalStore, Span, Store


class FakeSource(Source):
    """Lists objects that do not exist, `objects` (key -> etag) in order, in `num_spans` parts."""

    location = "/nowhere"
    reads_by = "key"

    def __init__(self, objects: dict[str, str], num_spans: int = 1) -> None:
        self.reader = LocalStore("/nowhere")
        self.objects = objects
        self.num_spans = num_spans
        self.listed: list[str] = []

    def check(self) -> None: ...

    def spans(self, num: int) -> list[Span]:
        keys, every = list(self.objects), -(-len(self.objects) // self.num_spans) or 1
        return [
            Span(after=keys[start], until=keys[min(start + every, len(keys)) - 1])
            for start in range(0, len(keys), every)
        ]

    def rows(self, span: Span, *, after: str = "", taken: int = 0) -> Rows:
        return Rows(self._candidates(span, after), Selection(all_files=True), taken)

    def _candidates(self, span: Span, after: str) -> Iterator[SourceRow]:
        keys = list(self.objects)
        start = keys.index(after) + 1 if after else keys.index(span.after)
        for key in keys[start : keys.index(span.until) + 1]:
            self.listed.append(key)
            yield SourceRow(f"/nowhere/{key}", key, self.objects[key], crc32(key.encode()) % 7, None, key)


def numbered(num: int) -> dict[str, str]:
    """Keys in order, with etags."""
    return {f"{number:06d}.jpg": f"e{number}" for number in range(num)}


def captioned(work: pa.Table, failing: Iterable[str] = (), text: str = "a picture") -> pa.Table:
    """Rows of a chunk as they come to the commit; those whose key is in `failing` failed."""
    failing, rows = set(failing), []
    for row in work.drop_columns(["skip"]).to_pylist():
        result: dict[str, Any] = dict.fromkeys((*OUTPUT_SCHEMA.names, "position")) | row
        result |= {"model_id": "m", "captioned_at": datetime(2026, 1, 1, tzinfo=UTC)} | dict.fromkeys(STAGES, 0.5)
        if row["key"] in failing:
            result |= {"status": "failed", "error_code": "fetch_failed", "error": f"no {row['key']}"}
        else:
            result |= {"status": "ok", "caption": f"{text} of {row['key']}", "log_prob": -1.0, "alternatives": []}
            result |= {"width": 4, "height": 3}
        rows.append(result)
    stages = [pa.field(name, pa.float64()) for name in STAGES]
    return pa.Table.from_pylist(rows, pa.schema([pa.field("position", pa.int64()), *OUTPUT_SCHEMA, *stages]))


def commit_all(output: Store, manifest: Manifest, failing: Iterable[str] = (), text: str = "a picture") -> None:
    """Write all chunk files of a round."""
    reader = ManifestReader(output, manifest)
    for chunk in range(num_chunks(manifest.num_rows)):
        assert commit.commit_chunk(captioned(reader.chunk(chunk), failing, text), output, manifest) == chunk


def join(output: Store, manifest: Manifest, bytes_per_file: int = 10**9) -> commit.Tally:
    """What the Ray job does when all chunks are there, one file after another."""
    parts = commit.plan_parts(output, manifest, bytes_per_file)
    commit.delete_parts(output, len(manifest.parts) + len(parts))
    deleted, total = deleted_ids(output, Round(manifest.round)), commit.Tally()
    for part, chunks in enumerate(parts, len(manifest.parts)):
        total.add(commit.write_part(output, part, chunks, manifest))
    for part, chunks in enumerate(commit.chunks_of_old_parts(output, manifest)):
        total.add(commit.renew_part(output, part, chunks, deleted, manifest))
    return total
