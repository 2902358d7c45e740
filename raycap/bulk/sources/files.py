"""Manifest files as sources: one file with an address a row, or an S3 Inventory with its data files."""

from __future__ import annotations

import json
import os
import re
from abc import abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from raycap.bulk.config import Selection
from raycap.bulk.sources.base import Reader, Rows, Source, SourceRow
from raycap.bulk.sources.columns import RowMaker
from raycap.bulk.sources.copies import LocalCopy, find
from raycap.bulk.sources.formats import Delimited, Format, JsonLines, Orc, Parquet, TextList
from raycap.errors import ConfigurationError
from raycap.storage import Anywhere, S3Options, Span, is_s3, open_store

_NAME: Final = re.compile(r".*(\.parquet|(\.csv|\.tsv|\.txt|\.lst|\.jsonl)(\.gz)?)", re.DOTALL)
_FORMATS: Final[dict[str, Format]] = {
    ".parquet": Parquet(),
    ".csv": Delimited(","),
    ".tsv": Delimited("\t"),
    ".txt": TextList(),
    ".lst": TextList(),
    ".jsonl": JsonLines(),
}
_INVENTORY_KEYS: Final = ("sourceBucket", "destinationBucket", "fileFormat", "fileSchema", "files")


def format_of(name: str) -> Format | None:
    """The format of a manifest file with this name; None if such a name is not that of a manifest file."""
    match = _NAME.fullmatch(name.lower())
    return _FORMATS[match[2] or match[1]] if match else None


@dataclass(frozen=True, slots=True)
class _File:
    """One file of rows."""

    copy: LocalCopy
    format: Format
    maker: RowMaker


class FileSource(Source):
    """The rows of one file or several; each is one row of the output, also where two have the same address.

    A position is `FILE:ROW`, both counted from 0. A span goes from behind one to another; its `prefix` is the version
    of the file at `location`, so that a listing that was stopped does not go on with another file.
    """

    reader: Reader
    reads_by: Literal["key", "uri"] = "uri"

    def __init__(self, location: str, selection: Selection, s3: S3Options) -> None:
        self.location = location
        self.reader = Anywhere(s3)
        self._selection = selection
        self._s3 = s3

    def spans(self, num: int) -> list[Span]:
        starts = [(0, 0)] if self._selection.limit is not None else self._starts(num)
        ends = [_position(file, row - 1) for file, row in starts]
        return [
            Span(prefix=self._version, after=after, until=until)
            for after, until in zip(ends, [*ends[1:], None], strict=True)
        ]

    def rows(self, span: Span, *, after: str = "", taken: int = 0) -> Rows:
        return Rows(self._candidates(span, after or span.after), self._selection, taken)

    @property
    @abstractmethod
    def _files(self) -> list[_File]:
        """All files, in order."""

    @abstractmethod
    def _starts(self, num: int) -> list[tuple[int, int]]:
        """File and row where each of about `num` parts begins."""

    @cached_property
    def _version(self) -> str:
        return find(self.location, self._s3).etag

    def _candidates(self, span: Span, after: str) -> Generator[SourceRow]:
        if span.prefix != self._version:
            raise ConfigurationError(
                f"{self.location} was changed after the listing of it had begun; put the former file back, "
                "or choose another output"
            )
        first_file, row_before = map(int, after.split(":"))
        last_file, last_row = len(self._files) - 1, None
        if span.until is not None:
            last_file, last_row = map(int, span.until.split(":"))
        for number in range(first_file, last_file + 1):
            start = row_before + 1 if number == first_file else 0
            stop = last_row + 1 if last_row is not None and number == last_file else None
            if stop is None or start < stop:
                yield from self._rows_of(self._files[number], start, stop)

    def _rows_of(self, file: _File, start: int, stop: int | None) -> Iterator[SourceRow]:
        with file.copy.opened() as path:
            for batch in file.format.batches(path, file.copy.location, start, stop):
                yield from file.maker.rows(batch)


