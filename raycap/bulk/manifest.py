"""The manifest: every object of the source, numbered once, before anything is captioned. Knows nothing of Ray or torch."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from raycap.bulk.layout import CHUNK_ROWS, CHUNKS_PER_SHARD, MANIFEST, chunk_rows, shard_key
from raycap.errors import NotFoundError
from raycap.storage import ObjectInfo, Store

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [("row_id", pa.int64()), ("uri", pa.string()), ("key", pa.string()), ("etag", pa.string()), ("size", pa.int64())]
)
LOG_EVERY_ROWS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A complete manifest."""

    num_rows: int
    num_bytes: int
    fingerprint: str
    """Digest of all keys and etags, in order."""


def open_manifest(source: Store, output: Store) -> Manifest:
    """The manifest of this output; made from a listing of the source if it is not there or not complete.

    Rows are streamed into shards of a few thousand, so memory does not grow with the source.
    Raises NotFoundError if the source holds no objects.
    """
    if output.exists(MANIFEST):
        return Manifest(**json.loads(output.read(MANIFEST)))
    digest, num_rows, num_bytes = hashlib.sha256(), 0, 0
    objects = _without_output(source, output)
    for shard, infos in enumerate(_groups(objects, CHUNK_ROWS * CHUNKS_PER_SHARD)):
        output.write(shard_key(shard), _shard(infos, first_row=num_rows))
        for info in infos:
            digest.update(f"{info.key}\0{info.etag}\0".encode(errors="surrogatepass"))
        num_rows += len(infos)
        num_bytes += sum(info.size for info in infos)
        if num_rows // LOG_EVERY_ROWS > (num_rows - len(infos)) // LOG_EVERY_ROWS:
            log.info("listing %s: %d objects so far", source.location, num_rows)
    if num_rows == 0:
        raise NotFoundError(f"{source.location}: there are no objects here; check the path or prefix")
    manifest = Manifest(num_rows=num_rows, num_bytes=num_bytes, fingerprint=digest.hexdigest()[:20])
    output.write(MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    return manifest


def read_chunk(output: Store, chunk: int, num_rows: int) -> pa.Table:
    """The manifest rows of one chunk."""
    shard = _read_shard(output, chunk // CHUNKS_PER_SHARD)
    rows = chunk_rows(chunk, num_rows)
    return shard.slice(rows.start - shard["row_id"][0].as_py(), len(rows))


@lru_cache(maxsize=4)  # neighbouring chunks share a shard
def _read_shard(output: Store, shard: int) -> pa.Table:
    return pq.read_table(io.BytesIO(output.read(shard_key(shard))))


def _without_output(source: Store, output: Store) -> Iterator[ObjectInfo]:
    """All objects of the source, but for the output where that lies inside it."""
    root, inside = source.location.rstrip("/") + "/", output.location.rstrip("/") + "/"
    excluded = inside.removeprefix(root) if inside.startswith(root) and inside != root else None
    for info in source.list():
        if excluded is None or not info.key.startswith(excluded):
            yield info


def _groups(objects: Iterator[ObjectInfo], size: int) -> Iterator[list[ObjectInfo]]:
    group: list[ObjectInfo] = []
    for info in objects:
        group.append(info)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _shard(infos: list[ObjectInfo], *, first_row: int) -> bytes:
    table = pa.table(
        {
            "row_id": range(first_row, first_row + len(infos)),
            "uri": [info.uri for info in infos],
            "key": [info.key for info in infos],
            "etag": [info.etag for info in infos],
            "size": [info.size for info in infos],
        },
        schema=SCHEMA,
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
