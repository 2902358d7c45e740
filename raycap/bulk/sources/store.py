"""A directory, an image file or an s3:// prefix as a source: the objects that are there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from raycap.bulk.config import Selection
from raycap.bulk.sources.base import Reader, Rows, Source, SourceRow, skip_reason
from raycap.errors import ConfigurationError
from raycap.storage import Span, Store, is_s3

_NUM_SAMPLES = 20


class StoreSource(Source):
    """The objects of a store. A position is a key."""

    reader: Reader
    reads_by: Literal["key", "uri"] = "key"

    def __init__(self, store: Store, selection: Selection, output: str | None = None) -> None:
        """What is at `output`, where that lies inside the store, is no part of the source."""
        self.location = store.location
        self.reader = store
        self._store = store
        self._selection = selection
        root, inside = root_of(store.location), root_of(output or store.location)
        self._hidden = inside.removeprefix(root) if inside.startswith(root) and inside != root else None

    def check(self) -> None:
        self._store.check_readable()
        if self._hidden is not None:  # the first keys may be the output's, by the thousand
            return
        keys = [info.key for info in islice(self._store.list(), _NUM_SAMPLES)]
        if keys and all(key.endswith(".parquet") for key in keys) and not self._selection.all_files:
            raise ConfigurationError(
                f"{self.location}: expected images, found Parquet files; a manifest is a single file: name one of them "
                "(they can be joined into one), or give the directory or prefix of the images"
            )

    def spans(self, num: int) -> list[Span]:
        return [Span()] if self._selection.limit is not None else self._store.split(num)

    def rows(self, span: Span, *, after: str = "", taken: int = 0) -> Rows:
        return Rows(self._candidates(span, after), self._selection, taken)

    def _candidates(self, span: Span, after: str) -> Iterator[SourceRow]:
        all_files = self._selection.all_files
        for info in self._store.list_span(span, after=after):
            if info.key == after:  # SeaweedFS begins with it where it is the marker of a folder
                continue
            if self._hidden is not None and info.key.startswith(self._hidden):
                continue
            skip = skip_reason(info.key, info.size, all_files=all_files, storage_class=info.storage_class)
            yield SourceRow(info.uri, info.key, info.etag, info.size, skip, info.key)


def root_of(location: str) -> str:
    """A store's location with a `/` at its end; of a local one, without symbolic links."""
    location = location if is_s3(location) else os.path.realpath(location)
    return location.rstrip("/") + "/"
