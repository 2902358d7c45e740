"""Attention drawn on a picture."""

from __future__ import annotations

import numpy as np
import pytest

from raycap.evaluate.overlay import attention_overlay, attention_strip, shrink
from tests.hostile import base_picture


def picture() -> np.ndarray:
    return np.asarray(base_picture().resize((80, 60)))


def test_the_picture_is_clear_where_the_weight_is_and_dark_elsewhere() -> None:
    pixels_HWC = np.full((40, 80, 3), 200, np.uint8)
    weights_RC = np.zeros((2, 4), np.float32)
    weights_RC[1, 3] = 0.4
    overlay_HWC = attention_overlay(pixels_HWC, weights_RC)
    assert (overlay_HWC.shape, overlay_HWC.dtype) == ((40, 80, 3), np.uint8)
    assert (overlay_HWC[-5:, -5:] == 200).all()
    assert (overlay_HWC[:10] == 30).all() and (overlay_HWC[:, :40] == 30).all()
    assert (np.diff(overlay_HWC[-1, :, 0].astype(int)) >= 0).all()  # smooth, not in squares
    assert len(np.unique(overlay_HWC)) > 10


def test_a_dark_picture_fades_to_white() -> None:
    pixels_HWC = np.full((40, 80, 3), 10, np.uint8)
    overlay_HWC = attention_overlay(pixels_HWC, np.array([[1.0, 0.0, 0.0, 0.0]], np.float32))
    assert (overlay_HWC[:, :5] == 10).all() and (overlay_HWC[:, -5:] == 218).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equal_weights_change_nothing(dtype: type) -> None:
    overlay_HWC = attention_overlay(picture(), np.full((7, 7), 1 / 49, dtype))
    assert (overlay_HWC == picture()).all()


def test_pictures_shrink_to_small_ones_of_their_shape() -> None:
    assert shrink(picture()).shape == (84, 112, 3)
    assert shrink(np.zeros((900, 3, 3), np.uint8)).shape == (112, 1, 3)


def test_the_strip_has_a_labelled_overlay_for_each_word_and_the_end() -> None:
    weights_TRC = np.random.default_rng(0).dirichlet(np.ones(9), 3).reshape(3, 3, 3)
    strip = np.asarray(attention_strip(picture(), ["a", "w" * 40], weights_TRC))
    assert strip.shape == (84 + 20, 3 * 112 + 2 * 4, 3)
    for number in range(3):
        tile = strip[:, number * 116 :][:, :112]
        assert (tile[:84] == attention_overlay(shrink(picture()), weights_TRC[number])).all()
        assert (tile[84:] < 128).any(), "the word is missing"
    assert (strip[:, 112:116] == 255).all() and (strip[:, 228:232] == 255).all()  # a long word keeps to its own


def test_weights_of_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="expected weights of 2 words and the end, got 2"):
        attention_strip(picture(), ["a", "dog"], np.ones((2, 3, 3)))
