"""Rows -> Parquet files of another size than those of captions/, in hive partitions or flat.

    part-00000.parquet                      flat
    status=ok/part-00000.parquet            a folder for each value of a column, which the files then leave out
    folder=holiday%3A 2024/part-00000.parquet   the first part of the key, escaped as Hive and Spark do

The rows of a file are in row id order. Open files are in memory: one flat, else two files' worth in all of them, past
which the largest is closed and goes on as a new one.
"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from raycap.bulk.export.files import Count, Files
from raycap.bulk.export.source import BATCH_ROWS, Captions
from raycap.bulk.rows import OUTPUT_SCHEMA
from raycap.errors import ConfigurationError

MAX_PARTITIONS: Final = 10_000
"""More are of few rows each, and slow to list for whoever reads them."""
MAX_OPEN_FILES: Final = 256
"""Each has some tens of kilobytes of its own, however few its rows."""
_GROUPS_PER_FILE: Final = 8
"""At least, so that files come out within an eighth of the wanted size."""
_ESCAPED: Final = re.compile(r"""[\x00-\x1f"#%'*/:=?\\\x7f{\[\]^]""")
"""What Hive escapes in the name of a partition (FileUtils.charToEscape)."""
_NO_VALUE: Final = "__HIVE_DEFAULT_PARTITION__"


def write_parquet(
    captions: Captions, files: Files, count: Count, target_bytes: int, partition_by: str | None = None
) -> None:
    """All rows, in files of about `target_bytes`."""
    if partition_by == "folder":
        _refuse_many(captions)
    group_rows = int(target_bytes / _GROUPS_PER_FILE / max(1.0, captions.bytes_per_row))
    schema = pa.schema([field for field in OUTPUT_SCHEMA if field.name != partition_by])
    open_files = _OpenFiles(files, schema, target_bytes, max(1, min(group_rows, BATCH_ROWS)))
    for batch in captions.batches():
        for folder, rows in _split(batch, partition_by):
            open_files.add(folder, rows.select(schema.names))
        count.add(batch.num_rows)
    open_files.close()


def _refuse_many(captions: Captions) -> None:
    folders: set[str] = set()
    for batch in captions.batches(["key"]):
        folders.update(map(first_folder, batch["key"].to_pylist()))
        if len(folders) > MAX_PARTITIONS:
            raise ConfigurationError(
                f"--partition-by folder would make more than {MAX_PARTITIONS:,} partitions; leave it out, or partition "
                "by status or model_id"
            )


def first_folder(key: str) -> str:
    """The first part of a key; "" for one without folders."""
    return key.partition("/")[0] if "/" in key else ""


def escape(value: str | None) -> str:
    """The value of a partition as the name of its folder has it."""
    return _ESCAPED.sub(lambda character: f"%{ord(character[0]):02X}", value) if value else _NO_VALUE


def _split(rows: pa.Table, partition_by: str | None) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each partition, with its folder."""
    if partition_by is None:
        yield "", rows
        return
    folder = partition_by == "folder"
    values = map(first_folder, rows["key"].to_pylist()) if folder else rows[partition_by].to_pylist()
    places: defaultdict[str | None, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        places[value].append(place)
    for value, taken in places.items():
        # A copy, not a slice, which would keep the whole batch in memory.
        yield f"{partition_by}={escape(value)}/", rows.take(pa.array(taken, pa.int64()))


class _OpenFile:
    """One Parquet file in memory, and rows that wait until they are a row group."""

    def __init__(self, schema: pa.Schema) -> None:
        self._sink = io.BytesIO()
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self.num_waiting = 0

    def add(self, rows: pa.Table) -> None:
        """Take in more rows."""
        self._waiting.append(rows)
        self._waiting_bytes += rows.nbytes
        self.num_waiting += rows.num_rows

    def write_group(self) -> None:
        """Write the waiting rows."""
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=self.num_waiting)
            self._waiting, self._waiting_bytes, self.num_waiting = [], 0, 0

    @property
    def num_bytes(self) -> int:
        """In the file so far."""
        return self._sink.tell()

    @property
    def memory(self) -> int:
        """Bytes held."""
        return self._sink.tell() + self._waiting_bytes

    def close(self) -> bytes:
        """The whole file."""
        self.write_group()
        self._writer.close()
        return self._sink.getvalue()


class _OpenFiles:
    """The file that each partition's next rows go to."""

    def __init__(self, files: Files, schema: pa.Schema, target_bytes: int, group_rows: int) -> None:
        self._files = files
        self._schema = schema
        self._target_bytes = target_bytes
        self._group_rows = group_rows
        self._open: dict[str, _OpenFile] = {}  # the one added to last is the last
        self._num_parts: Counter[str] = Counter()
        self._memory = 0

    def add(self, folder: str, rows: pa.Table) -> None:
        """Rows of one partition, in order."""
        for start in range(0, rows.num_rows, self._group_rows):
            file = self._open.pop(folder, None)
            if file is None:
                if len(self._open) >= MAX_OPEN_FILES:
                    self._close(next(iter(self._open)))
                file = _OpenFile(self._schema)
                self._memory += file.memory
            self._open[folder] = file
            self._memory -= file.memory
            file.add(rows.slice(start, self._group_rows))
            if file.num_waiting >= self._group_rows:
                file.write_group()
            self._memory += file.memory
            if file.num_bytes >= self._target_bytes:
                self._close(folder)
            elif self._memory > 2 * self._target_bytes:
                self._close(max(self._open, key=lambda each: self._open[each].memory))

    def close(self) -> None:
        """Write what is still open."""
        for folder in list(self._open):
            self._close(folder)

    def _close(self, folder: str) -> None:
        file = self._open.pop(folder)
        self._memory -= file.memory
        self._files.write(f"{folder}part-{self._num_parts[folder]:05d}.parquet", file.close())
        self._num_parts[folder] += 1
