"""Captioned rows and their images -> tar shards in the WebDataset convention, for training the next model.

    shard-000000.tar    000000000000.jpg   the image's own bytes; the suffix is of its real format
                        000000000000.json  its row
                        000000000000.txt   its caption
                        000000000007.png   ...

The files of a sample share the row id as their name and follow each other. Images are read again, since the output
holds none; a row whose image has gone or changed is left out and counted. Convention:
https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import io
import logging
import tarfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from raycap.bulk.export.files import Count, Files
from raycap.bulk.export.jsonl import to_json
from raycap.bulk.export.source import Captions
from raycap.bulk.rows import OK
from raycap.bulk.sources.base import Reader
from raycap.errors import ImageError, NotFoundError, ObjectError, ObjectNotFoundError, StorageError
from raycap.images import ImageLimits, Preprocessing, decode_image

log = logging.getLogger(__name__)

_READS_IN_FLIGHT: Final = 16
_DECODERS: Final = 4
"""Few, because each may decode an image of the largest size allowed."""
_NUM_EXAMPLES: Final = 5
"""Images left out that get a log line of their own."""
_SUFFIXES: Final = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
_SMALL: Final = Preprocessing(size_px=16)
"""The pixels are thrown away: a JPEG decodes fastest to few."""


@dataclass(frozen=True, slots=True)
class _Image:
    data: bytes
    suffix: str


@dataclass(frozen=True, slots=True)
class _LeftOut:
    reason: str
    message: str


def write_webdataset(captions: Captions, files: Files, count: Count, target_bytes: int, reader: Reader) -> None:
    """The rows with a caption and with the image that it is of, in shards of about `target_bytes`.

    Raises StorageError if there are captions but not one image: a source that is not mounted, say.
    """
    shard = _Shard()
    left_out: list[_LeftOut] = []
    for row, image in _with_images(captions, count, reader):
        if isinstance(image, _LeftOut):
            count.leave_out(image.reason)
            if len(left_out) < _NUM_EXAMPLES:
                left_out.append(image)
                log.warning("left out: %s", image.message)
            continue
        shard.add(row, image)
        count.add()
        if shard.num_bytes >= target_bytes:
            files.write(f"shard-{len(files.written):06d}.tar", shard.close())
            shard = _Shard()
    if left_out and not count.rows:
        raise StorageError(f"not one image could be read again; the first: {left_out[0].message}")
    if shard.num_bytes:
        files.write(f"shard-{len(files.written):06d}.tar", shard.close())


class _Shard:
    """One tar file in memory. The same samples give the same bytes."""

    def __init__(self) -> None:
        self._sink = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._sink, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, row: dict[str, Any], image: _Image) -> None:
        """One sample."""
        key = f"{row['row_id']:012d}"
        for suffix, data in (
            (image.suffix, image.data),
            ("json", to_json(row).encode()),
            ("txt", row["caption"].encode()),
        ):
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))

    @property
    def num_bytes(self) -> int:
        """So far."""
        return self._sink.tell()

    def close(self) -> bytes:
        """The whole file."""
        self._tar.close()
        return self._sink.getvalue()


def _with_images(
    captions: Captions, count: Count, reader: Reader
) -> Iterator[tuple[dict[str, Any], _Image | _LeftOut]]:
    """The rows with a caption, in order, with their images; the others are counted. At most `_READS_IN_FLIGHT` images
    are asked for or waiting."""
    decoding = threading.Semaphore(_DECODERS)
    with ThreadPoolExecutor(_READS_IN_FLIGHT, thread_name_prefix="raycap-export") as pool:
        ahead: deque[tuple[dict[str, Any], Future[_Image | _LeftOut]]] = deque()
        try:
            for row in captions.rows():
                if row["status"] != OK:
                    count.leave_out(row["status"])
                    continue
                ahead.append((row, pool.submit(_read, row, reader, decoding)))
                if len(ahead) == _READS_IN_FLIGHT:
                    first, image = ahead.popleft()
                    yield first, image.result()
            for last, image in ahead:
                yield last, image.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(row: dict[str, Any], reader: Reader, decoding: threading.Semaphore) -> _Image | _LeftOut:
    """The image of a row, if it is still the one that was captioned, as far as size and pixels tell."""
    uri, size, sides = row["uri"], row["size"], (row["width"], row["height"])
    changed = f"{uri}: it has changed since it was captioned"
    try:
        data = reader.read(uri, max_bytes=size)
        if size not in (None, len(data)):
            return _LeftOut("changed", f"{changed}: {size:,} bytes then, {len(data):,} now")
        with decoding:
            image = decode_image(data, _SMALL, ImageLimits(max_bytes=len(data) or 1, max_pixels=sides[0] * sides[1]))
    except ImageError as error:
        return _LeftOut("changed", f"{changed}: {error}")
    except (ObjectNotFoundError, NotFoundError) as error:
        return _LeftOut("not_found", str(error))
    except ObjectError as error:
        return _LeftOut(error.code, str(error))
    if (image.width, image.height) != sides:
        return _LeftOut("changed", f"{changed}: {sides[0]} x {sides[1]} then, {image.width} x {image.height} now")
    return _Image(data, _SUFFIXES[image.format])
