"""The COCO captions formats, in and out: annotations (`images`, `annotations`) and results (`image_id`, `caption`).

Every file comes from outside, so every entry is checked and the first wrong one is named. Knows nothing of pictures,
torch or Ray. Formats: https://cocodataset.org/#format-data and https://cocodataset.org/#format-results
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raycap.errors import ConfigurationError
from raycap.storage import S3Options, is_s3, read_bytes, write_bytes

__all__ = ["CaptionedImage", "read_captions", "read_results", "write_results"]

logger = logging.getLogger(__name__)

_CAPTIONS_EXPECTED = (
    'a COCO captions file, {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}'
)
_RESULTS_EXPECTED = 'a COCO results file, [{"image_id": 1, "caption": "a dog runs"}, ...]'


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One image of a captions file, with at least one caption."""

    image_id: int
    file_name: str
    """Relative to the directory or prefix of the images."""
    captions: tuple[str, ...]
    """As written in the file, without surrounding white space; none is blank."""


def read_captions(location: str, s3: S3Options | None = None) -> list[CaptionedImage]:
    """Images and their captions, both in the order of the file.

    Blank captions are dropped and images without captions are kept out; both are counted in a logged warning.

    Raises:
        ConfigurationError: the file cannot be read, or does not hold what a COCO captions file holds.
        StorageError: `location` is on S3 and S3 fails.
    """
    content = _read_json(location, s3, _CAPTIONS_EXPECTED)
    if not isinstance(content, dict):
        hint = " (it looks like a results file)" if isinstance(content, list) else ""
        raise ConfigurationError(f"{location}: expected {_CAPTIONS_EXPECTED}, got {_kind(content)}{hint}")

    file_names: dict[int, str] = {}
    for where, entry in _entries(content, "images", location):
        image_id = _integer(entry, "id", where)
        if image_id in file_names:
            raise ConfigurationError(f"{where}: the image id {image_id} is there twice; every image needs its own id")
        file_names[image_id] = _text(entry, "file_name", where)
        if not file_names[image_id].strip():
            raise ConfigurationError(f"{where}: 'file_name' is blank; expected the path of the image")

    captions: dict[int, list[str]] = {image_id: [] for image_id in file_names}
    annotation_ids: set[int] = set()
    num_blank = 0
    for where, entry in _entries(content, "annotations", location):
        image_id = _integer(entry, "image_id", where)
        if image_id not in captions:
            raise ConfigurationError(
                f"{where}: image_id {image_id} is not among the file's {len(file_names)} images; "
                "add the image to 'images' or remove the annotation"
            )
        if "id" in entry:
            annotation_id = _integer(entry, "id", where)
            if annotation_id in annotation_ids:
                raise ConfigurationError(
                    f"{where}: the annotation id {annotation_id} is there twice; was one file appended to another? "
                    "Every annotation needs its own id"
                )
            annotation_ids.add(annotation_id)
        caption = _text(entry, "caption", where).strip()
        if caption:
            captions[image_id].append(caption)
        else:
            num_blank += 1

    if num_blank:
        logger.warning("%s: dropped %d blank captions of %s", location, num_blank, len(content["annotations"]))
    captioned = [
        CaptionedImage(image_id, file_name, tuple(captions[image_id]))
        for image_id, file_name in file_names.items()
        if captions[image_id]
    ]
    if not captioned:
        raise ConfigurationError(
            f"{location}: none of its {len(file_names)} images has a caption; expected {_CAPTIONS_EXPECTED}"
        )
    if len(captioned) < len(file_names):
        num_bare = len(file_names) - len(captioned)
        logger.warning("%s: kept out %d images of %d that have no caption", location, num_bare, len(file_names))
    return captioned


