"""What every source gives: rows, and for each the reason if its object is not tried."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Final, Literal, NamedTuple, Protocol

from raycap.bulk.config import Selection
from raycap.bulk.sources.selection import selector
from raycap.images import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES
from raycap.storage import Span

_TRIED: Final = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES)
_ARCHIVES: Final = ("GLACIER", "DEEP_ARCHIVE")
_ARCHIVE_TIERS: Final = ("ARCHIVE", "ARCHIVE_ACCESS", "DEEP_ARCHIVE", "DEEP_ARCHIVE_ACCESS")
_MESSAGES: Final = {
    "folder_marker": "an empty object whose key ends in '/' marks a folder; it is no image",
    "archived": "it is in an archive storage class, from which it cannot be read before it is restored; whether it was "
    "is not told: restore it, then name it in a manifest without storage classes",
    "old_version": "not the current version of its object; only that one is captioned",
    "deleted": "a delete marker: the object was deleted",
}


class SourceRow(NamedTuple):
    """One object that is to have a row in the output.

    A tuple, since there are millions: a frozen dataclass takes more than twice as long to make.
    """

    uri: str
    """Where it is, in full, as in `ObjectInfo.uri`."""
    key: str
    """Of a listing, the path below its root; of a manifest file, the address as it is written there."""
    etag: str
    """Changes when the content changes; "" where a manifest file does not tell it."""
    size: int | None
    """Bytes; None where a manifest file does not tell it."""
    skip: str | None
    """Code of the reason why the object is not tried; None for those that are. See `skip_message`."""
    position: str
    """Where to go on after this row: see `Source.rows`."""


class Reader(Protocol):
    """What the objects are read with. Small, can be pickled, may be used by many threads."""

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole content of one object; raises as `Store.read`."""
        ...


class Rows(Iterator[SourceRow]):
    """The selected rows of one part of a source, streamed. For one thread."""

    num_filtered: int
    """Rows that the selection left out so far: those before the row that came last, or all once there are no more."""

    def __init__(self, candidates: Iterable[SourceRow], selection: Selection, taken: int) -> None:
        self.num_filtered = 0
        self._rows = self._selected(candidates, selection, taken)

    def __next__(self) -> SourceRow:
        return next(self._rows)

    def _selected(self, candidates: Iterable[SourceRow], selection: Selection, taken: int) -> Iterator[SourceRow]:
        takes, limit = selector(selection), selection.limit
        if limit is not None and taken >= limit:
            return
        for row in candidates:
            if not takes(row.key, row.size):
                self.num_filtered += 1
                continue
            taken += 1
            yield row
            if taken == limit:
                return


class Source(ABC):
    """What is to be captioned. Knows nothing of row ids: those follow from the order of spans and rows."""

    location: str
    """As in `Store.location`."""
    reader: Reader
    """Reads the objects, in any process."""
    reads_by: Literal["key", "uri"]
    """The column of the row that `reader.read` takes."""

    @abstractmethod
    def check(self) -> None:
        """Return if rows can be had from here, else raise the one ConfigurationError or StorageError that says why.

        Answers fast, but for a manifest file on S3, which is copied first.
        """

    @abstractmethod
    def spans(self, num: int) -> list[Span]:
        """About `num` parts or fewer, in order, whose rows can be streamed in parallel. With a limit there is one."""

    @abstractmethod
    def rows(self, span: Span, *, after: str = "", taken: int = 0) -> Rows:
        """The selected rows of a part; with `after`, the position of one of them, those behind it.

        `taken`: the rows up to there, for the limit. Raises ConfigurationError or StorageError while it is consumed.
        """


def skip_reason(
    key: str,
    size: int | None,
    *,
    all_files: bool,
    storage_class: str | None = None,
    access_tier: str | None = None,
    is_old_version: bool = False,
    is_deleted: bool = False,
) -> str | None:
    """Code of the first reason not to try this object; None if there is none."""
    if is_deleted:
        return "deleted"
    if is_old_version:
        return "old_version"
    if size == 0 and key.endswith("/"):
        return "folder_marker"
    if not all_files and _suffix_of_no_image(key):
        return "other_suffix"
    if storage_class in _ARCHIVES or (access_tier and str(access_tier).upper().replace(" ", "_") in _ARCHIVE_TIERS):
        return "archived"
    return None


def skip_message(code: str, key: str) -> str:
    """What the row of a skipped object says of it, for each code that `skip_reason` gives."""
    if code == "other_suffix":
        return f".{_suffix_of_no_image(key)} is not the suffix of an image; --all-files tries every object"
    return _MESSAGES[code]


def _suffix_of_no_image(key: str) -> str:
    """The suffix, without its dot, if there is one and no image has it. Keys without one (hashes, ids) are tried."""
    stem, _, suffix = key.rstrip("/").rpartition("/")[2].rpartition(".")
    lower = suffix.lower()
    is_other = lower not in _TRIED and stem and 1 <= len(suffix) <= 7 and suffix.isalnum() and not suffix.isdigit()
    return suffix if is_other else ""
