"""Makes the manifest of a round: the source's rows, many parts of the listing at a time, straight into shards.

Memory does not grow with the source: a part holds the rows of one shard. Each shard carries the state of its part so
far, so a listing that was stopped goes on after its last shards.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raycap.bulk.layout import SHARD_ROWS, Round
from raycap.bulk.manifest import SHARD_SCHEMA, Manifest, save_manifest, shard_bytes
from raycap.bulk.previous import Previous
from raycap.bulk.sources import Source, SourceRow
from raycap.errors import NotFoundError, ObjectError, StorageError
from raycap.storage import Span, Store

log = logging.getLogger(__name__)

LIST_THREADS = 16
"""Parts listed at a time: a listing waits for the server most of the time."""
LOG_EVERY_ROWS = 100_000
_STATE = b"raycap"


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """How far the listing of one part is; saved with each of its shards."""

    rows: int = 0
    bytes: int = 0
    filtered: int = 0
    replaced: int = 0
    digest: str = ""
    after: str = ""
    """Position of the last row."""


Chosen = Iterator[tuple[SourceRow, int | None]]
"""Rows to do, each with the id of the row that it replaces, None if it is new."""


def make_manifest(
    source: Source,
    output: Store,
    round_: Round,
    previous: Previous | None = None,
    *,
    on_listed: Callable[[int], None] = lambda num_objects: None,
) -> Manifest:
    """List the source into the manifest of this round; goes on with a listing that was stopped.

    `on_listed` hears now and then how many objects were listed so far. With `previous`, what the output holds already,
    only new and changed objects are taken; then a stopped listing starts again.
    Raises NotFoundError if the source holds no objects.
    """
    if previous is not None:
        _delete_all(output, round_.folder)
    spans = _spans(source, output, round_)
    lister = _Lister(source, output, round_, previous, on_listed)
    with ThreadPoolExecutor(LIST_THREADS, thread_name_prefix="raycap-list") as pool:
        try:
            states = list(pool.map(lister.list_span, range(len(spans)), spans))
        finally:
            lister.stop.set()  # on Ctrl-C, the threads end too
    nothing = not any(state.rows for state in states)
    if previous is not None and previous.num_rows and nothing and not previous.has_seen_any:
        raise NotFoundError(
            f"{source.location}: there is none of the {previous.num_rows} objects any more, nor a new one; is it "
            "there, and mounted? --update would drop all captions"
        )
    if previous is None and nothing:
        num_filtered = sum(state.filtered for state in states)
        left_out = f"; the selection left out all {num_filtered}" if num_filtered else ""
        raise NotFoundError(f"{source.location}: there are no objects here{left_out}; check the path or prefix")
    return _save(output, round_, states, previous, num_deleted=previous.write_deleted(round_) if previous else 0)


def list_again(output: Store, round_: Round, previous: Previous) -> Manifest:
    """The manifest of the failed rows that are to be tried again."""
    _delete_all(output, round_.folder)
    state = _write_shards(output, round_, 0, previous.failed(), _State(), lambda: 0)
    return _save(output, round_, [state], previous, num_deleted=0)


def _save(
    output: Store, round_: Round, states: list[_State], previous: Previous | None, *, num_deleted: int
) -> Manifest:
    manifest = Manifest(
        round=round_.number,
        span_rows=tuple(state.rows for state in states),
        num_bytes=sum(state.bytes for state in states),
        num_filtered=sum(state.filtered for state in states),
        num_replaced=sum(state.replaced for state in states),
        num_deleted=num_deleted,
        fingerprint=hashlib.sha256("".join(state.digest for state in states).encode()).hexdigest()[:20],
        first_row_id=previous.first_free_id if previous else 0,
        parts=previous.parts if previous else (),
        num_before=previous.num_rows if previous else 0,
    )
    _delete_all(output, round_.chunks)  # of an earlier manifest that somebody deleted: other objects
    save_manifest(output, manifest)
    return manifest


def _delete_all(output: Store, prefix: str) -> None:
    try:
        keys = [info.key for info in output.list(prefix)]
    except NotFoundError:  # a directory that is not there yet
        return
    for key in keys:
        output.delete(key)


def _spans(source: Source, output: Store, round_: Round) -> list[Span]:
    """The parts of the listing: those that an earlier try wrote down, so that its shards still fit."""
    if output.exists(round_.listing):
        try:
            return [Span(**span) for span in json.loads(output.read(round_.listing))]
        except (ValueError, TypeError, ObjectError) as error:
            raise StorageError(f"{output.uri(round_.listing)} was changed: {error}; choose another output") from error
    _delete_all(output, round_.folder)  # shards of other parts
    spans = source.spans(2 * LIST_THREADS)
    output.write(round_.listing, (json.dumps([asdict(span) for span in spans]) + "\n").encode())
    return spans


class _Lister:
    """Lists parts of the source into shards, one part a thread."""

    def __init__(
        self,
        source: Source,
        output: Store,
        round_: Round,
        previous: Previous | None,
        on_listed: Callable[[int], None],
    ) -> None:
        self.source = source
        self.output = output
        self.round = round_
        self.previous = previous
        self.stop = threading.Event()
        self._on_listed = on_listed
        self._counting = threading.Lock()
        self._num_listed = 0
        self._last_shards: dict[int, int] = {}
        for info in output.list(round_.shards):
            if numbers := round_.shard_numbers(info.key):
                span, shard = numbers
                self._last_shards[span] = max(shard, self._last_shards.get(span, 0))

    def list_span(self, number: int, span: Span) -> _State:
        """Write the shards of one part; gives its state at the end."""
        state = self._resumed(number)
        if state.rows % SHARD_ROWS:  # its last shard is not full, so there was no more
            return state
        listed = self.source.rows(span, after=state.after, taken=state.rows)
        rows = self._counted(listed)
        chosen = self.previous.changed(rows) if self.previous else ((row, None) for row in rows)
        return _write_shards(self.output, self.round, number, chosen, state, lambda: listed.num_filtered)

    def _resumed(self, number: int) -> _State:
        if number not in self._last_shards:
            return _State()
        key = self.round.shard(number, self._last_shards[number])
        try:
            schema = pq.read_schema(io.BytesIO(self.output.read(key)))
            return _State(**json.loads(schema.metadata[_STATE]))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, ObjectError) as error:
            raise StorageError(f"{self.output.uri(key)} was changed: {error}; choose another output") from error

    def _counted(self, rows: Iterable[SourceRow]) -> Iterator[SourceRow]:
        """The rows, counted; ends when the listing is to stop."""
        for number, row in enumerate(rows, 1):
            yield row
            if number % 1000 == 0:
                if self.stop.is_set():
                    raise StorageError("the listing was stopped")
                self._count(1000)

    def _count(self, num_rows: int) -> None:
        with self._counting:
            before, self._num_listed = self._num_listed, self._num_listed + num_rows
            self._on_listed(self._num_listed)
            if self._num_listed // LOG_EVERY_ROWS > before // LOG_EVERY_ROWS:
                log.info("listing %s: %d objects so far", self.source.location, self._num_listed)


def _write_shards(
    output: Store, round_: Round, span: int, chosen: Chosen, state: _State, num_filtered: Callable[[], int]
) -> _State:
    """Write what is left of one part, from `state` on."""
    filtered_before = state.filtered
    for shard in itertools.count(state.rows // SHARD_ROWS):
        batch = list(itertools.islice(chosen, SHARD_ROWS))
        state = _advanced(state, batch, filtered_before + num_filtered())
        if batch:
            table = _table(batch).replace_schema_metadata({_STATE: json.dumps(asdict(state))})
            output.write(round_.shard(span, shard), shard_bytes(table))
        if len(batch) < SHARD_ROWS:
            return state
    raise AssertionError("the parts of a listing end")


def _advanced(state: _State, batch: list[tuple[SourceRow, int | None]], num_filtered: int) -> _State:
    digest = hashlib.sha256(state.digest.encode())
    for row, _ in batch:
        digest.update(f"{row.uri}\0{row.etag}\0".encode(errors="surrogatepass"))
    return _State(
        rows=state.rows + len(batch),
        bytes=state.bytes + sum(row.size or 0 for row, _ in batch),
        filtered=num_filtered,
        replaced=state.replaced + sum(replaces is not None for _, replaces in batch),
        digest=digest.hexdigest(),
        after=batch[-1][0].position if batch else state.after,
    )


def _table(batch: list[tuple[SourceRow, int | None]]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "replaces": [replaces for _, replaces in batch],
        "uri": [row.uri for row, _ in batch],
        "key": [row.key for row, _ in batch],
        "etag": [row.etag for row, _ in batch],
        "size": [row.size for row, _ in batch],
        "skip": [row.skip for row, _ in batch],
    }
    return pa.table(columns, schema=SHARD_SCHEMA)
