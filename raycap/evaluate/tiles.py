"""Scored images -> tiles of the page: the pictures as the model sees them, and where it looked for each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from raycap.errors import ObjectError
from raycap.evaluate.overlay import END, attention_overlay, shrink
from raycap.evaluate.rows import ScoredImage
from raycap.html import jpeg_uri
from raycap.model.vocabulary import tokenize
from raycap.readahead import read_ahead
from raycap.storage import Store

if TYPE_CHECKING:
    from raycap.model.captioner import Captioner

__all__ = ["Tile", "make_tiles"]

_NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of the page."""

    image: ScoredImage
    picture: str = ""
    """JPEG as a data: URI; "" where there is none."""
    overlays: tuple[tuple[str, str], ...] = ()
    """Each word of the caption, and the end, with its picture; none if the model has no attention."""


def make_tiles(images: Sequence[ScoredImage], captioner: Captioner, store: Store, *, batch_size: int) -> list[Tile]:
    """A tile for every image, in their order. One that has gone since it was captioned has no picture."""
    tiles = [Tile(image) for image in images]
    names = [image.file_name for image in images]
    for batch in read_ahead(store, names, captioner.prepare, batch_size=batch_size, num_threads=_NUM_THREADS):
        good = {index: pixels for index, pixels in batch if not isinstance(pixels, ObjectError)}
        weights = captioner.attention(list(good.values()), [images[index].caption for index in good])
        for place, (index, pixels) in enumerate(good.items()):
            image, pixels_HWC = images[index], pixels.numpy()
            overlays = _overlays(image.caption, pixels_HWC, weights[place]) if weights is not None else ()
            tiles[index] = Tile(image, jpeg_uri(Image.fromarray(pixels_HWC)), overlays)
    return tiles


def _overlays(caption: str, pixels_HWC: np.ndarray, weights_TRC: np.ndarray) -> tuple[tuple[str, str], ...]:
    small_HWC = shrink(pixels_HWC)
    words = [*tokenize(caption), END]  # the words that the model was asked about
    return tuple(
        (word, jpeg_uri(Image.fromarray(attention_overlay(small_HWC, weights_RC))))
        for word, weights_RC in zip(words, weights_TRC, strict=True)
    )
