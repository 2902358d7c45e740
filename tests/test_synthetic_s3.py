"""The synthetic endpoint lists as S3 does: tests and measurements of listings rest on it."""

from __future__ import annotations

import io
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import pytest
from PIL import Image

from tests.synthetic_s3 import IMAGE_BYTES, NUM_IMAGES, SHAPES, Endpoint, Keys, synthetic_image

NUM_KEYS = 2345
_XML = "{http://s3.amazonaws.com/doc/2006-03-01/}"


def listed(endpoint: Endpoint, **query: str) -> tuple[list[str], list[str]]:
    """Keys and folders of all pages; a dash in a parameter's name is an underscore here."""
    keys: list[str] = []
    folders: list[str] = []
    query = {name.replace("_", "-"): value for name, value in query.items()} | {"encoding-type": "url"}
    while True:
        page = ElementTree.fromstring(endpoint.page(query))
        keys += [unquote(each.text or "") for each in page.iterfind(f"{_XML}Contents/{_XML}Key")]
        folders += [unquote(each.text or "") for each in page.iterfind(f"{_XML}CommonPrefixes/{_XML}Prefix")]
        token = page.findtext(f"{_XML}NextContinuationToken")
        assert page.findtext(f"{_XML}IsTruncated") == ("false" if token is None else "true")
        if token is None:
            return keys, folders
        query["continuation-token"] = token


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_are_all_listed_once_in_byte_order(shape: str) -> None:
    keys = Keys(NUM_KEYS, shape)
    everything = [keys[number] for number in range(NUM_KEYS)]
    assert everything == sorted(set(everything), key=lambda key: key.encode())
    assert [keys.number(key) for key in everything[::50]] == list(range(0, NUM_KEYS, 50))
    endpoint = Endpoint(NUM_KEYS, shape)
    for max_keys in ("1000", "7"):
        assert listed(endpoint, max_keys=max_keys) == (everything, [])


@pytest.mark.parametrize("shape", SHAPES)
def test_prefix_start_and_delimiter_select_as_on_s3(shape: str) -> None:
    keys, endpoint = Keys(NUM_KEYS, shape), Endpoint(NUM_KEYS, shape)
    everything = [keys[number] for number in range(NUM_KEYS)]
    prefix, start = everything[1500][:8], everything[700]
    assert listed(endpoint, prefix=prefix)[0] == [key for key in everything if key.startswith(prefix)]
    assert listed(endpoint, start_after=start)[0] == everything[701:]
    assert listed(endpoint, start_after=start[:-1])[0] == everything[700:]
    found, folders = listed(endpoint, delimiter="/", max_keys="3")
    assert found == [key for key in everything if "/" not in key]
    assert folders == sorted({key.partition("/")[0] + "/" for key in everything if "/" in key})
    for folder in folders:
        below = {key.removeprefix(folder).partition("/") for key in everything if key.startswith(folder)}
        assert set(listed(endpoint, prefix=folder, delimiter="/")[1]) == {
            f"{folder}{name}/" for name, slash, _ in below if slash
        }


def test_objects_are_counted_and_differ() -> None:
    endpoint = Endpoint(NUM_KEYS, "odd")
    target = f"/bucket/{quote(endpoint.keys[17])}"
    status, etag, data = endpoint.answer("GET", target)
    assert (status, data) == (200, synthetic_image(17))
    assert endpoint.answer("HEAD", target)[1] == etag
    assert f"&quot;{etag}&quot;".encode() in endpoint.page({})
    assert endpoint.answer("GET", "/bucket/none")[0] == 404
    assert endpoint.answer("PUT", target)[0] == 403
    endpoint.answer("GET", target)
    endpoint.answer("GET", f"/bucket/{quote(endpoint.keys[3])}")
    assert endpoint.counts() == {"list": 0, "head": 1, "get": 3, "objects": 2, "most": 2}


def test_images_are_jpegs_of_one_size() -> None:
    pictures = set()
    for number in range(0, NUM_IMAGES, 100):
        data = synthetic_image(number)
        assert len(data) == IMAGE_BYTES
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            pictures.add(image.tobytes())
    assert len(pictures) == len(range(0, NUM_IMAGES, 100))
