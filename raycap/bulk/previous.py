"""What an output holds already, for the rounds after the first: which objects, at which version, and which failed.

About 45 bytes of memory a row, 100 while it is read: 100 MB for a million. Knows nothing of Ray or torch.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raycap.bulk.layout import CAPTIONS_PREFIX, SHARD_ROWS, Round, part_key, part_number
from raycap.bulk.manifest import parquet_table
from raycap.bulk.rows import FAILED, SKIPPED
from raycap.bulk.sources import SourceRow
from raycap.errors import ObjectError, StorageError
from raycap.storage import Store

_NOT_THERE, _UNCHANGED = -1, -2


def part_keys(output: Store) -> list[str]:
    """The files in captions/, in order."""
    numbers = (part_number(info.key) for info in output.list(CAPTIONS_PREFIX))
    return [part_key(number) for number in sorted(number for number in numbers if number is not None)]


def read_part(output: Store, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One file of captions/. Raises StorageError if it is none any more."""
    try:
        return parquet_table(output.read(key), columns)
    except (pa.ArrowException, OSError, ObjectError) as error:
        raise StorageError(f"{output.uri(key)} cannot be read: {error}; caption into another output") from error


class Previous:
    """The rows of a finished output, by a digest of their addresses."""

    def __init__(self, output: Store, retry: Sequence[str] | None = None, *, next_row_id: int = 0) -> None:
        """`retry`: failed rows count as changed: those with one of these error codes, or all if it is empty. None: they
        stay as they are. `next_row_id`: ids below were given, if to objects that have gone since."""
        self._output = output
        self._retry = retry
        columns: dict[str, list[np.ndarray]] = {"address": [], "etag": [], "id": [], "again": [], "skipped": []}
        parts = []
        for key in part_keys(output):
            rows = read_part(output, key, ["row_id", "uri", "etag", "status", "error_code"])
            row_ids = rows["row_id"].to_numpy()
            columns["address"].append(_digests(rows["uri"].to_pylist()))
            columns["etag"].append(_digests(rows["etag"].to_pylist())["low"])
            columns["id"].append(row_ids)
            columns["again"].append(self._to_do_again(rows))
            columns["skipped"].append(np.asarray(pc.fill_null(pc.equal(rows["status"], SKIPPED), False)))
            parts.append((int(row_ids[0]), int(row_ids[-1])) if len(row_ids) else (0, -1))
        self.parts = tuple(parts)
        """First and last row id of each file."""
        empty = {"address": _digests([]), "etag": np.empty(0, np.uint64), "id": np.empty(0, np.int64)}
        whole = {name: np.concatenate([empty.get(name, np.empty(0, bool)), *each]) for name, each in columns.items()}
        self._ids = whole["id"]
        self.num_rows = len(self._ids)
        self.first_free_id = max(next_row_id, int(self._ids.max(initial=-1)) + 1)
        self._order = np.argsort(whole["address"]["high"], kind="stable")
        self._addresses, self._etags = whole["address"][self._order], whole["etag"][self._order]
        self._again, self._skipped = whole["again"][self._order], whole["skipped"][self._order]
        self._seen = np.zeros(self.num_rows, bool)
        self._pairing = threading.Lock()

    @property
    def has_seen_any(self) -> bool:
        """Whether `changed` met any of these rows."""
        return bool(self._seen.any())

    def _to_do_again(self, rows: pa.Table) -> np.ndarray:
        if self._retry is None:
            return np.zeros(rows.num_rows, bool)
        again = pc.equal(rows["status"], FAILED)
        if self._retry:
            again = pc.and_(again, pc.is_in(rows["error_code"], value_set=pa.array(self._retry, pa.string())))
        return np.asarray(pc.fill_null(again, False))

    def changed(self, rows: Iterable[SourceRow]) -> Iterator[tuple[SourceRow, int | None]]:
        """Of these rows, those to be done: with the id of the row that they replace, or None for new objects."""
        rows = iter(rows)
        while batch := list(islice(rows, SHARD_ROWS)):
            for row, found in zip(batch, self._match(batch).tolist(), strict=True):
                if found != _UNCHANGED:
                    yield row, None if found == _NOT_THERE else found

    def _match(self, batch: list[SourceRow]) -> np.ndarray:
        """The id of the row to replace for each; or _NOT_THERE, or _UNCHANGED.

        A list may name an address more than once: each earlier row stands for one of them, with the same etag if
        there is one.
        """
        wanted = _digests([row.uri for row in batch])
        etags = _digests([row.etag for row in batch])["low"]
        places = np.searchsorted(self._addresses["high"], wanted["high"])
        result = np.full(len(batch), _NOT_THERE, np.int64)
        with self._pairing:
            for i, place in enumerate(places.tolist()):
                free = [each for each in self._same_address(place, wanted[i]) if not self._seen[self._order[each]]]
                if free:
                    found = next((each for each in free if self._etags[each] == etags[i]), free[0])
                    self._seen[self._order[found]] = True
                    same = self._etags[found] == etags[i] and not self._again[found]
                    if self._skipped[found] and batch[i].skip is None:  # restored from an archive, for instance
                        same = False
                    result[i] = _UNCHANGED if same else self._ids[self._order[found]]
        return result

    def _same_address(self, place: int, wanted: np.void) -> Iterator[int]:
        """From the first place with the same half of the digest on, those with both halves."""
        while place < self.num_rows and self._addresses["high"][place] == wanted["high"]:
            if self._addresses["low"][place] == wanted["low"]:
                yield place
            place += 1

    def failed(self) -> Iterator[tuple[SourceRow, int | None]]:
        """The rows to do again, without asking the source what there is."""
        for key in part_keys(self._output):
            rows = read_part(self._output, key, ["row_id", "uri", "key", "etag", "size", "status", "error_code"])
            for row in rows.filter(pa.array(self._to_do_again(rows))).to_pylist():
                yield _source_row(row), row["row_id"]

    def write_deleted(self, round_: Round) -> int:
        """Write down the rows whose object no listing showed to `changed`; returns how many."""
        gone, start = [], 0
        for key in part_keys(self._output):
            rows = read_part(self._output, key, ["row_id", "uri", "key"])
            seen = self._seen[start : start + rows.num_rows]
            start += rows.num_rows
            gone.append(rows.filter(pa.array(~seen)))
        deleted = pa.concat_tables(gone) if gone else None
        if deleted is None or not deleted.num_rows:
            self._output.delete(round_.deleted)
            return 0
        sink = io.BytesIO()
        pq.write_table(deleted, sink, compression="zstd")
        self._output.write(round_.deleted, sink.getvalue())
        return int(deleted.num_rows)


def deleted_ids(output: Store, round_: Round) -> np.ndarray:
    """Row ids of the deleted objects of this round, sorted, int64."""
    if not output.exists(round_.deleted):
        return np.empty(0, np.int64)
    return np.sort(read_part(output, round_.deleted, ["row_id"])["row_id"].to_numpy())


def _source_row(row: dict[str, Any]) -> SourceRow:
    return SourceRow(
        uri=row["uri"], key=row["key"], etag=row["etag"], size=row["size"], skip=None, position=str(row["row_id"])
    )


def _digests(texts: list[str]) -> np.ndarray:
    """16 bytes for each text, as two 64-bit halves."""
    data = b"".join(blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest() for text in texts)
    return np.frombuffer(data, np.dtype([("high", "<u8"), ("low", "<u8")]))
