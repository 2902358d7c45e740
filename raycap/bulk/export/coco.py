"""Captioned rows -> COCO results, and the images that they are of.

    results.json  [{"image_id", "caption"}, ...]
    images.json   {"info", "licenses", "images": [{"id", "file_name", "width", "height"}, ...], "annotations": []}

Both are one JSON document, as their readers need them: `COCO("images.json").loadRes("results.json")`. One of them is in
memory at a time, and the image ids. Formats: https://cocodataset.org/#format-results and #format-data
"""

from __future__ import annotations

import io
import json
import re
from array import array
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from raycap.bulk.export.files import Count, Files
from raycap.bulk.export.source import Captions
from raycap.bulk.rows import OK
from raycap.errors import ConfigurationError

MAX_IMAGES: Final = 10_000_000
"""More make a document of above a gigabyte."""

_COCO_NAME: Final = re.compile(r"(?:.*_)?(\d{12})\.[^.]*", re.DOTALL)
"""COCO_val2014_000000391895.jpg and 000000391895.jpg: twelve digits, the image id."""


def write_coco(captions: Captions, files: Files, count: Count) -> str:
    """The rows with a caption. Returns where their image ids are from: file_name or row_id."""
    ids, kind = _image_ids(captions)
    results = io.BytesIO()
    results.write(b"[")
    for number, row in enumerate(_captioned(captions, ["caption"], count)):
        _write(results, number, {"image_id": ids[number], "caption": row["caption"]})
    results.write(b"\n]\n")
    files.write("results.json", results.getvalue())
    del results
    images = io.BytesIO()
    head = {"info": {"description": f"images of results.json; their ids are from the {kind}"}, "licenses": []}
    images.write(json.dumps(head)[:-1].encode() + b', "annotations": [], "images": [')
    for number, row in enumerate(_captioned(captions, ["key", "width", "height"])):
        image = {"id": ids[number], "file_name": row["key"], "width": row["width"], "height": row["height"]}
        _write(images, number, image)
    images.write(b"\n]}\n")
    files.write("images.json", images.getvalue())
    return kind


def _image_ids(captions: Captions) -> tuple[array[int], str]:
    """Of the rows with a caption: the numbers in their file names if all have one of COCO's and no two the same, else
    their row ids. Not some of each, since a row id may be another image's number."""
    row_ids, numbers = array("q"), array("q")
    for row in _captioned(captions, ["row_id", "key"]):
        row_ids.append(row["row_id"])
        name = _COCO_NAME.fullmatch(row["key"].rpartition("/")[2])
        if name:
            numbers.append(int(name[1]))
        if len(row_ids) > MAX_IMAGES:
            raise ConfigurationError(
                f"COCO is one JSON document, for at most {MAX_IMAGES:,} images; this output has more; "
                "use --format jsonl"
            )
    if len(numbers) == len(row_ids) and len(np.unique(np.asarray(numbers))) == len(numbers):
        return numbers, "file_name"
    return row_ids, "row_id"


def _captioned(captions: Captions, columns: list[str], count: Count | None = None) -> Iterator[dict[str, Any]]:
    for row in captions.rows([*columns, "status"]):
        if row["status"] == OK:
            yield row
        if count:
            count.add() if row["status"] == OK else count.leave_out(row["status"])


def _write(document: io.BytesIO, number: int, entry: dict[str, Any]) -> None:
    document.write(b",\n" if number else b"\n")
    document.write(json.dumps(entry, ensure_ascii=False).encode())
