"""Captioned images as batches for the decoder. Knows nothing of pixels or Ray.

Shapes: B images, P grid cells, C feature channels, N captions of these images, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raycap.coco import CaptionedImage
from raycap.errors import ConfigurationError
from raycap.model.vocabulary import PAD, Vocabulary
from raycap.train.features import Features


class Batch(NamedTuple):
    """Captions of a few images, the longest first, as `Decoder.forward` wants them."""

    features_BPC: Tensor
    image_N: Tensor
    tokens_NT: Tensor
    lengths_N: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens to predict: words and <eos>."""
        return int((self.lengths_N - 1).sum())


@dataclass(frozen=True, kw_only=True)
class CaptionData:
    """The training set as seen by one worker.

    All workers shuffle alike, by seed and epoch, and each takes its part of every batch: the images of a batch are the
    same for any number of workers.
    """

    features: Features
    rows: np.ndarray
    """int64: the row of each image in the features."""
    captions: list[list[list[int]]]
    """Token ids of the captions of each image."""
    batch_size: int
    """Images in a batch, over all workers."""
    rank: int
    world_size: int
    seed: int

    @classmethod
    def encode(
        cls,
        images: Sequence[CaptionedImage],
        features: Features,
        vocabulary: Vocabulary,
        *,
        max_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> CaptionData:
        """Turn captions into token ids. `images` are those of `features`, in the same order.

        Unreadable ones are left out. Raises ConfigurationError if not one for each worker is left.
        """
        rows = [row for row, image in enumerate(images) if image.file_name not in features.failed]
        if len(rows) < world_size:
            raise ConfigurationError(
                f"{len(rows)} of {len(images)} training images can be read; expected at least one for each of "
                f"{world_size} workers"
            )
        captions = [[vocabulary.encode(c, max_length=max_length) for c in images[row].captions] for row in rows]
        return cls(
            features=features,
            rows=np.asarray(rows),
            captions=captions,
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
        return max(1, len(self.captions) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This worker's part of the batches of one epoch."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.captions))
        variants = generator.integers(self.features.num_variants, size=len(order))
        for step in range(self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = np.array_split(batch, self.world_size)[self.rank]
            yield self._batch(images, variants[images])

    def _batch(self, images: np.ndarray, variants: np.ndarray) -> Batch:
        captions = [(position, tokens) for position, image in enumerate(images) for tokens in self.captions[image]]
        captions.sort(key=lambda item: -len(item[1]))  # stable: the order is the same everywhere
        tokens_NT = np.full((len(captions), len(captions[0][1])), PAD, dtype=np.int64)
        for n, (_, tokens) in enumerate(captions):
            tokens_NT[n, : len(tokens)] = tokens
        return Batch(
            self.features.batch(self.rows[images], variants),
            torch.tensor([position for position, _ in captions]),
            torch.from_numpy(tokens_NT),
            torch.tensor([len(tokens) for _, tokens in captions]),
        )
