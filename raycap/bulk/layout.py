"""Where everything lies in the output of the bulk job.

    captions/part-00000.parquet ...   the captions, in the order of the manifest; complete or absent
    summary.json                      counts, errors, rates; written last
    report.html
    _raycap/run.json                  what this run captions and with which model; a rerun must agree
    _raycap/manifest.json             the manifest is complete: number of rows, bytes, fingerprint
    _raycap/manifest/00000.parquet    shards of the manifest, CHUNKS_PER_SHARD chunks each
    _raycap/chunks/00000000.parquet   captions of one finished chunk of CHUNK_ROWS rows

The chunk is the unit of work and of commit. Its file appears whole, under a name that follows from its row ids alone:
a repeated task overwrites its own file, and a rerun does the chunks that have no file. So every row is there exactly
once.
"""

from __future__ import annotations

CHUNK_ROWS = 256
"""Rows of a chunk: at 224 px, 38 MB of pixels, and what a crash can lose of each worker's time."""
CHUNKS_PER_SHARD = 16
"""Chunks of a manifest shard, one row group each: 4,096 rows are some hundred kilobytes."""
SUMMARY = "summary.json"
RUN = "_raycap/run.json"
MANIFEST = "_raycap/manifest.json"
CHUNKS_PREFIX = "_raycap/chunks/"
CAPTIONS_PREFIX = "captions/"


def shard_key(shard: int) -> str:
    """The manifest shard with this number."""
    return f"_raycap/manifest/{shard:05d}.parquet"


def chunk_key(chunk: int) -> str:
    """The captions of the chunk with this number."""
    return f"{CHUNKS_PREFIX}{chunk:08d}.parquet"


def part_key(part: int) -> str:
    """The output file with this number."""
    return f"{CAPTIONS_PREFIX}part-{part:05d}.parquet"


def num_chunks(num_rows: int) -> int:
    """Chunks of a manifest of `num_rows` rows."""
    return -(-num_rows // CHUNK_ROWS)


def chunk_rows(chunk: int, num_rows: int) -> range:
    """The row ids of a chunk."""
    return range(chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, num_rows))
