"""Self-critical sequence training (Rennie et al. 2017): captions are sampled, and their CIDEr-D weighs their loss.

Knows nothing of Ray. Shapes: B images, K samples an image, T tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from raycap.coco import CaptionedImage
from raycap.model.beam import beam_search
from raycap.model.config import DecodingConfig
from raycap.model.decoder import Decoder
from raycap.model.sampling import drawable, sample
from raycap.model.vocabulary import BOS, EOS, Vocabulary, tokenize
from raycap.train.cider import CiderD
from raycap.train.config import TrainConfig
from raycap.train.data import Batch, as_batch


class SelfCritical:
    """Samples captions of training images, and compares their CIDEr-D with that of other captions of the same image."""

    def __init__(self, config: TrainConfig, images: Sequence[CaptionedImage], vocabulary: Vocabulary) -> None:
        """Document frequencies are those of all these images."""
        self.config = config
        # The end counts as a word, so that captions which stop in the middle ("a man in a") do not pay.
        ids: dict[str, Hashable] = {word: id_ for id_, word in enumerate(vocabulary.words)}

        def words(caption: str) -> list[Hashable]:
            """Token ids; words outside the vocabulary stay texts, which no sample can match."""
            return [*(ids.get(word, word) for word in tokenize(caption)), EOS]

        self.reward = CiderD([[words(caption) for caption in image.captions] for image in images])

    def samples(self, decoder: Decoder, images_B: np.ndarray, features_BPC: Tensor) -> tuple[Batch, dict[str, float]]:
        """A batch of sampled captions, each weighted by its advantage: minimising its weighted cross-entropy is the
        policy gradient (equation 7). Also the mean reward and number of words.

        `images_B` are the images' places in the list this was made of. The samples are drawn by the decoder in the mode
        it is in.
        """
        num_samples = self.config.scst_samples
        tokens_NT, lengths_N = sample(
            decoder,
            features_BPC,
            num_samples=num_samples,
            max_length=self.config.max_length,
            temperature=self.config.scst_temperature,
        )
        captions = [
            self._drawn(row[:length]) for row, length in zip(tokens_NT.tolist(), lengths_N.tolist(), strict=True)
        ]
        images_N = np.repeat(images_B, num_samples).tolist()
        rewards_BK = self._rewards(images_N, captions).reshape(len(images_B), num_samples)
        advantages_BK = rewards_BK - self._baseline(decoder, images_B, features_BPC, rewards_BK)
        batch = as_batch(
            features_BPC,
            [(n // num_samples, [BOS, *caption]) for n, caption in enumerate(captions)],
            advantages_BK.flatten().tolist(),
        )
        words = float(lengths_N.float().mean()) - 1
        return batch, {"train/reward": float(rewards_BK.mean()), "train/sample_words": words}

    def logits(self, logits_MV: Tensor, *, num_captions: int) -> Tensor:
        """The logits of the distribution that the samples are drawn from. With others, what is never drawn (<unk>, an
        end before the first word) would take the probability that bad words lose, and captions would shrink."""
        return drawable(logits_MV, self.config.scst_temperature, num_first=num_captions)

    def _drawn(self, caption: list[int]) -> list[int]:
        """Without the <eos> that only `max_length` has put there: nobody said it, and it earns nothing."""
        return caption[: self.config.max_length]

    def _rewards(self, images: Sequence[int], captions: Sequence[Sequence[int]]) -> np.ndarray:
        scores = [self.reward.score(image, caption) for image, caption in zip(images, captions, strict=True)]
        return np.array(scores)

    def _baseline(
        self, decoder: Decoder, images_B: np.ndarray, features_BPC: Tensor, rewards_BK: np.ndarray
    ) -> np.ndarray:
        """What each reward is compared with, [B, K] or [B, 1]."""
        if self.config.scst_baseline == "mean":
            others = rewards_BK.shape[1] - 1
            mean_BK: np.ndarray = (rewards_BK.sum(1, keepdims=True) - rewards_BK) / others  # Luo 2020, equation 6
            return mean_BK
        decoder.eval()
        with torch.no_grad():
            greedy = DecodingConfig(beam_size=1, max_length=self.config.max_length, no_repeat_ngram=0)
            found = beam_search(decoder, features_BPC, greedy)
        decoder.train()
        return self._rewards(images_B.tolist(), [self._drawn([*best[0].tokens, EOS]) for best in found])[:, None]
