"""The COCO captions formats: what is read, what is refused and with which words."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from raycap.coco import CaptionedImage, read_captions, read_results, write_results
from raycap.errors import ConfigurationError, CredentialsError, StorageError
from raycap.storage import S3Options
from tests.s3 import S3Server

IMAGES = [{"id": 7, "file_name": "b/dog.jpg", "width": 640}, {"id": 3, "file_name": "cat.jpg"}]
ANNOTATIONS = [
    {"id": 1, "image_id": 3, "caption": "a cat sleeps"},
    {"id": 2, "image_id": 7, "caption": " A dog runs.\n"},
    {"id": 3, "image_id": 3, "caption": "a café cat"},
]


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def captions_file(tmp_path: Path, images: Any = IMAGES, annotations: Any = ANNOTATIONS) -> str:
    return write(tmp_path / "captions.json", {"info": {}, "images": images, "annotations": annotations})


def test_captions_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert read_captions(captions_file(tmp_path)) == [
        CaptionedImage(7, "b/dog.jpg", ("A dog runs.",)),
        CaptionedImage(3, "cat.jpg", ("a cat sleeps", "a café cat")),
    ]


def test_a_byte_order_mark_and_annotations_without_ids_are_accepted(tmp_path: Path) -> None:
    content = {"images": IMAGES[1:], "annotations": [{"image_id": 3, "caption": "a cat"}] * 2}
    location = write(tmp_path / "captions.json", "\ufeff" + json.dumps(content))
    assert read_captions(location) == [CaptionedImage(3, "cat.jpg", ("a cat", "a cat"))]


def test_blank_captions_and_images_without_any_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [*IMAGES, {"id": 4, "file_name": "none.jpg"}, {"id": 5, "file_name": "blank.jpg"}]
    annotations = [*ANNOTATIONS, {"id": 4, "image_id": 5, "caption": " \n"}, {"id": 5, "image_id": 3, "caption": ""}]
    with caplog.at_level(logging.WARNING, logger="raycap.coco"):
        read = read_captions(captions_file(tmp_path, images, annotations))
    assert [image.image_id for image in read] == [7, 3]
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "dropped 2 blank captions of 5",
        "kept out 2 images of 4 that have no caption",
    ]


def test_a_good_file_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_captions(captions_file(tmp_path))
    assert caplog.records == []


def sentences(*captions: str) -> list[dict[str, Any]]:
    return [{"raw": caption, "tokens": caption.split(), "sentid": 0} for caption in captions]


KARPATHY = [
    {"filepath": "val2014", "filename": "v.jpg", "imgid": 0, "cocoid": 391, "split": "test"}
    | {"sentences": sentences("a man.", " A bike\n")},
    {"filepath": "train2014", "filename": "t.jpg", "imgid": 1, "cocoid": 52, "split": "train"}
    | {"sentences": sentences("a dog")},
    {"filename": "r.jpg", "imgid": 2, "split": "restval", "sentences": sentences("a cat", " ")},
]


def karpathy_file(tmp_path: Path, images: Any = KARPATHY) -> str:
    return write(tmp_path / "dataset.json", {"images": images, "dataset": "coco"})


def test_a_split_of_a_karpathy_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    location = karpathy_file(tmp_path)
    assert read_captions(f"{location}#test") == [CaptionedImage(391, "val2014/v.jpg", ("a man.", "A bike"))]
    assert caplog.records == []
    assert read_captions(f"{location}#restval+train") == [
        CaptionedImage(52, "train2014/t.jpg", ("a dog",)),
        CaptionedImage(2, "r.jpg", ("a cat",)),
    ]
    assert [record.message for record in caplog.records] == [f"{location}: dropped 1 blank captions of 3"]


def test_a_split_may_not_hold_an_image_twice_but_others_may(tmp_path: Path) -> None:
    location = karpathy_file(tmp_path, [*KARPATHY, KARPATHY[1] | {"split": "extra"}])
    assert len(read_captions(f"{location}#train")) == 1
    with pytest.raises(ConfigurationError, match=r"images\[3\]: the image id 52 is there twice"):
        read_captions(f"{location}#train+extra")


@pytest.mark.parametrize(
    ("split", "got"),
    [("", "got none"), ("#val", "got val"), ("#train+val", r"got train\+val"), ("#train+", r"got train\+")],
)
def test_splits_that_are_not_in_a_karpathy_file(split: str, got: str, tmp_path: Path) -> None:
    splits = r"expected one or more of test \(1 images\), train \(1 images\), restval \(1 images\)"
    with pytest.raises(ConfigurationError, match=rf"{splits}, {got}; write for example .*dataset\.json#test\+train$"):
        read_captions(karpathy_file(tmp_path) + split)


def test_a_coco_file_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"only a Karpathy split file has splits, .*; leave out #train$"):
        read_captions(captions_file(tmp_path) + "#train")
    with pytest.raises(ConfigurationError, match=r"nowhere\.json: there is no such file"):
        read_captions(str(tmp_path / "nowhere.json#train"))


@pytest.mark.parametrize("name", ["captions#train", "captions#1.json", "#train"])
def test_a_file_whose_name_holds_the_sign_of_a_split(name: str, tmp_path: Path) -> None:
    location = write(tmp_path / name, {"images": IMAGES, "annotations": ANNOTATIONS})
    assert [image.image_id for image in read_captions(location)] == [7, 3]


WRONG_KARPATHY = {
    "no object": (5, r"images\[3\]: expected an object, got a number"),
    "no split": ({"filename": "x"}, r"images\[3\]: the key 'split' is missing, found 'filename'"),
    "no id": ({"split": "train"}, r"images\[3\]: the key 'imgid' is missing, found 'split'"),
    "no file name": ({"split": "train", "imgid": 9}, r"images\[3\]: the key 'filename' is missing"),
    "blank file name": ({"split": "train", "imgid": 9, "filename": ""}, r"images\[3\]: 'filename' is blank"),
    "folder is a number": (
        {"split": "train", "imgid": 9, "filename": "x", "filepath": 3},
        r"images\[3\]: expected 'filepath' to be a string, got a number 3",
    ),
    "no sentences": (
        {"split": "train", "imgid": 9, "filename": "x"},
        r"images\[3\]: the key 'sentences' is missing, .*expected a Karpathy split file",
    ),
    "no text": (
        {"split": "train", "imgid": 9, "filename": "x", "sentences": [{"tokens": []}]},
        r"images\[3\]: sentences\[0\]: the key 'raw' is missing, found 'tokens'",
    ),
}


@pytest.mark.parametrize(("entry", "message"), WRONG_KARPATHY.values(), ids=WRONG_KARPATHY.keys())
def test_a_wrong_entry_of_a_karpathy_file_is_named(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_captions(karpathy_file(tmp_path, [*KARPATHY, entry]) + "#train")


MALFORMED_CAPTIONS = {
    "cut short": ('{"images": [', r"not JSON: Expecting value at line 1, column 13 \(is the file cut short\?\)"),
    "empty": ("", r"not JSON: .*expected a COCO captions file"),
    "too deep": ("[" * 200_000, r"JSON that cannot be read"),
    "too long a number": ('{"images": [{"id": ' + "9" * 5000 + "}]}", r"JSON that cannot be read"),
    "results": (
        [{"image_id": 1, "caption": "a dog"}],
        r"expected a COCO captions file.*got a list \(it looks like a res",
    ),
    "text": ('"captions"', r"expected a COCO captions file.*, got a string"),
    "no images": ({"annotations": []}, r"the key 'images' is missing, found 'annotations'"),
    "no annotations": ({"images": []}, r"the key 'annotations' is missing, found 'images'"),
    "images by name": ({"images": {}, "annotations": []}, r"expected 'images' to be a list, got an object"),
    "nothing": ({"images": [], "annotations": []}, r"none of its 0 images has a caption"),
    "no caption at all": ({"images": IMAGES, "annotations": []}, r"none of its 2 images has a caption"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED_CAPTIONS.values(), ids=MALFORMED_CAPTIONS.keys())
def test_a_file_that_is_no_captions_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as refusal:
        read_captions(write(tmp_path / "captions.json", content))
    assert str(refusal.value).startswith(str(tmp_path / "captions.json") + ": ")


WRONG_IMAGES = {
    "no object": ("dog.jpg", r"images\[2\]: expected an object, got a string"),
    "no id": ({"file_name": "x.jpg"}, r"images\[2\]: the key 'id' is missing, found 'file_name'"),
    "id is text": (
        {"id": "9", "file_name": "x.jpg"},
        r"images\[2\]: expected 'id' to be an integer, got a string \"9\"",
    ),
    "id is a boolean": (
        {"id": True, "file_name": "x"},
        r"images\[2\]: expected 'id' to be an integer, got a boolean true",
    ),
    "id is a fraction": (
        {"id": 9.0, "file_name": "x"},
        r"images\[2\]: expected 'id' to be an integer, got a number 9.0",
    ),
    "no file name": ({"id": 9}, r"images\[2\]: the key 'file_name' is missing, found 'id'"),
    "null file name": (
        {"id": 9, "file_name": None},
        r"images\[2\]: expected 'file_name' to be a string, got null null",
    ),
    "blank file name": ({"id": 9, "file_name": " "}, r"images\[2\]: 'file_name' is blank"),
    "id twice": ({"id": 7, "file_name": "x.jpg"}, r"images\[2\]: the image id 7 is there twice"),
}


@pytest.mark.parametrize(("entry", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES.keys())
def test_a_wrong_image_entry_is_named(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_captions(captions_file(tmp_path, images=[*IMAGES, entry]))


WRONG_ANNOTATIONS = {
    "no object": (None, r"annotations\[3\]: expected an object, got null"),
    "no image": ({"caption": "a dog"}, r"annotations\[3\]: the key 'image_id' is missing, found 'caption'"),
    "unknown image": (
        {"image_id": 8, "caption": "x"},
        r"annotations\[3\]: image_id 8 is not among the file's 2 images",
    ),
    "no caption": ({"image_id": 7}, r"annotations\[3\]: the key 'caption' is missing, found 'image_id'$"),
    "a box": ({"image_id": 7, "bbox": [0, 0, 1, 1]}, r"'caption' is missing.*; this is an instances or keypoints file"),
    "caption is a list": (
        {"image_id": 7, "caption": ["a"]},
        r"expected 'caption' to be a string, got a list \[\"a\"\]",
    ),
    "id twice": ({"id": 2, "image_id": 7, "caption": "x"}, r"annotations\[3\]: the annotation id 2 is there twice"),
}


@pytest.mark.parametrize(("entry", "message"), WRONG_ANNOTATIONS.values(), ids=WRONG_ANNOTATIONS.keys())
def test_a_wrong_annotation_is_named(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_captions(captions_file(tmp_path, annotations=[*ANNOTATIONS, entry]))


@pytest.mark.parametrize("read", [read_captions, read_results])
def test_a_file_that_cannot_be_read_is_a_configuration_error(tmp_path: Path, read: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.json: there is no such file; expected a COCO"):
        read(str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigurationError, match="the file cannot be read: "):
        read(str(tmp_path))
    (tmp_path / "latin1.json").write_bytes(b'["caf\xe9"]')
    with pytest.raises(ConfigurationError, match="in UTF-8; byte 5 is not UTF-8"):
        read(str(tmp_path / "latin1.json"))


def test_results_come_back_as_written(tmp_path: Path) -> None:
    captions = {9: "un café", 2: "", 5: 'a "dog"'}
    location = tmp_path / "new" / "results.json"
    write_results(str(location), captions)
    assert json.loads(location.read_text(encoding="utf-8"))[0] == {"image_id": 9, "caption": "un café"}
    assert list(read_results(str(location)).items()) == list(captions.items())
    write_results(str(location), {})
    assert read_results(str(location)) == {}
    assert [path.name for path in location.parent.iterdir()] == ["results.json"]


WRONG_RESULTS = {
    "annotations": (
        {"images": [], "annotations": []},
        r"expected a COCO results file.*\(it looks like an annotations file",
    ),
    "no object": ([3], r"entry 0: expected an object, got a number"),
    "no image": ([{"caption": "a dog"}], r"entry 0: the key 'image_id' is missing, found 'caption'"),
    "image is text": (
        [{"image_id": "1", "caption": "a"}],
        r"entry 0: expected 'image_id' to be an integer, got a string",
    ),
    "no caption": ([{"image_id": 1}], r"entry 0: the key 'caption' is missing, found 'image_id'"),
    "twice": (
        [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "a"}],
        r"entry 1: image_id 1 is there twice",
    ),
}


@pytest.mark.parametrize(("content", "message"), WRONG_RESULTS.values(), ids=WRONG_RESULTS.keys())
def test_wrong_results_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_results(write(tmp_path / "results.json", content))


def test_results_that_cannot_be_written_are_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_results(str(tmp_path / "file" / "results.json"), {1: "a dog"})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.integration
@pytest.mark.usefixtures("no_aws_settings")
def test_captions_and_results_live_on_s3_too(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    s3_server.client().create_bucket(Bucket="captions")
    content = json.dumps({"images": IMAGES, "annotations": ANNOTATIONS}).encode()
    s3_server.client().put_object(Bucket="captions", Key="a/captions.json", Body=content)
    assert [image.image_id for image in read_captions("s3://captions/a/captions.json")] == [7, 3]

    for key, images in (("a/dataset.json", KARPATHY), ("a/dataset.json#odd", KARPATHY[:1])):
        body = json.dumps({"images": images}).encode()
        s3_server.client().put_object(Bucket="captions", Key=key, Body=body)
    assert [image.image_id for image in read_captions("s3://captions/a/dataset.json#train")] == [52]
    with pytest.raises(
        ConfigurationError, match=r"dataset\.json#odd: .*expected one or more of test \(1 images\), got none"
    ):
        read_captions("s3://captions/a/dataset.json#odd")
    assert [image.image_id for image in read_captions("s3://captions/a/dataset.json#odd#test")] == [391]
    with monkeypatch.context() as as_outsider:
        for name, value in s3_server.env(s3_server.outsider).items():
            as_outsider.setenv(name, value)
        with pytest.raises(CredentialsError, match=r"s3://captions/a/dataset\.json(?!#)"):
            read_captions("s3://captions/a/dataset.json#train")

    s3 = S3Options(endpoint_url=s3_server.endpoint_url)
    write_results("s3://captions/a/results.json", {7: "a dog"}, s3)
    assert read_results("s3://captions/a/results.json", s3) == {7: "a dog"}
    with pytest.raises(StorageError):
        read_captions("s3://captions/a/nowhere.json", s3)
