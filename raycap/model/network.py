"""Encoder and decoder as one network, and what is asked of it."""

from __future__ import annotations

from torch import Tensor, nn

from raycap.model.beam import Hypothesis, beam_search
from raycap.model.config import DecoderConfig, DecodingConfig, EncoderConfig
from raycap.model.decoder import Decoder, build_decoder
from raycap.model.encoder import Encoder, build_encoder


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

    def search(self, pixels_BHWC: Tensor, config: DecodingConfig) -> list[list[Hypothesis]]:
        """The best captions of each image, as `beam_search` gives them. Pixels are uint8 RGB [B, H, W, 3]."""
        return beam_search(self.decoder, self.encoder(pixels_BHWC), config)
