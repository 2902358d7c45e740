"""captions/ of a finished output -> batches of rows, all of them or an error."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from raycap.bulk.commit import read_json
from raycap.bulk.layout import CAPTIONS_PREFIX, SUMMARY, part_number
from raycap.bulk.rows import OUTPUT_SCHEMA
from raycap.errors import ConfigurationError, NotFoundError, ObjectError, StorageError
from raycap.storage import Store

BATCH_ROWS: Final = 16_384
"""Rows of a batch: about 10 MB of columns."""
_PYTHON_ROWS: Final = 1024
"""Rows that are Python objects at a time: about 3 MB."""


class Captions:
    """The rows of a finished output, in the order of their ids. Holds one file of captions/ at a time."""

    def __init__(self, output: Store) -> None:
        """Raises ConfigurationError if the output is not finished."""
        if not output.exists(SUMMARY):
            raise ConfigurationError(
                f"{output.location} is no finished output of raycap caption: no {SUMMARY} here. "
                "Check the path, or let the same raycap caption command finish first"
            )
        summary = read_json(output, SUMMARY)
        self.num_rows: int = summary.get("num_objects", 0)
        self.finished_at: str | None = summary.get("finished_at")
        self._output = output
        try:
            parts = {part_number(info.key): info for info in output.list(CAPTIONS_PREFIX)}
        except NotFoundError as error:
            raise ConfigurationError(f"{output.location} has no captions/ any more ({error})") from error
        self._keys = [parts[number].key for number in sorted(number for number in parts if number is not None)]
        self.bytes_per_row = sum(info.size for number, info in parts.items() if number is not None) / max(
            1, self.num_rows
        )
        """Of the files in captions/."""

    def batches(self, columns: Sequence[str] = OUTPUT_SCHEMA.names) -> Iterator[pa.Table]:
        """Every row once. Raises StorageError at the end if there were not as many as the summary says."""
        num_rows = 0
        for key in self._keys:
            for batch in self._read(key, columns):
                num_rows += batch.num_rows
                yield batch
        if num_rows != self.num_rows:
            raise StorageError(
                f"expected {self.num_rows} rows in {self._output.uri(CAPTIONS_PREFIX)}, as {SUMMARY} says, "
                f"got {num_rows}: files were added, changed or lost. Caption into another output"
            )

    def rows(self, columns: Sequence[str] = OUTPUT_SCHEMA.names) -> Iterator[dict[str, Any]]:
        """Every row once, as Python objects."""
        for batch in self.batches(columns):
            for start in range(0, batch.num_rows, _PYTHON_ROWS):
                yield from batch.slice(start, _PYTHON_ROWS).to_pylist()

    def _read(self, key: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        name = self._output.uri(key)
        try:
            file = pq.ParquetFile(io.BytesIO(self._output.read(key)))
            if missing := sorted(set(columns) - set(file.schema_arrow.names)):
                raise StorageError(f"{name} was not written by raycap: no column {', '.join(missing)}")
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
                yield pa.Table.from_batches([batch]).select(columns)
        except (pa.ArrowException, OSError, ObjectError) as error:
            raise StorageError(f"{name} cannot be read: {error}; caption into another output") from error
