"""What is to be captioned: from SOURCE to a stream of rows, before they are numbered.

    source = open_source("s3://photos/2024/", Selection(include=("*.jpg",)), S3Options())
    source.check()
    for span in source.spans(64):          # may be read in parallel
        for row in source.rows(span):      # streamed; row.position says where to go on

Knows nothing of Ray or torch, and reads no object but manifest files.

    base.py       SourceRow, and Source: what every source can do; why an object is not tried
    selection.py  the options that choose objects
    store.py      StoreSource: a directory, an image file or a prefix
    files.py      ManifestFile and Inventory: files of rows
    formats.py    Parquet, CSV, TSV, text, JSON Lines and ORC -> batches of columns
    columns.py    batches of columns -> rows: which column is what, and what may stand in it
    copies.py     manifest files of S3 on this machine
"""

from __future__ import annotations

from pathlib import Path

from raycap.bulk.config import Selection
from raycap.bulk.sources.base import Rows, Source, SourceRow, skip_message
from raycap.bulk.sources.files import Inventory, ManifestFile, format_of
from raycap.bulk.sources.selection import selector
from raycap.bulk.sources.store import StoreSource
from raycap.errors import ConfigurationError
from raycap.storage import LocalStore, S3Options, Store, open_store

__all__ = ["Rows", "Source", "SourceRow", "open_source", "skip_message"]


def open_source(location: str, selection: Selection, s3: S3Options, *, output: str | None = None) -> Source:
    """The source at a directory, an image file, an s3:// prefix or a manifest file. Reaches no server yet.

    A file named .parquet, .csv, .tsv, .txt, .lst or .jsonl is a manifest; so are manifest.json (of an S3 Inventory) and
    the text kinds packed with gzip (.csv.gz). Of a directory or prefix, what lies at `output` is no part.
    Raises ConfigurationError for a location or pattern that is none.
    """
    store = open_store(location, s3)
    selector(selection)  # refuses wrong patterns
    name = _file_name(store)
    if (format_ := format_of(name)) is not None:
        return ManifestFile(store.location, format_, selection, s3)
    if selection.root is not None:
        raise ConfigurationError(f"--root is for manifest files whose addresses are relative; {location} is none")
    if name == "manifest.json":
        return Inventory(store.location, selection, s3)
    return StoreSource(store, selection, output)


def _file_name(store: Store) -> str:
    """What the file is called that the location stands for; "" where it stands for a folder or bucket."""
    if isinstance(store, LocalStore):
        return "" if Path(store.location).is_dir() else Path(store.location).name
    return store.location.removeprefix("s3://").partition("/")[2].rpartition("/")[2]
