"""Where everything lies in the output of the bulk job.

    captions/part-00000.parquet ...        the captions, sorted by row id; each file complete or absent
    summary.json                           counts, errors, rates; written last: with it, captions/ is complete
    report.html
    jsonl/ coco/ webdataset/ parquet/      what --format asked for besides
    _raycap/run.json                       what this output is of, and its round; a rerun must agree
    _raycap/lock.json                      who works here at the moment, and how far
    _raycap/0000/listing.json              round 0: the parts that the source is listed in
    _raycap/0000/manifest/00000-00000.parquet  its manifest: part of the listing, shard of CHUNKS_PER_SHARD chunks
    _raycap/0000/manifest.json             the manifest is complete: numbers of rows, bytes, fingerprint
    _raycap/0000/deleted.parquet           rows of earlier rounds whose object has gone (--update)
    _raycap/0000/chunks/00000000.parquet   captions of one finished chunk of CHUNK_ROWS rows

A round is one pass over a manifest: the first over the whole source, later ones (--update, --retry-failed) over what
changed. The chunk is the unit of work and of commit. Its file appears whole, under a name that follows from its place
in the manifest alone: a repeated task overwrites its own file, and a rerun does the chunks that have no file. So every
row is there exactly once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

CHUNK_ROWS: Final = 256
"""Rows of a chunk: at 224 px, 38 MB of pixels, and what a crash can lose of each worker's time."""
CHUNKS_PER_SHARD: Final = 16
"""Chunks of a manifest shard, one row group each: 4,096 rows are some hundred kilobytes."""
SHARD_ROWS: Final = CHUNK_ROWS * CHUNKS_PER_SHARD
SUMMARY: Final = "summary.json"
RUN: Final = "_raycap/run.json"
LOCK: Final = "_raycap/lock.json"
CAPTIONS_PREFIX: Final = "captions/"

_CHUNK_NAME: Final = re.compile(r"(\d{8,})\.parquet")
_PART_NAME: Final = re.compile(r"part-(\d{5,})\.parquet")
_SHARD_NAME: Final = re.compile(r"(\d{5,})-(\d{5,})\.parquet")


@dataclass(frozen=True, slots=True)
class Round:
    """The keys of one round."""

    number: int

    @property
    def folder(self) -> str:
        """Everything of this round is below."""
        return f"_raycap/{self.number:04d}/"

    @property
    def listing(self) -> str:
        """The parts of the listing."""
        return f"{self.folder}listing.json"

    @property
    def manifest(self) -> str:
        """Says that the manifest is complete."""
        return f"{self.folder}manifest.json"

    @property
    def deleted(self) -> str:
        """Rows of earlier rounds whose object has gone."""
        return f"{self.folder}deleted.parquet"

    @property
    def shards(self) -> str:
        """The manifest's shards are below."""
        return f"{self.folder}manifest/"

    @property
    def chunks(self) -> str:
        """The chunk files are below."""
        return f"{self.folder}chunks/"

    def shard(self, span: int, shard: int) -> str:
        """The manifest shard with this number in its part of the listing."""
        return f"{self.shards}{span:05d}-{shard:05d}.parquet"

    def shard_numbers(self, key: str) -> tuple[int, int] | None:
        """Part of the listing and number of the shard at `key`; None if it is no shard of this round."""
        name = _SHARD_NAME.fullmatch(key.removeprefix(self.shards))
        return (int(name[1]), int(name[2])) if name else None

    def chunk(self, chunk: int) -> str:
        """The captions of the chunk with this number."""
        return f"{self.chunks}{chunk:08d}.parquet"

    def chunk_number(self, key: str) -> int | None:
        """Number of the chunk whose file is at `key`; None if it is no chunk file of this round."""
        name = _CHUNK_NAME.fullmatch(key.removeprefix(self.chunks))
        return int(name[1]) if name else None


def part_key(part: int) -> str:
    """The output file with this number."""
    return f"{CAPTIONS_PREFIX}part-{part:05d}.parquet"


def part_number(key: str) -> int | None:
    """Number of the output file at `key`; None if it is none."""
    name = _PART_NAME.fullmatch(key.removeprefix(CAPTIONS_PREFIX))
    return int(name[1]) if name else None


def num_chunks(num_rows: int) -> int:
    """Chunks of a manifest of `num_rows` rows."""
    return -(-num_rows // CHUNK_ROWS)


def chunk_rows(chunk: int, num_rows: int) -> range:
    """The places in the manifest of a chunk's rows."""
    return range(chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, num_rows))
