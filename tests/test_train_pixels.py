"""Training images as pixels: the same for the same seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raycap.errors import ImageError
from raycap.images import Preprocessing, decode_image
from raycap.storage import open_store
from raycap.train.pixels import augmented, read_part
from tests.hostile import base_picture, encode

PREPROCESSING = Preprocessing(size_px=18)
PICTURE = encode(base_picture(), "PNG")


def variant(seed: int, *, flip: bool = True, crop: float = 0.9, **settings: Any) -> np.ndarray:
    return augmented(PICTURE, Preprocessing(size_px=18, **settings), seed, flip=flip, crop=crop)


def test_the_same_seed_gives_the_same_pixels() -> None:
    variants = [variant(seed) for seed in range(20)]
    for seed, pixels_HWC in enumerate(variants):
        np.testing.assert_array_equal(pixels_HWC, variant(seed))
    assert len({pixels_HWC.tobytes() for pixels_HWC in variants}) > 10


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_whole_images_are_those_of_inference(resize: Any) -> None:
    expected_HWC = decode_image(PICTURE, Preprocessing(size_px=18, resize=resize)).pixels_HWC
    for seed in range(3):
        np.testing.assert_array_equal(variant(seed, flip=False, crop=1.0, resize=resize), expected_HWC)


def test_half_of_the_images_are_mirrored() -> None:
    whole_HWC = decode_image(PICTURE, PREPROCESSING).pixels_HWC
    kinds = {whole_HWC.tobytes(): "as it is", whole_HWC[:, ::-1].tobytes(): "mirrored"}
    assert len(kinds) == 2
    counts = Counter(kinds[variant(seed, crop=1.0).tobytes()] for seed in range(400))
    assert 150 < counts["mirrored"] < 250


@pytest.mark.parametrize("crop", [0.9, 0.5])
def test_a_crop_is_a_window_of_the_larger_image(crop: float) -> None:
    size = round(18 / crop)
    larger_HWC = decode_image(PICTURE, Preprocessing(size_px=size)).pixels_HWC
    windows = {
        larger_HWC[top : top + 18, left : left + 18].tobytes(): (top, left)
        for top in range(size - 17)
        for left in range(size - 17)
    }
    places = Counter(windows[variant(seed, flip=False, crop=crop).tobytes()] for seed in range(200))
    assert {top for top, _ in places} == {left for _, left in places} == set(range(size - 17))


def test_a_part_names_what_cannot_be_read_and_blackens_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("good.png", PICTURE)
    store.write("bad.png", b"no picture")
    names, seeds = ["good.png", "bad.png", "missing.png", "good.png"], np.array([3, 1, 2, 4], dtype=np.uint32)
    part = read_part(store, PREPROCESSING, {"name": np.array(names), "seed": seeds}, flip=True, crop=0.9)
    assert part["name"].tolist() == names
    assert part["pixels"].shape == (4, 18, 18, 3)
    assert part["pixels"].dtype == np.uint8
    for index in (0, 3):
        assert part["error"][index] == ""
        np.testing.assert_array_equal(part["pixels"][index], variant(int(seeds[index])))
    assert part["error"][1].startswith("not_an_image: ")
    assert part["error"][2].startswith("not_found: ")
    assert not part["pixels"][1:3].any()


def test_what_is_no_picture_is_an_error() -> None:
    with pytest.raises(ImageError):
        augmented(b"no picture", PREPROCESSING, 0, flip=True, crop=0.9)
