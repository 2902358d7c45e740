"""Rows of the output -> tiles: their images, fetched again and shrunk. Knows nothing of Parquet, counts or HTML."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from PIL import Image

from raycap.errors import NotFoundError, ObjectNotFoundError, RaycapError, StorageError
from raycap.html import jpeg_uri
from raycap.images import ImageLimits, Preprocessing, decode_image
from raycap.storage import S3Options, is_s3, open_store

_THUMBNAIL: Final = Preprocessing(size_px=240, resize="pad")
_FETCH_THREADS: Final = 4
"""Few, because each may decode an image of `ImageLimits.max_pixels`."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of the gallery."""

    row: dict[str, Any]
    """Its row of the output."""
    thumbnail: str = ""
    """JPEG as a data: URI; "" where there is none."""
    width: int = 0
    height: int = 0
    """Of the thumbnail, in pixels."""
    tint: str = ""
    """Average colour, #rrggbb."""
    note: str = ""
    """Why there is no thumbnail, or what is odd about it."""


def make_tiles(rows: list[dict[str, Any]], s3: S3Options, limits: ImageLimits) -> list[Tile]:
    """A tile for every row, in their order; one whose image cannot be had carries a note instead."""
    unreachable: dict[str, str] = {}
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        return list(pool.map(partial(_make_tile, s3=s3, limits=limits, unreachable=unreachable), rows))


def _make_tile(row: dict[str, Any], *, s3: S3Options, limits: ImageLimits, unreachable: dict[str, str]) -> Tile:
    """Fetch and shrink one image. `unreachable` collects the buckets that fail as a whole: each is waited for once."""
    uri = str(row["uri"] or "")
    bucket = uri.split("/")[2] if is_s3(uri) else ""
    with _notes_lock:
        note = unreachable.get(bucket, "")
    if note:
        return Tile(row, note=note)
    try:
        parent, _, name = uri.rpartition("/")
        data = open_store(f"{parent}/", s3).read(name, max_bytes=limits.max_bytes)
        thumbnail = _thumbnail(data, limits)
    except (ObjectNotFoundError, NotFoundError):
        return Tile(row, note="The image is no longer there.")
    except StorageError as error:
        if bucket:
            with _notes_lock:
                unreachable[bucket] = str(error)
        return Tile(row, note=str(error))
    except RaycapError as error:
        return Tile(row, note=str(error))
    red, green, blue = np.asarray(thumbnail).mean(axis=(0, 1)).astype(int).tolist()
    return Tile(
        row,
        thumbnail=jpeg_uri(thumbnail, progressive=True),
        width=thumbnail.width,
        height=thumbnail.height,
        tint=f"#{red:02x}{green:02x}{blue:02x}",
        note="" if row["size"] in (None, len(data)) else "The file has changed since it was captioned.",
    )


_notes_lock: Final = threading.Lock()


def _thumbnail(data: bytes, limits: ImageLimits) -> Image.Image:
    """The picture, upright, its long side `_THUMBNAIL.size_px`: decoded padded, then the padding cut off."""
    decoded = decode_image(data, _THUMBNAIL, limits)
    size = _THUMBNAIL.size_px
    scale = size / max(decoded.width, decoded.height)
    width, height = max(1, round(decoded.width * scale)), max(1, round(decoded.height * scale))
    left, top = (size - width) // 2, (size - height) // 2
    return Image.fromarray(decoded.pixels_HWC[top : top + height, left : left + width])
