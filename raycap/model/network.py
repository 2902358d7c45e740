"""Encoder and decoder as one network, and what is asked of it.

Shapes: B images, H x W pixels, P grid cells, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn

from raycap.model.beam import Hypothesis, beam_search
from raycap.model.config import DecoderConfig, DecodingConfig, EncoderConfig
from raycap.model.decoder import Decoder, build_decoder
from raycap.model.encoder import Encoder, build_encoder
from raycap.model.vocabulary import BOS, PAD


class CaptionNetwork(nn.Module):
    """A CNN encoder with an LSTM decoder."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    @classmethod
    def build(cls, encoder: EncoderConfig, decoder: DecoderConfig) -> CaptionNetwork:
        """The architecture that the two configs name, with random weights."""
        return cls(build_encoder(encoder), build_decoder(decoder))

    def features(self, pixels_BHWC: Tensor) -> Tensor:
        """What the decoder remembers of uint8 RGB pixels [B, H, W, 3]: the encoder's [B, P, C]."""
        features_BPC: Tensor = self.encoder(pixels_BHWC)
        return features_BPC

    def search(self, pixels_BHWC: Tensor, config: DecodingConfig) -> list[list[Hypothesis]]:
        """The best captions of each image, as `beam_search` gives them. Pixels are uint8 RGB [B, H, W, 3]."""
        return beam_search(self.decoder, self.features(pixels_BHWC), config)

    def attend(self, pixels_BHWC: Tensor, tokens: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Where the decoder looks for each word of the caption `tokens` of each image, and for its end.

        `tokens` are word ids, without <bos> and <eos>. Gives float32 [len(tokens) + 1, rows, cols] for each image,
        weights that sum to 1 over the encoder's grid in each step; None from a decoder without attention.
        """
        return attention_maps(self.decoder, self.features(pixels_BHWC), tokens)


@torch.inference_mode()
def attention_maps(decoder: Decoder, features_BPC: Tensor, tokens: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """As `CaptionNetwork.attend`, of the features of a square grid."""
    longest = max(map(len, tokens))
    rows = [[BOS, *words, *[PAD] * (longest - len(words))] for words in tokens]
    memory, state = decoder.remember(features_BPC)
    steps = []
    for tokens_B in torch.tensor(rows, device=features_BPC.device).unbind(1):
        step = decoder.step(tokens_B, state, memory)
        if step.attention_RP is None:
            return None
        steps.append(step.attention_RP.float())
        state = step.state
    weights_BTP = torch.stack(steps, 1)
    weights_BTP /= weights_BTP.sum(-1, keepdim=True)  # those of bfloat16 sum to 1 but roughly
    side = isqrt(features_BPC.shape[1])
    weights_BTRC = weights_BTP.unflatten(2, (side, side))
    return [weights_TRC[: len(words) + 1] for words, weights_TRC in zip(tokens, weights_BTRC, strict=True)]
