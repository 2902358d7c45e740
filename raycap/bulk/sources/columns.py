"""From the columns of a manifest file to rows: which column is what, and what may stand in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final
from urllib.parse import unquote_plus

from raycap.bulk.sources.base import SourceRow, skip_reason
from raycap.errors import ConfigurationError
from raycap.storage import is_s3, open_store

ADDRESS_COLUMNS: Final = ("uri", "url", "s3_uri", "path", "key", "file_name", "filename")
_ADDRESSES: Final = tuple(dict.fromkeys(name.replace("_", "") for name in ADDRESS_COLUMNS))
_OTHERS: Final = (
    "bucket",
    "etag",
    "size",
    "storageclass",
    "intelligenttieringaccesstier",
    "islatest",
    "isdeletemarker",
)
"""Names as S3 Inventory has them, in lower case and without `_`: its CSV says ETag where its Parquet says e_tag."""
_S3_ADDRESS: Final = re.compile(r"s3://[^/]+/.", re.DOTALL)
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|s3[an]?:", re.IGNORECASE)
_MAX_SIZE: Final = 2**63 - 1
_TRUE: Final = (True, "true", "True", "TRUE")
_FALSE: Final = (False, "false", "False", "FALSE")


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of a manifest file, column by column."""

    numbers: Sequence[int]
    """Of each row in its file, from 0."""
    columns: dict[str, list[Any]]
    """By role: `address`, and `bucket`, `etag`, `size` ... where they are."""


def roles_of(names: Sequence[str]) -> dict[str, int] | None:
    """Role -> place of its column; None if no column holds addresses. Case and `_` of the names do not matter."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        places.setdefault(name.strip().lower().replace("_", ""), place)
    if "bucket" in places and "key" in places:
        address = "key"
    else:
        places.pop("bucket", None)
        address = next((name for name in _ADDRESSES if name in places), "")
    if not address:
        return None
    return {"address": places[address]} | {name: places[name] for name in _OTHERS if name in places}


def no_address_column(location: str, names: Sequence[str]) -> ConfigurationError:
    """The error for a manifest file without one."""
    return ConfigurationError(
        f"{location}: expected a column {', '.join(ADDRESS_COLUMNS[:-1])} or {ADDRESS_COLUMNS[-1]} (or bucket and "
        f"key), got {', '.join(map(repr, names[:20])) or 'no columns'}; rename the one that holds the addresses"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMaker:
    """Makes the rows of one manifest file."""

    location: str
    """Of the file, for messages."""
    row_name: str
    """What its rows are called in messages: row or line."""
    root: str
    """Where relative addresses start: `s3://bucket/prefix/` or an absolute path, with its `/`."""
    bucket: str | None = None
    """Of all addresses, which then are keys."""
    url_encoded: bool = False
    """Whether the addresses are written as in the CSV files of S3 Inventory."""
    all_files: bool
    position: str
    """What the position of each row starts with."""

    def rows(self, batch: Batch) -> Iterator[SourceRow]:
        """One row for each of the batch. Raises ConfigurationError, with its number, for one that cannot be."""
        columns: dict[str, Iterable[Any]] = {name: batch.columns.get(name) or repeat(None) for name in _OTHERS}
        if self.bucket is not None:
            columns["bucket"] = repeat(self.bucket)
        values = zip(batch.numbers, batch.columns["address"], *columns.values(), strict=False)
        for number, key, bucket, etag, size, storage_class, tier, is_latest, is_deleted in values:
            try:
                if type(key) is not str or not key:
                    raise _BadRowError(f"expected an address, got {'none' if key in (None, '') else repr(key)}")
                if self.url_encoded:
                    key = unquote_plus(key, errors="strict")
                if not key.isascii():
                    key.encode()  # fails on half a surrogate pair, which JSON can hold and nothing after it can
                uri = self._uri(key) if bucket is None else _s3_uri(bucket, key)
                if size is not None and (type(size) is not int or not 0 <= size <= _MAX_SIZE):
                    size = _size(size)
                skip = skip_reason(
                    key,
                    size,
                    all_files=self.all_files,
                    storage_class=storage_class,
                    access_tier=tier,
                    is_old_version=not _flag(is_latest, True),
                    is_deleted=_flag(is_deleted, False),
                )
                yield SourceRow(uri, key, _etag(etag), size, skip, f"{self.position}{number}")
            except (_BadRowError, UnicodeError) as error:
                raise ConfigurationError(f"{self.location}, {self.row_name} {number + 1}: {error}") from error

    def _uri(self, address: str) -> str:
        if address.startswith("s3://"):
            if not _S3_ADDRESS.match(address):
                raise _BadRowError(f"expected s3://bucket/key, got {address!r}")
            return address
        if address.startswith("/"):
            return address
        if scheme := _SCHEME.match(address):
            if (scheme[1] or "").lower() in ("http", "https"):  # the rest is not shown: signed URLs hold secrets
                raise _BadRowError(f"{scheme[0]} addresses are not read; give s3://bucket/key or the path of a file")
            try:
                return open_store(address).location
            except ConfigurationError as error:
                raise _BadRowError(str(error)) from error
        if not is_s3(self.root):
            path = self.root + address
            return os.path.normpath(path) if "./" in path or "//" in path else path
        address = address.removeprefix("./")
        if address.startswith("../"):
            raise _BadRowError(f"{address!r} leads out of {self.root}; give s3://bucket/key in full")
        return self.root + address


class _BadRowError(Exception):
    """What is wrong with a row, before it is known which."""


def _s3_uri(bucket: Any, key: str) -> str:
    if type(bucket) is not str or not bucket or "/" in bucket:
        raise _BadRowError(f"expected the name of a bucket, got {bucket!r}")
    return f"s3://{bucket}/{key}"


def _size(value: Any) -> int | None:
    """A size that is not simply a number: of text files; of pandas, which makes floats where some are missing."""
    if value == "" or value != value:
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(_MAX_SIZE)) - 1:
        return int(value)
    if isinstance(value, float) and value.is_integer() and 0 <= value < _MAX_SIZE:
        return int(value)
    raise _BadRowError(f"expected a size in bytes, got {value!r}")


def _etag(value: Any) -> str:
    if value is None:
        return ""
    if type(value) is not str:
        raise _BadRowError(f"expected an etag, got {value!r}")
    if not value.isascii():
        raise _BadRowError(f"expected an etag of ASCII characters, got {value!r}")
    return value.strip('"')


def _flag(value: Any, default: bool) -> bool:
    if value is None or value == "":
        return default
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise _BadRowError(f"expected true or false, got {value!r}")
