"""Where a decoder looked, drawn on the picture it looked at. Knows nothing of models or files.

Shapes: H height, W width, C red, green and blue of a picture; T the words of a caption and its end, R rows and C
columns of the encoder's grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["END", "attention_overlay", "attention_strip", "shrink"]

END = "(end)"
"""What stands for the end of the caption, which has weights as the words have."""

OVERLAY_PX = 112
"""Side of the small pictures."""

_LEAST = 0.15
"""How much of the picture is left where the weight is 0."""
_DARK = 64
"""Mean brightness below which a picture is dark: it fades to white, since on black nothing would show."""
_GAP_PX = 4
_LABEL_PX = 20
_FONT_PX = 13


def attention_overlay(pixels_HWC: np.ndarray, weights_RC: np.ndarray) -> np.ndarray:
    """The picture: as it is where the weight is highest, faded where it is low. uint8 [H, W, 3]."""
    height, width, _ = pixels_HWC.shape
    grid = Image.fromarray((weights_RC / weights_RC.max()).astype(np.float32))
    share_HW1 = np.asarray(grid.resize((width, height), Image.Resampling.BILINEAR))[..., None]
    share_HW1 = _LEAST + (1 - _LEAST) * share_HW1
    faded = 0 if pixels_HWC.mean() >= _DARK else 255
    overlay_HWC: np.ndarray = np.rint(share_HW1 * pixels_HWC + (1 - share_HW1) * faded).clip(0, 255).astype(np.uint8)
    return overlay_HWC


def attention_strip(pixels_HWC: np.ndarray, words: Sequence[str], weights_TRC: np.ndarray) -> Image.Image:
    """An overlay for each word and one for the end, side by side, each with its word below.

    Raises ValueError unless there are weights for each of the words and for the end.
    """
    labels = [*words, END]
    if len(labels) != len(weights_TRC):
        raise ValueError(f"expected weights of {len(words)} words and the end, got {len(weights_TRC)}")
    pixels_HWC = shrink(pixels_HWC)
    height, width, _ = pixels_HWC.shape
    font = ImageFont.load_default(_FONT_PX)
    strip = Image.new("RGB", (len(labels) * (width + _GAP_PX) - _GAP_PX, height + _LABEL_PX), "white")
    for number, (label, weights_RC) in enumerate(zip(labels, weights_TRC, strict=True)):
        tile = Image.new("RGB", (width, height + _LABEL_PX), "white")  # of its own: it cuts off what is too long
        tile.paste(Image.fromarray(attention_overlay(pixels_HWC, weights_RC)))
        centre = (width / 2, height + _LABEL_PX / 2)
        ImageDraw.Draw(tile).text(centre, label, fill="black", font=font, anchor="mm")
        strip.paste(tile, (number * (width + _GAP_PX), 0))
    return strip


def shrink(pixels_HWC: np.ndarray) -> np.ndarray:
    """The picture with its long side `OVERLAY_PX`: uint8 [H, W, 3]."""
    height, width, _ = pixels_HWC.shape
    scale = OVERLAY_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC))