class ManifestFile(FileSource):
    """One manifest file: Parquet, CSV, TSV, a text list or JSON Lines."""

    def __init__(self, location: str, format_: Format, selection: Selection, s3: S3Options) -> None:
        super().__init__(location, selection, s3)
        self._format = format_
        self._copy = LocalCopy(location, s3, keep=True)

    def check(self) -> None:
        with closing(self._candidates(self.spans(1)[0], _position(0, -1))) as rows:
            next(rows, None)

    @cached_property
    def _files(self) -> list[_File]:
        maker = RowMaker(
            location=self.location,
            row_name=self._format.row_name,
            root=self._root(),
            all_files=self._selection.all_files,
            position="0:",
        )
        return [_File(self._copy, self._format, maker)]

    def _root(self) -> str:
        if self._selection.root is not None:
            return open_store(self._selection.root).location.rstrip("/") + "/"
        return self.location.rpartition("/")[0] + "/"

    def _starts(self, num: int) -> list[tuple[int, int]]:
        with self._copy.opened() as path:
            return [(0, row) for row in self._format.split(path, self.location, num)]


class Inventory(FileSource):
    """An S3 Inventory, by its manifest.json.

    The data files lie where that says. Of a manifest.json that was copied to this machine, they are looked for in the
    folder data/ beside its own first, as S3 lays them out.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html
    """

    def check(self) -> None:
        if self._files:
            find(self._files[0].copy.location, self._s3)

    @cached_property
    def _files(self) -> list[_File]:
        with LocalCopy(self.location, self._s3).opened() as path, open(path, "rb") as file:
            inventory = self._parsed(file.read())
        is_csv = inventory["fileFormat"].upper() == "CSV"
        bucket = inventory["destinationBucket"].rpartition(":")[2]  # arn:aws:s3:::BUCKET
        format_: Format = Parquet() if inventory["fileFormat"].upper() == "PARQUET" else Orc()
        if is_csv:
            format_ = Delimited(",", names=tuple(name.strip() for name in inventory["fileSchema"].split(",")))
        files = []
        for number, each in enumerate(inventory["files"]):
            location = self._beside(each["key"]) or f"s3://{bucket}/{each['key']}"
            maker = RowMaker(
                location=location,
                row_name="row",
                root="",
                bucket=inventory["sourceBucket"],
                url_encoded=is_csv,
                all_files=self._selection.all_files,
                position=f"{number}:",
            )
            files.append(_File(LocalCopy(location, self._s3, md5=each.get("MD5checksum")), format_, maker))
        return files

    def _parsed(self, data: bytes) -> dict[str, Any]:
        expected = f"expected the manifest.json of an S3 Inventory, an object with {', '.join(_INVENTORY_KEYS)}"
        try:
            value: dict[str, Any] = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{self.location}: {expected}, got no JSON: {error}") from error
        files = value.get("files") if isinstance(value, dict) else None
        if (
            not isinstance(files, list)
            or not all(isinstance(value.get(key), str) for key in _INVENTORY_KEYS[:-1])
            or not all(isinstance(each, dict) and isinstance(each.get("key"), str) for each in files)
        ):
            raise ConfigurationError(f"{self.location}: {expected}; what is there is something else")
        if value["fileFormat"].upper() not in ("CSV", "PARQUET", "ORC"):
            raise ConfigurationError(
                f"{self.location}: expected data files in CSV, Parquet or ORC, got {value['fileFormat']!r}"
            )
        return value

    def _beside(self, key: str) -> str | None:
        if is_s3(self.location):
            return None
        folder = os.path.dirname(os.path.dirname(self.location))  # noqa: PTH120
        path = os.path.join(folder, "data", key.rpartition("/")[2])  # noqa: PTH118
        return path if os.path.exists(path) else None  # noqa: PTH110

    def _starts(self, num: int) -> list[tuple[int, int]]:
        num_files = len(self._files)
        num = max(1, min(num, num_files))
        return [(part * num_files // num, 0) for part in range(num)]


def _position(file: int, row: int) -> str:
    return f"{file}:{row}"
