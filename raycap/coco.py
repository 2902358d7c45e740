"""The COCO captions formats, in and out: annotations (`images`, `annotations`) and results (`image_id`, `caption`).

Annotations may also be one of the split files of Karpathy and Fei-Fei 2015 (`images` with `sentences` and `split`).
Every file comes from outside, so every entry is checked and the first wrong one is named. Knows nothing of pictures,
torch or Ray. Formats: https://cocodataset.org/#format-data and https://cocodataset.org/#format-results
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raycap.errors import ConfigurationError, CredentialsError
from raycap.storage import S3Options, is_s3, open_store, read_bytes, write_bytes

__all__ = ["CaptionedImage", "read_captions", "read_results", "write_results"]

logger = logging.getLogger(__name__)

_CAPTIONS_EXPECTED = (
    'a COCO captions file, {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}'
)
_KARPATHY_EXPECTED = (
    'a Karpathy split file, {"images": [{"filename", "imgid", "split", "sentences": [{"raw"}, ...]}, ...]}'
)
_RESULTS_EXPECTED = 'a COCO results file, [{"image_id": 1, "caption": "a dog runs"}, ...]'
_WITH_SPLIT = re.compile(r"(.+)#([\w+-]+)")


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

    Of a Karpathy split file one split or several are read: `dataset_coco.json#val`, `dataset_coco.json#train+restval`.
    A file whose own name ends so is opened as it is. Blank captions are dropped and images without captions are kept
    out; both are counted in a logged warning.

    Raises:
        ConfigurationError: the file cannot be read, does not hold what a COCO captions file holds, or no such split.
        StorageError: `location` is on S3 and S3 fails.
    """
    location, split = _split_off(location, s3)
    content = _read_json(location, s3, _CAPTIONS_EXPECTED)
    if not isinstance(content, dict):
        hint = " (it looks like a results file)" if isinstance(content, list) else ""
        raise ConfigurationError(f"{location}: expected {_CAPTIONS_EXPECTED}, got {_kind(content)}{hint}")
    if _is_karpathy(content):
        images = _karpathy_images(content, split, location)
    elif split is not None:
        raise ConfigurationError(
            f"{location}: only a Karpathy split file has splits, and this is a COCO captions file; leave out #{split}"
        )
    else:
        images = _coco_images(content, location)

    captioned = [
        replace(image, captions=tuple(filter(None, image.captions))) for image in images if any(image.captions)
    ]
    num_captions = sum(len(image.captions) for image in images)
    if num_blank := num_captions - sum(len(image.captions) for image in captioned):
        logger.warning("%s: dropped %d blank captions of %s", location, num_blank, num_captions)
    if not captioned:
        raise ConfigurationError(
            f"{location}: none of its {len(images)} images has a caption; expected {_CAPTIONS_EXPECTED}"
        )
    if len(captioned) < len(images):
        num_bare = len(images) - len(captioned)
        logger.warning("%s: kept out %d images of %d that have no caption", location, num_bare, len(images))
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


def _coco_images(content: dict[str, Any], location: str) -> list[CaptionedImage]:
    """All images, with all that the file gives as their captions."""
    file_names: dict[int, str] = {}
    for where, entry in _entries(content, "images", location):
        image_id = _new_id(entry, "id", where, file_names)
        file_names[image_id] = _file_name(entry, "file_name", where)

    captions: dict[int, list[str]] = {image_id: [] for image_id in file_names}
    annotation_ids: set[int] = set()
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
        captions[image_id].append(_text(entry, "caption", where).strip())
    return [
        CaptionedImage(image_id, file_name, tuple(captions[image_id])) for image_id, file_name in file_names.items()
    ]


def _is_karpathy(content: dict[str, Any]) -> bool:
    images = content.get("images")
    return isinstance(images, list) and any(isinstance(entry, dict) and "sentences" in entry for entry in images)


def _karpathy_images(content: dict[str, Any], split: str | None, location: str) -> list[CaptionedImage]:
    """As `_coco_images`, of the images of `split`: one or, joined by `+`, several."""
    wanted = split.split("+") if split else []
    num_images: dict[str, int] = {}
    images: dict[int, CaptionedImage] = {}
    for where, entry in _entries(content, "images", location):
        split_of_image = _text(entry, "split", where)
        num_images[split_of_image] = num_images.get(split_of_image, 0) + 1
        if split_of_image not in wanted:
            continue
        image_id = _new_id(entry, "cocoid" if "cocoid" in entry else "imgid", where, images)
        file_name = _file_name(entry, "filename", where)
        if "filepath" in entry and (folder := _text(entry, "filepath", where)):
            file_name = f"{folder}/{file_name}"
        sentences = _entries(entry, "sentences", where, expected=_KARPATHY_EXPECTED)
        images[image_id] = CaptionedImage(
            image_id, file_name, tuple(_text(sentence, "raw", which).strip() for which, sentence in sentences)
        )
    if not wanted or not num_images.keys() >= set(wanted):
        splits = ", ".join(f"{name} ({count} images)" for name, count in num_images.items())
        raise ConfigurationError(
            f"{location}: a Karpathy split file, read by split; expected one or more of {splits}, "
            f"got {split or 'none'}; write for example {location}#{'+'.join(list(num_images)[:2])}"
        )
    return list(images.values())


def _split_off(location: str, s3: S3Options | None) -> tuple[str, str | None]:
    """The file, and the split that follows its name."""
    match = _WITH_SPLIT.fullmatch(location)
    if match is None or _is_file(location, s3):
        return location, None
    return match[1], match[2]


def _is_file(location: str, s3: S3Options | None) -> bool:
    if not is_s3(location):
        return Path(location).is_file()
    folder, _, name = location.rpartition("/")
    try:
        return open_store(f"{folder}/", replace(s3 or S3Options(), max_outage_s=0.0)).exists(name)
    except CredentialsError:  # the answer for a missing object where the keys may not list
        return False


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


def _entries(
    content: dict[str, Any], key: str, location: str, *, expected: str = _CAPTIONS_EXPECTED
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry of the list `key`, with the words that name it in a message."""
    if key not in content:
        found = ", ".join(repr(name) for name in list(content)[:8]) or "nothing"
        raise ConfigurationError(f"{location}: the key '{key}' is missing, found {found}; expected {expected}")
    if not isinstance(content[key], list):
        raise ConfigurationError(f"{location}: expected '{key}' to be a list, got {_kind(content[key])}")
    for index, entry in enumerate(content[key]):
        where = f"{location}: {key}[{index}]"
        if not isinstance(entry, dict):
            raise ConfigurationError(f"{where}: expected an object, got {_kind(entry)}")
        yield where, entry


def _new_id(entry: dict[str, Any], key: str, where: str, known: Container[int]) -> int:
    image_id = _integer(entry, key, where)
    if image_id in known:
        raise ConfigurationError(f"{where}: the image id {image_id} is there twice; every image needs its own id")
    return image_id


def _file_name(entry: dict[str, Any], key: str, where: str) -> str:
    file_name = _text(entry, key, where)
    if not file_name.strip():
        raise ConfigurationError(f"{where}: '{key}' is blank; expected the path of the image")
    return file_name


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
