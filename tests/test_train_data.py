"""Batches of captions: the same for any number of workers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from raycap.coco import CaptionedImage
from raycap.errors import ConfigurationError
from raycap.model.vocabulary import BOS, EOS, PAD
from raycap.train.data import CaptionData, Part, ahead, as_batch, read_features
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


def data(count: int = 10, *, batch_size: int = 4, **settings: Any) -> CaptionData:
    settings = {"max_length": 20} | settings
    return CaptionData.encode(images(count), small_vocabulary(), batch_size=batch_size, **settings)


def test_a_batch_holds_all_captions_of_its_images_longest_first() -> None:
    captioned = data()
    vocabulary = small_vocabulary()
    for part in captioned.epoch(0):
        batch = captioned.references(part, torch.zeros(4, 1, 1), np.ones(4, dtype=bool))
        assert batch.lengths_N.tolist() == sorted(batch.lengths_N.tolist(), reverse=True)
        assert batch.tokens_NT.shape == (len(batch.lengths_N), batch.lengths_N[0])
        found = []
        for image, tokens, length in zip(batch.image_N, batch.tokens_NT.tolist(), batch.lengths_N, strict=True):
            assert (tokens[0], tokens[length - 1]) == (BOS, EOS)
            assert set(tokens[length:]) <= {PAD}
            found.append((part.images_B[image], vocabulary.decode(tokens)))
        expected = [(row, caption) for row in part.images_B for caption in images(10)[row].captions]
        assert sorted(found) == sorted(expected)
        assert batch.num_tokens == sum(len(caption.split()) + 1 for _, caption in expected)
        assert batch.weights_N.tolist() == [1.0] * len(expected)


def test_captions_of_unreadable_images_weigh_nothing() -> None:
    captioned = data()
    part = next(captioned.epoch(0))
    readable_B = np.array([True, False, True, False])
    batch = captioned.references(part, torch.zeros(4, 1, 1), readable_B)
    assert batch.weights_N.tolist() == [float(readable_B[image]) for image in batch.image_N]
    readable = [caption for row in part.images_B[readable_B] for caption in images(10)[row].captions]
    assert batch.num_tokens == sum(len(caption.split()) + 1 for caption in readable)


def test_weights_follow_their_captions() -> None:
    batch = as_batch(torch.zeros(2, 1, 1), [(0, [BOS, 5, EOS]), (1, [BOS, 6, 7, EOS]), (1, [BOS, 8, EOS])], [-1, 2, 3])
    assert batch.image_N.tolist() == [1, 0, 1]
    assert batch.tokens_NT.tolist() == [[BOS, 6, 7, EOS], [BOS, 5, EOS, PAD], [BOS, 8, EOS, PAD]]
    assert batch.weights_N.tolist() == [2, -1, 3]
    assert batch.num_tokens == 7


@pytest.mark.parametrize(("num_workers", "batch_size"), [(2, 4), (4, 4), (2, 5), (3, 5)])
def test_workers_share_the_batches_of_one(num_workers: int, batch_size: int) -> None:
    alone = data(batch_size=batch_size, seed=3)
    workers = [data(batch_size=batch_size, seed=3, rank=rank, world_size=num_workers) for rank in range(num_workers)]
    for epoch in range(3):
        together = zip(*(worker.epoch(epoch) for worker in workers), strict=True)
        for whole, shares in zip(alone.epoch(epoch), together, strict=True):
            assert len(whole.images_B) == batch_size
            assert np.concatenate([share.images_B for share in shares]).tolist() == whole.images_B.tolist()
            assert np.concatenate([share.seeds_B for share in shares]).tolist() == whole.seeds_B.tolist()
            sizes = [len(share.images_B) for share in shares]
            assert max(sizes) - min(sizes) <= 1


def test_an_epoch_goes_on_where_it_was_left() -> None:
    captioned = data(10, batch_size=2)
    whole = list(captioned.epoch(1))
    rest = list(captioned.epoch(1, start=3))
    assert [part.images_B.tolist() for part in rest] == [part.images_B.tolist() for part in whole[3:]]
    assert [part.seeds_B.tolist() for part in rest] == [part.seeds_B.tolist() for part in whole[3:]]


@pytest.mark.parametrize(
    ("num_images", "most", "sizes"),
    [(7, None, [7]), (7, 20, [7]), (7, 7, [7]), (7, 4, [3, 4]), (7, 3, [2, 2, 3]), (6, 3, [3, 3]), (3, 1, [1, 1, 1])],
)
def test_a_part_is_cut_into_as_few_pieces_as_are_small_enough(
    num_images: int, most: int | None, sizes: list[int]
) -> None:
    part = Part(np.arange(num_images), np.zeros(num_images, dtype=np.uint32))
    pieces = [part.images_B[piece] for piece in part.pieces(most)]
    assert [len(piece) for piece in pieces] == sizes
    assert np.concatenate(pieces).tolist() == list(range(num_images))


def order(seed: int, epoch: int) -> list[int]:
    return [int(image) for part in data(seed=seed).epoch(epoch) for image in part.images_B]


def test_epochs_differ_and_repeat_with_their_seed() -> None:
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6
    assert all(len(set(order(0, epoch))) == 8 for epoch in range(3)), "no image twice in an epoch"
    assert {image for epoch in range(8) for image in order(0, epoch)} == set(range(10)), "none waits for ever"


def test_unreadable_images_are_left_out() -> None:
    captioned = data(10, batch_size=2, failed=("3.jpg", "9.jpg"))
    assert captioned.steps_per_epoch == 4
    seen = {image for part in captioned.epoch(0) for image in part.images_B}
    assert seen == set(range(10)) - {3, 9}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_fewer_images_than_a_batch(num_workers: int) -> None:
    workers = [data(3, batch_size=12, rank=rank, world_size=num_workers) for rank in range(num_workers)]
    assert {worker.steps_per_epoch for worker in workers} == {1}
    seen = [image for worker in workers for part in worker.epoch(0) for image in part.images_B]
    assert sorted(seen) == [0, 1, 2]


def test_fewer_images_than_workers_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"1 of 3 training images can be read; .* each of 2 workers"):
        data(3, failed=("0.jpg", "2.jpg"), world_size=2)


def test_long_captions_are_cut() -> None:
    captioned = data(max_length=2)
    assert {len(tokens) for captions in captioned.captions for tokens in captions} == {4}


@pytest.mark.parametrize("early", [False, True])
def test_features_are_read_in_the_variant_that_the_seed_names(early: bool) -> None:
    """The only number of image n, variant v is n + v / 2."""
    numbers_NV = np.arange(40)[:, None] + np.arange(2)[None, :] / 2
    features = Features([numbers_NV[:, :, None, None].astype(np.float16)], {})
    captioned = data(40)
    mirrored = []
    for epoch in range(10):
        for part, inputs_BPC, readable_B in read_features(features, early, captioned.epoch(epoch)):
            assert readable_B.all()
            values = inputs_BPC.flatten()
            assert values.floor().tolist() == part.images_B.tolist()
            mirrored += (values % 1 > 0).tolist()
    assert len(mirrored) == 400
    assert 0.4 < np.mean(mirrored) < 0.6


def test_reading_ahead_keeps_the_order_and_is_one_ahead() -> None:
    made: list[int] = []
    third = threading.Event()

    def numbers() -> Iterator[int]:
        for n in range(5):
            made.append(n)
            if n == 2:
                third.set()
            yield n

    items = ahead(numbers())
    assert [next(items), next(items)] == [0, 1]
    assert third.wait(timeout=60), "made while the second is used"
    assert made == [0, 1, 2]
    assert list(items) == [2, 3, 4]


def test_an_error_of_reading_ahead_is_raised() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ConfigurationError("the disk is gone")

    with pytest.raises(ConfigurationError, match="the disk is gone"):
        list(ahead(broken()))