def read_results(location: str, s3: S3Options | None = None) -> dict[int, str]:
    """The caption of each image id, in the order of the file. A caption may be empty.

    Raises:
        ConfigurationError: the file cannot be read, names an image twice, or is not a COCO results file.
        StorageError: `location` is on S3 and S3 fails.
    """
    content = _read_json(location, s3, _RESULTS_EXPECTED)
    if not isinstance(content, list):
        hint = " (it looks like an annotations file)" if isinstance(content, dict) and "annotations" in content else ""
        raise ConfigurationError(f"{location}: expected {_RESULTS_EXPECTED}, got {_kind(content)}{hint}")
    captions: dict[int, str] = {}
    for index, entry in enumerate(content):
        where = f"{location}: entry {index}"
        if not isinstance(entry, dict):
            raise ConfigurationError(f"{where}: expected an object, got {_kind(entry)}; expected {_RESULTS_EXPECTED}")
        image_id = _integer(entry, "image_id", where)
        if image_id in captions:
            raise ConfigurationError(f"{where}: image_id {image_id} is there twice; give one caption for each image")
        captions[image_id] = _text(entry, "caption", where)
    return captions


def write_results(location: str, captions: Mapping[int, str], s3: S3Options | None = None) -> None:
    """Write a COCO results file to a local or s3:// path. It appears whole or not at all; missing directories are made.

    Raises:
        StorageError: `location` cannot be written.
    """
    results = [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]
    data = (json.dumps(results, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    write_bytes(location, data, s3 or S3Options())


def _read_json(location: str, s3: S3Options | None, expected: str) -> Any:
    """Parsed JSON, whatever it is."""
    try:
        return json.loads(_read(location, s3, expected).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{location}: expected {expected} in UTF-8; byte {error.start} is not UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f"{location}: not JSON: {error.msg} at line {error.lineno}, column {error.colno} "
            f"(is the file cut short?); expected {expected}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        raise ConfigurationError(f"{location}: JSON that cannot be read: {error}; expected {expected}") from error


def _read(location: str, s3: S3Options | None, expected: str) -> bytes:
    if is_s3(location):
        return read_bytes(location, s3 or S3Options())
    try:
        with open(location, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigurationError(f"{location}: there is no such file; expected {expected}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{location}: the file cannot be read: {reason}; expected {expected}") from error


def _entries(content: dict[str, Any], key: str, location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry of the list `key`, with the words that name it in a message."""
    if key not in content:
        found = ", ".join(repr(name) for name in list(content)[:8]) or "nothing"
        raise ConfigurationError(
            f"{location}: the key '{key}' is missing, found {found}; expected {_CAPTIONS_EXPECTED}"
        )
    if not isinstance(content[key], list):
        raise ConfigurationError(f"{location}: expected '{key}' to be a list, got {_kind(content[key])}")
    for index, entry in enumerate(content[key]):
        where = f"{location}: {key}[{index}]"
        if not isinstance(entry, dict):
            raise ConfigurationError(f"{where}: expected an object, got {_kind(entry)}")
        yield where, entry


def _integer(entry: dict[str, Any], key: str, where: str) -> int:
    value = _value(entry, key, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigurationError(f"{where}: expected '{key}' to be an integer, got {_kind(value)} {_shown(value)}")
    return value


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    value = _value(entry, key, where)
    if not isinstance(value, str):
        raise ConfigurationError(f"{where}: expected '{key}' to be a string, got {_kind(value)} {_shown(value)}")
    return value


def _value(entry: dict[str, Any], key: str, where: str) -> Any:
    if key in entry:
        return entry[key]
    hint = ""
    if key == "caption" and ("bbox" in entry or "segmentation" in entry):
        hint = "; this is an instances or keypoints file, give the captions file of the same images"
    found = ", ".join(repr(name) for name in list(entry)[:8]) or "nothing"
    raise ConfigurationError(f"{where}: the key '{key}' is missing, found {found}{hint}")


def _kind(value: Any) -> str:
    """What JSON calls the type of `value`."""
    if value is None:
        return "null"
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
