"""Captioned images as batches. Knows nothing of Ray; pixels are somebody else's.

Shapes: B images, P grid cells, C feature channels, N captions of these images, T tokens of the longest, M their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from raycap.coco import CaptionedImage
from raycap.errors import ConfigurationError
from raycap.model.vocabulary import PAD, Vocabulary
from raycap.train.features import Features

T = TypeVar("T")


class Part(NamedTuple):
    """One worker's part of the images of a batch."""

    images_B: np.ndarray
    """int64: places in the list of training images."""
    seeds_B: np.ndarray
    """uint32, drawn anew in each epoch: decide the variant (mirrored, cropped) of each image."""

    def pieces(self, most: int | None) -> list[slice]:
        """As few as hold `most` images each, of about the same size; None: all in one."""
        num_images = len(self.images_B)
        bounds = np.linspace(0, num_images, math.ceil(num_images / (most or num_images)) + 1).astype(int).tolist()
        return [slice(start, end) for start, end in pairwise(bounds)]


class Batch(NamedTuple):
    """Captions of a few images, the longest first, as `Decoder.forward` wants them."""

    inputs: Tensor
    """features float32 [B, P, C], or pixels uint8 [B, H, W, 3]."""
    image_N: Tensor
    tokens_NT: Tensor
    lengths_N: Tensor
    weights_N: Tensor
    """float32: what each caption's loss is multiplied by; 0 for the captions of an image that could not be read."""
    num_tokens: int
    """Tokens to predict, words and <eos>, in the captions of images that could be read."""


@dataclass(frozen=True, kw_only=True)
class CaptionData:
    """The training set as seen by one worker.

    All workers shuffle alike, by seed and epoch, and each takes its part of every batch: the images of a batch are the
    same for any number of workers.
    """

    images: np.ndarray
    """int64: places of the images that can be used in the list of training images."""
    captions: list[list[list[int]]]
    """Token ids of the captions of each image in that list."""
    batch_size: int
    """Images in a batch, over all workers."""
    rank: int
    world_size: int
    seed: int

    @classmethod
    def encode(
        cls,
        images: Sequence[CaptionedImage],
        vocabulary: Vocabulary,
        *,
        max_length: int,
        batch_size: int,
        failed: Iterable[str] = (),
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> CaptionData:
        """Turn captions into token ids; the images named in `failed` are left out.

        Raises ConfigurationError if not one for each worker is left.
        """
        failed = set(failed)
        usable = [place for place, image in enumerate(images) if image.file_name not in failed]
        if len(usable) < world_size:
            raise ConfigurationError(
                f"{len(usable)} of {len(images)} training images can be read; expected at least one for each of "
                f"{world_size} workers"
            )
        return cls(
            images=np.asarray(usable),
            captions=[[vocabulary.encode(c, max_length=max_length) for c in image.captions] for image in images],
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch. The images that do not fill the last batch wait for another epoch's shuffle.

        Fewer images than one batch holds are one small batch.
        """
        return max(1, len(self.images) // self.batch_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Part]:
        """This worker's part of the batches of one epoch, from batch number `start` on."""
        generator = np.random.default_rng([self.seed, epoch])
        order = self.images[generator.permutation(len(self.images))]
        seeds = generator.integers(2**32, size=len(order), dtype=np.uint32)
        for step in range(start, self.steps_per_epoch):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield Part(*(np.array_split(array[batch], self.world_size)[self.rank] for array in (order, seeds)))

    def references(self, part: Part, inputs: Tensor, readable_B: np.ndarray) -> Batch:
        """The images of a part with all their reference captions."""
        captions = [(b, tokens) for b, image in enumerate(part.images_B) for tokens in self.captions[image]]
        batch = as_batch(inputs, captions, [float(readable_B[b]) for b, _ in captions])
        return batch._replace(num_tokens=sum(len(tokens) - 1 for b, tokens in captions if readable_B[b]))


def as_batch(inputs: Tensor, captions: Sequence[tuple[int, Sequence[int]]], weights: Sequence[float]) -> Batch:
    """A batch of (image, tokens with <bos> and <eos>) and the weight of each."""
    order = sorted(range(len(captions)), key=lambda n: -len(captions[n][1]))  # stable: the order is the same everywhere
    tokens_NT = np.full((len(order), len(captions[order[0]][1])), PAD, dtype=np.int64)
    for row, n in enumerate(order):
        tokens = captions[n][1]
        tokens_NT[row, : len(tokens)] = tokens
    return Batch(
        inputs,
        torch.tensor([captions[n][0] for n in order]),
        torch.from_numpy(tokens_NT),
        torch.tensor([len(captions[n][1]) for n in order]),
        torch.tensor([weights[n] for n in order], dtype=torch.float32),
        sum(len(tokens) - 1 for _, tokens in captions),
    )


def in_order_of_time(values_NT: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs to each row of `Decoder.forward`'s logits: the caption's number [M], and its value at the next token
    [M]. `lengths_N` is on the CPU, the longest first."""
    active_TN = lengths_N - 1 > torch.arange(int(lengths_N[0]) - 1)[:, None]
    time_M, caption_M = (index.to(values_NT.device) for index in active_TN.nonzero(as_tuple=True))
    return caption_M, values_NT[caption_M, time_M + 1]


def read_features(features: Features, early: bool, parts: Iterable[Part]) -> Iterator[tuple[Part, Tensor, np.ndarray]]:
    """The cached features of each part. `early`: read while the part before is used; for GPUs, since on CPUs the thread
    that reads takes more time from those that compute (25 against 31 images/s on two cores) than it saves.
    """

    def load(part: Part) -> tuple[Part, Tensor, np.ndarray]:
        variants_B = (part.seeds_B % features.num_variants).astype(np.int64)
        return part, features.batch(part.images_B, variants_B), np.ones(len(part.images_B), dtype=bool)

    return ahead(map(load, parts)) if early else map(load, parts)


_END = object()


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is used."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="raycap-ahead") as pool:
        future = pool.submit(next, iterator, _END)
        while (item := future.result()) is not _END:
            future = pool.submit(next, iterator, _END)
            yield item
