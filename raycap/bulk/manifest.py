"""The manifest: every object of the source, numbered once, before anything is captioned.

Knows nothing of Ray or torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from raycap.bulk.layout import CHUNK_ROWS, CHUNKS_PER_SHARD, CHUNKS_PREFIX, MANIFEST, chunk_rows, shard_key
from raycap.errors import NotFoundError, ObjectNotFoundError, StorageError
from raycap.storage import ObjectInfo, Store, is_s3

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [("row_id", pa.int64()), ("uri", pa.string()), ("key", pa.string()), ("etag", pa.string()), ("size", pa.int64())]
)
LOG_EVERY_ROWS = 100_000
_START_OVER = "choose another output, or delete this one and start over"


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
        return _read_manifest(output)
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
    for info in output.list(CHUNKS_PREFIX):  # of an earlier manifest that somebody deleted: other objects
        output.delete(info.key)
    output.write(MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    return manifest


def _read_manifest(output: Store) -> Manifest:
    try:
        return Manifest(**json.loads(output.read(MANIFEST)))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{output.uri(MANIFEST)} was changed: {error}; {_START_OVER}") from error


def read_chunk(output: Store, chunk: int, num_rows: int) -> pa.Table:
    """The manifest rows of one chunk. Raises StorageError if they are not those that were written down."""
    key = shard_key(chunk // CHUNKS_PER_SHARD)
    expected = chunk_rows(chunk, num_rows)
    try:
        rows = pq.ParquetFile(io.BytesIO(output.read(key))).read_row_group(chunk % CHUNKS_PER_SHARD)
        if rows.schema.equals(SCHEMA) and rows["row_id"].to_pylist() == list(expected):
            return rows
    except (pa.ArrowException, OSError, ObjectNotFoundError) as error:
        raise StorageError(f"{output.uri(key)}: not a manifest shard of this run: {error}; {_START_OVER}") from error
    raise StorageError(f"{output.uri(key)} was changed; {_START_OVER}")


def _without_output(source: Store, output: Store) -> Iterator[ObjectInfo]:
    """All objects of the source, but for the output where that lies inside it."""
    root, inside = root_of(source), root_of(output)
    excluded = inside.removeprefix(root) if inside.startswith(root) and inside != root else None
    for info in source.list():
        if excluded is None or not info.key.startswith(excluded):
            yield info


def root_of(store: Store) -> str:
    """The store's location with a `/` at its end; of a local one, without symbolic links."""
    location = store.location if is_s3(store.location) else os.path.realpath(store.location)
    return location.rstrip("/") + "/"


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
    pq.write_table(table, sink, compression="zstd", row_group_size=CHUNK_ROWS)  # `read_chunk` counts on it
    return sink.getvalue()
