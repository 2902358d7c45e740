"""Training images as pixels: read, decoded, cropped and mirrored at random. Knows nothing of Ray or torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from raycap.errors import ObjectError
from raycap.images import Preprocessing, decode_image
from raycap.readahead import read_ahead
from raycap.storage import Store

READ_THREADS = 8


def read_part(
    store: Store, preprocessing: Preprocessing, rows: dict[str, np.ndarray], *, flip: bool, crop: float
) -> dict[str, np.ndarray]:
    """Of images by `name` and `seed`: `pixels` uint8 [B, size, size, 3], and `error`, why an image cannot be used, ""
    if it can. The pixels of an image that cannot are black.
    """
    names = [str(name) for name in rows["name"]]
    size = preprocessing.size_px
    pixels_BHWC = np.zeros((len(names), size, size, 3), dtype=np.uint8)
    errors = [""] * len(names)
    for batch in read_ahead(store, names, bytes, batch_size=len(names), num_threads=READ_THREADS):
        for index, data in batch:
            try:
                if isinstance(data, ObjectError):
                    raise data
                pixels_BHWC[index] = augmented(data, preprocessing, int(rows["seed"][index]), flip=flip, crop=crop)
            except ObjectError as error:
                errors[index] = f"{error.code}: {error}"
    return {"name": np.array(names), "pixels": pixels_BHWC, "error": np.array(errors)}


class Pixels:
    """What a part's images are to the CNN. A part is a block of one row, whose values are lists. The processes that run
    it import neither torch nor Ray Train."""

    def __init__(self, read: Callable[[dict[str, Any]], dict[str, np.ndarray]]) -> None:
        self.read = read

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        return self.read({name: values[0] for name, values in block.items()})


def augmented(data: bytes, preprocessing: Preprocessing, seed: int, *, flip: bool, crop: float) -> np.ndarray:
    """An image file's pixels, uint8 [size, size, 3]: a random square with `crop` of the side of the resized image,
    mirrored every second time. The same for the same seed. Raises ImageError."""
    random = np.random.default_rng(seed)
    size = preprocessing.size_px
    larger = replace(preprocessing, size_px=round(size / crop))
    whole_HWC = decode_image(data, larger).pixels_HWC
    top, left = random.integers(larger.size_px - size + 1, size=2)
    pixels_HWC = whole_HWC[top : top + size, left : left + size]
    return pixels_HWC[:, ::-1] if flip and random.random() < 0.5 else pixels_HWC
