"""The formats of manifest files: a local file to batches of columns, streamed."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any, BinaryIO, ClassVar, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from raycap.bulk.sources.columns import Batch, no_address_column, roles_of
from raycap.errors import ConfigurationError

BATCH_ROWS: Final = 4096
_BUFFER_BYTES: Final = 1024 * 1024
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_GZIP: Final = b"\x1f\x8b"


class Format(ABC):
    """How to read manifest files of one kind. `location` is what messages call the file."""

    row_name: ClassVar[str] = "row"
    """What messages call a row; they count from 1, without the header."""

    def split(self, path: str, location: str, num: int) -> list[int]:
        """Rows, from 0 on, where up to `num` parts begin that can be read on their own."""
        return [0]

    @abstractmethod
    def batches(self, path: str, location: str, start: int, stop: int | None) -> Iterator[Batch]:
        """The rows from `start` up to `stop`, which is None or a row that `split` gave.

        Raises ConfigurationError where the file is not of this format.
        """


@dataclass(frozen=True, slots=True)
class TextList(Format):
    """One address a line. Blank lines do not count; all others do: `#` begins no comment, keys may start with it."""

    row_name = "line"

    def batches(self, path: str, location: str, start: int, stop: int | None) -> Iterator[Batch]:
        for numbers, lines in _line_batches(path, location, start):
            yield Batch(numbers, {"address": [line.removesuffix("\n").removesuffix("\r") for line in lines]})


@dataclass(frozen=True, slots=True)
class JsonLines(Format):
    """One object a line; its keys are the columns."""

    row_name = "line"

    def batches(self, path: str, location: str, start: int, stop: int | None) -> Iterator[Batch]:
        roles_of_keys: dict[tuple[str, ...], dict[str, int]] = {}
        for numbers, lines in _line_batches(path, location, start):
            rows: list[dict[str, Any]] = []
            for number, line in zip(numbers, lines, strict=True):
                where = f"{location}, line {number + 1}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigurationError(f"{where}: expected a JSON object, got none: {error}") from error
                if not isinstance(row, dict):
                    raise ConfigurationError(f"{where}: expected a JSON object, got {line[:80].strip()!r}")
                keys = tuple(row)
                if keys not in roles_of_keys:
                    roles_of_keys[keys] = _roles(keys, where)
                values = list(row.values())
                rows.append({role: values[place] for role, place in roles_of_keys[keys].items()})
            roles = {role for row in rows for role in row}
            yield Batch(numbers, {role: [row.get(role) for row in rows] for role in roles})


@dataclass(frozen=True, slots=True)
class Delimited(Format):
    """CSV or TSV with a header; of a single column, also without one. Quotes as in RFC 4180."""

    delimiter: str
    names: tuple[str, ...] | None = None
    """Of the columns, where the file has no header."""

    def batches(self, path: str, location: str, start: int, stop: int | None) -> Iterator[Batch]:
        with _opened(path, location) as file:
            records = self._records(file, location)
            names = self.names
            if names is None:
                names = tuple(next(records, ()))
                if len(names) == 1 and roles_of(names) is None:
                    names, records = ("path",), chain([list(names)], records)
            if not names:
                return
            roles = _roles(names, location)
            records = islice(records, start, None)
            while rows := list(islice(records, BATCH_ROWS)):
                for number, row in enumerate(rows, start):
                    if len(row) != len(names):
                        raise ConfigurationError(
                            f"{location}, row {number + 1}: expected {len(names)} fields, got {len(row)}; "
                            "put fields with a delimiter or line break in them into quotes"
                        )
                numbers = range(start, start + len(rows))
                yield Batch(numbers, {role: [row[place] for row in rows] for role, place in roles.items()})
                start += len(rows)

    def _records(self, file: BinaryIO, location: str) -> Iterator[list[str]]:
        reader = csv.reader(_lines(file, location), delimiter=self.delimiter, strict=True)
        try:
            yield from filter(None, reader)  # blank lines have no fields
        except csv.Error as error:
            raise ConfigurationError(f"{location}, near line {reader.line_num}: not well-formed: {error}") from error


@dataclass(frozen=True, slots=True)
class Parquet(Format):
    """One column or more, read in row groups."""

    def split(self, path: str, location: str, num: int) -> list[int]:
        with _understood(location), pq.ParquetFile(path) as file:
            first_rows = _first_rows(file)
            total = max(1, first_rows[-1])
            parts = {first * num // total: first for first in reversed(first_rows[:-1])}
        return sorted({0, *parts.values()})

    def batches(self, path: str, location: str, start: int, stop: int | None) -> Iterator[Batch]:
        # A buffer, so that a row group is not read as a whole: some writers put everything into one.
        with _understood(location), pq.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            names = file.schema_arrow.names
            roles = _roles(names, location)
            first_rows = _first_rows(file)
            stop = first_rows[-1] if stop is None else stop
            groups = [
                group
                for group in range(file.num_row_groups)
                if first_rows[group] < stop and first_rows[group + 1] > start
            ]
            columns = [names[place] for place in roles.values()]
            number = first_rows[groups[0]] if groups else 0
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                rows = batch.slice(max(0, start - number))
                number += batch.num_rows
                yield _arrow_batch(rows, number - rows.num_rows, roles, names)


@dataclass(frozen=True, slots=True)
class Orc(Format):
    """One column or more, read stripe by stripe."""

    def batches(self, path: str, location: str, start: int, stop: int | None) -> Iterator[Batch]:
        from pyarrow import orc  # here, since some builds of pyarrow lack it

        with _understood(location):
            file = orc.ORCFile(path)
            names = file.schema.names
            roles = _roles(names, location)
            number = 0
            for stripe in range(file.nstripes):
                rows = file.read_stripe(stripe, columns=[names[place] for place in roles.values()])
                for first in range(max(0, start - number), rows.num_rows, BATCH_ROWS):
                    yield _arrow_batch(rows.slice(first, BATCH_ROWS), number + first, roles, names)
                number += rows.num_rows


def _arrow_batch(rows: pa.RecordBatch, first_row: int, roles: dict[str, int], names: Sequence[str]) -> Batch:
    columns = {}
    for role, place in roles.items():
        column = rows.column(rows.schema.get_all_field_indices(names[place])[0])  # a name may be there twice
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            column = column.cast(pa.string())  # of writers that do not say that it is text
        columns[role] = column.to_pylist()
    return Batch(range(first_row, first_row + rows.num_rows), columns)


def _first_rows(file: pq.ParquetFile) -> list[int]:
    """Of each row group, and the number of all rows."""
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    return list(accumulate(sizes, initial=0))


def _roles(names: Sequence[str], where: str) -> dict[str, int]:
    roles = roles_of(names)
    if roles is None:
        raise no_address_column(where, names)
    return roles


def _line_batches(path: str, location: str, start: int) -> Iterator[tuple[Sequence[int], Sequence[str]]]:
    """Numbers, from 0, and text of the lines from `start` on that are not blank."""
    with _opened(path, location) as file:
        lines = (
            (number, line)
            for number, line in enumerate(_lines(file, location))
            if number >= start and not line.isspace()
        )
        while batch := list(islice(lines, BATCH_ROWS)):
            numbers, texts = zip(*batch, strict=True)
            yield numbers, texts


def _lines(file: BinaryIO, location: str) -> Iterator[str]:
    """The lines as UTF-8 text, with their ends. Other characters that end lines in Python do not end them here."""
    for number, line in enumerate(file):
        try:
            yield (line if number else line.removeprefix(_BYTE_ORDER_MARK)).decode()
        except UnicodeDecodeError as error:
            raise ConfigurationError(
                f"{location}, line {number + 1}: expected UTF-8 text, got the byte 0x{line[error.start]:02x}; "
                "save the file as UTF-8"
            ) from error


@contextmanager
def _opened(path: str, location: str) -> Iterator[BinaryIO]:
    """The file, unpacked if it is packed with gzip, whatever its name says."""
    with _understood(location), open(path, "rb") as file:
        if file.peek(len(_GZIP)).startswith(_GZIP):
            with gzip.open(file) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


@contextmanager
def _understood(location: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{location}: cannot be read as the kind of file that its name says: {error}; check that it is whole"
        ) from error
