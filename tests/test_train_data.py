"""Batches of captions: the same for any number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raycap.coco import CaptionedImage
from raycap.errors import ConfigurationError
from raycap.model.vocabulary import BOS, EOS, PAD
from raycap.train.data import Batch, CaptionData
from raycap.train.features import Features
from tests.small import small_vocabulary


def images(count: int) -> list[CaptionedImage]:
    """Image n has n % 3 + 1 captions, of different lengths."""
    return [
        CaptionedImage(
            100 + n, f"{n}.jpg", tuple(" ".join(["w0 w1 w2"] * (k + 1)) + f" w{n % 8}" for k in range(n % 3 + 1))
        )
        for n in range(count)
    ]


def features(count: int, *, variants: int = 1, failed: tuple[str, ...] = ()) -> Features:
    """The only number of image n, variant v is n + v / 10."""
    numbers_NV = np.arange(count)[:, None] + np.arange(variants)[None, :] / 10
    return Features(numbers_NV[:, :, None, None].astype(np.float16), dict.fromkeys(failed, "corrupt: it is"))


def data(count: int = 10, *, batch_size: int = 4, **settings: Any) -> CaptionData:
    of_images = settings.pop("features", None) or features(count)
    settings = {"max_length": 20, "batch_size": batch_size} | settings
    return CaptionData.encode(images(count), of_images, small_vocabulary(), **settings)


def rows(batch: Batch) -> list[int]:
    return [int(value) for value in batch.features_BPC[:, 0, 0]]


def test_a_batch_holds_all_captions_of_its_images_longest_first() -> None:
    captioned = data()
    vocabulary = small_vocabulary()
    for batch in captioned.epoch(0):
        assert batch.features_BPC.shape == (4, 1, 1)
        assert batch.lengths_N.tolist() == sorted(batch.lengths_N.tolist(), reverse=True)
        assert batch.tokens_NT.shape == (len(batch.lengths_N), batch.lengths_N[0])
        found = []
        for image, tokens, length in zip(batch.image_N, batch.tokens_NT.tolist(), batch.lengths_N, strict=True):
            assert (tokens[0], tokens[length - 1]) == (BOS, EOS)
            assert set(tokens[length:]) <= {PAD}
            found.append((rows(batch)[image], vocabulary.decode(tokens)))
        expected = [(row, caption) for row in rows(batch) for caption in images(10)[row].captions]
        assert sorted(found) == sorted(expected)
        assert batch.num_tokens == sum(len(caption.split()) + 1 for _, caption in expected)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_share_the_batches_of_one(num_workers: int) -> None:
    for variants in (1, 2):
        of_images = features(10, variants=variants)
        alone = data(features=of_images, seed=3)
        parts = [data(features=of_images, seed=3, rank=r, world_size=num_workers) for r in range(num_workers)]
        for epoch in range(3):
            together = zip(*(part.epoch(epoch) for part in parts), strict=True)
            for whole, shares in zip(alone.epoch(epoch), together, strict=True):
                features_B = [value for share in shares for value in share.features_BPC.flatten().tolist()]
                assert features_B == whole.features_BPC.flatten().tolist()
                assert sum(share.num_tokens for share in shares) == whole.num_tokens


def test_epochs_differ_and_repeat_with_their_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [row for batch in data(seed=seed).epoch(epoch) for row in rows(batch)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6
    assert all(len(set(order(0, epoch))) == 8 for epoch in range(3)), "no image twice in an epoch"
    assert {row for epoch in range(8) for row in order(0, epoch)} == set(range(10)), "none waits for ever"


def test_mirrored_images_come_about_as_often() -> None:
    captioned = data(40, features=features(40, variants=2))
    values = [
        value for epoch in range(10) for batch in captioned.epoch(epoch) for value in batch.features_BPC.flatten()
    ]
    mirrored = sum(float(value) % 1 > 0.05 for value in values)
    assert 0.4 < mirrored / len(values) < 0.6


def test_unreadable_images_are_left_out() -> None:
    captioned = data(10, batch_size=2, features=features(10, failed=("3.jpg", "9.jpg")))
    assert captioned.steps_per_epoch == 4
    seen = {row for batch in captioned.epoch(0) for row in rows(batch)}
    assert seen == set(range(10)) - {3, 9}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_fewer_images_than_a_batch(num_workers: int) -> None:
    parts = [data(3, batch_size=12, rank=rank, world_size=num_workers) for rank in range(num_workers)]
    assert {part.steps_per_epoch for part in parts} == {1}
    seen = [row for part in parts for batch in part.epoch(0) for row in rows(batch)]
    assert sorted(seen) == [0, 1, 2]


def test_fewer_images_than_workers_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"1 of 3 training images can be read; .* each of 2 workers"):
        data(3, features=features(3, failed=("0.jpg", "2.jpg")), world_size=2)


def test_long_captions_are_cut() -> None:
    batch = next(data(max_length=2).epoch(0))
    assert set(batch.lengths_N.tolist()) == {4}
