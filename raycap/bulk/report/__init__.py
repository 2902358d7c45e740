"""An output of `raycap caption` -> report.html: a gallery of captioned images, the failures, plots and rates.

    captions/*.parquet --stream--> Digest (counts, histograms, times, top captions and words, a random sample)
    the sample's URIs  --fetch---> tiles: small JPEGs inside the page
    Digest + tiles + summary.json -> report.html.j2 -> one file that asks no network for anything

Memory is bounded by the size of one file, whatever the number of rows. Of an unfinished run, at most
`MAX_CHUNKS` of its finished chunks are read, drawn at random. The images are read again, since the output
holds none of them; one that has gone or changed meanwhile becomes a tile that says so. Knows nothing
of Ray, torch or the model.

    digest.py       rows -> Digest
    timeline.py     times of the captions -> throughput over time
    tiles.py        rows of the sample -> thumbnails
    page.py         Digest + tiles -> HTML
    report.html.j2  the page's template, with its style and script
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from raycap.bulk.layout import CAPTIONS_PREFIX, RUN, SUMMARY, Round, part_number
from raycap.bulk.report.digest import Digest
from raycap.bulk.report.page import Coverage, render
from raycap.bulk.report.tiles import make_tiles
from raycap.errors import ConfigurationError, NotFoundError, ObjectError, ObjectNotFoundError, StorageError
from raycap.images import ImageLimits
from raycap.storage import S3Options, Store, open_store

__all__ = ["REPORT", "write_report"]

REPORT: Final = "report.html"

_DEFAULT_S3: Final = S3Options()

_COLUMNS: Final = (
    *("uri", "key", "size", "status", "error_code", "error", "caption", "log_prob", "alternatives"),
    *("width", "height", "model_id", "captioned_at"),
)
_BATCH_ROWS: Final = 65_536
MAX_CHUNKS: Final = 1000
"""Chunk files of an unfinished run that are read: 256,000 rows, some ten seconds of small requests to S3."""


def write_report(output: str, *, s3: S3Options = _DEFAULT_S3, max_images: int = 200, seed: int = 0) -> str:
    """Write `report.html` into an output of `raycap caption`, finished or not, and return where it is.

    Args:
        output: directory or s3:// prefix with `captions/`.
        max_images: images in the gallery, drawn at random from all that have a caption.
        seed: of the draw. The same output and seed give the same sample.

    Raises:
        ConfigurationError: `output` has no captions, or they are not raycap's.
        StorageError: it cannot be read or written.
    """
    if max_images < 0:
        raise ConfigurationError(f"max_images must not be negative, got {max_images}")
    store = open_store(output, s3)
    summary = _read_json(store, SUMMARY)
    settings = _read_json(store, RUN)
    keys, coverage = _files(store, output, summary, settings, seed)
    digest = Digest(max_images=max_images, seed=seed)
    for key in keys:
        for batch in _batches(store, key):
            digest.add(batch)
    tiles = make_tiles(digest.sample.rows(), s3, _limits(settings))
    store.write(REPORT, render(output, summary, settings, coverage, digest, tiles).encode(errors="replace"))
    return store.uri(REPORT)


def _files(
    store: Store, output: str, summary: dict[str, Any], settings: dict[str, Any], seed: int
) -> tuple[list[str], Coverage]:
    """What to read: captions/, or while the first round goes on, its finished chunks, which are ahead of them."""
    what = f"{output} is not an output of raycap caption: no captions/ here"
    round_ = Round(settings.get("round") or 0)
    try:
        if not summary and not round_.number:
            chunks = (info.key for info in store.list(round_.chunks) if round_.chunk_number(info.key) is not None)
            keys, num_files = _draw(chunks, MAX_CHUNKS, seed)
            if keys:
                return keys, Coverage(num_files=num_files, num_read=len(keys))
        keys = [info.key for info in store.list(CAPTIONS_PREFIX) if part_number(info.key) is not None]
    except NotFoundError as error:
        raise ConfigurationError(f"{what} ({error})") from error
    if not keys:
        raise ConfigurationError(what)
    later_round = (summary.get("round") or 0) < round_.number
    return keys, Coverage(num_files=len(keys), num_read=len(keys), later_round=later_round)


def _draw(keys: Iterator[str], most: int, seed: int) -> tuple[list[str], int]:
    """At most so many of the keys at random (Vitter 1985, algorithm R), sorted; and how many there were."""
    chance, num_keys = random.Random(seed), 0
    drawn: list[str] = []
    for num_keys, key in enumerate(keys, start=1):
        if len(drawn) < most:
            drawn.append(key)
        elif (place := chance.randrange(num_keys)) < most:
            drawn[place] = key
    return sorted(drawn), num_keys


def _read_json(store: Store, key: str) -> dict[str, Any]:
    """A JSON object of the output; {} where the run has not got so far."""
    try:
        value = json.loads(store.read(key))
    except (ObjectNotFoundError, NotFoundError):
        return {}
    except ObjectError as error:
        raise StorageError(str(error)) from error
    except ValueError as error:
        raise ConfigurationError(f"{store.uri(key)} is not JSON: {error}; run the same command again") from error
    return value if isinstance(value, dict) else {}


def _limits(settings: dict[str, Any]) -> ImageLimits:
    """What the run allowed one file to cost: its images are decoded under the same limits again."""
    given = settings | (settings.get("limits") or {})
    names = ("max_bytes", "max_pixels")
    return ImageLimits(**{name: given[name] for name in names if isinstance(given.get(name), int)})


def _batches(store: Store, key: str) -> Iterator[pa.Table]:
    """The columns that matter of one file, a bounded number of rows at a time."""
    name = store.uri(key)
    try:
        file = pq.ParquetFile(io.BytesIO(store.read(key)))
        if missing := sorted(set(_COLUMNS) - set(file.schema_arrow.names)):
            raise ConfigurationError(f"{name} was not written by raycap: no column {', '.join(missing)}")
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(_COLUMNS)):
            yield pa.Table.from_batches([batch])
    except pa.ArrowInvalid as error:
        raise ConfigurationError(f"{name} is no readable Parquet file: {error}; caption again") from error
    except (OSError, ObjectError) as error:
        raise StorageError(f"cannot read {name}: {error}") from error
