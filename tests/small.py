"""Small random models that tests share. They say nothing sensible, but quickly and the same each time."""

from __future__ import annotations

from typing import get_args

import torch
from torch import nn

from raycap.images import Preprocessing
from raycap.model.bundle import Bundle
from raycap.model.config import DecoderConfig, DecoderKind, DecodingConfig, EncoderConfig
from raycap.model.decoder import Decoder, build_decoder
from raycap.model.encoder import Encoder
from raycap.model.network import CaptionNetwork
from raycap.model.vocabulary import SPECIAL_TOKENS, Vocabulary

KINDS: tuple[DecoderKind, ...] = get_args(DecoderKind)
ATTENDING: tuple[DecoderKind, ...] = ("attention", "att2in")


def small_vocabulary(num_words: int = 8) -> Vocabulary:
    """The special tokens and `w0`, `w1` ..."""
    return Vocabulary([*SPECIAL_TOKENS, *(f"w{n}" for n in range(num_words))])


def small_decoder(
    kind: DecoderKind = "attention",
    *,
    seed: int = 0,
    vocabulary_size: int = 12,
    scale: float = 6.0,
    dropout: float = 0.0,
) -> Decoder:
    """A decoder in evaluation mode. `scale` multiplies its weights: without it every word would be about as likely."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        kind=kind, vocabulary_size=vocabulary_size, feature_size=6, hidden_size=8, attention_size=5, dropout=dropout
    )
    decoder = build_decoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(scale).add_(0.2 * torch.randn_like(parameter))
    return decoder


def small_features(num_images: int = 3, *, seed: int = 0, num_cells: int = 4, num_channels: int = 6) -> torch.Tensor:
    """float32 [num_images, num_cells, num_channels]."""
    return torch.randn(num_images, num_cells, num_channels, generator=torch.Generator().manual_seed(seed))


class PatchMean(nn.Module):
    """Stands for a CNN: 1x1 convolution of the picture's means over a grid of `side` x `side` cells."""

    def __init__(self, num_channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.convolution = nn.Conv2d(3, num_channels, 1)
        self.norm = nn.BatchNorm2d(num_channels)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        grid_BCHW: torch.Tensor = self.norm(self.convolution(nn.functional.adaptive_avg_pool2d(images_BCHW, self.side)))
        return grid_BCHW


def small_encoder(*, seed: int = 0, num_channels: int = 6, side: int = 2) -> Encoder:
    """An encoder in evaluation mode that takes pictures of any size and gives `side` x `side` cells."""
    torch.manual_seed(seed)
    backbone = PatchMean(num_channels, side)
    nn.init.normal_(backbone.convolution.weight, std=2.0)  # so that pictures differ
    return Encoder(EncoderConfig(name="small", num_channels=num_channels), backbone).eval()


def small_bundle(kind: DecoderKind = "attention", *, size_px: int = 16) -> Bundle:
    """A model of the two above. It can caption but not be loaded again: no registry knows its encoder."""
    return Bundle(
        network=CaptionNetwork(small_encoder(), small_decoder(kind)),
        vocabulary=small_vocabulary(),
        preprocessing=Preprocessing(size_px=size_px),
        decoding=DecodingConfig(max_length=6),
        model_id="small",
    )


def lite0_bundle(kind: DecoderKind = "attention", *, seed: int = 0) -> Bundle:
    """The shipped architecture with random weights, at 64 pixels."""
    torch.manual_seed(seed)
    encoder = EncoderConfig()
    decoder = DecoderConfig(kind=kind, vocabulary_size=12, hidden_size=8, attention_size=5)
    return Bundle(
        network=CaptionNetwork.build(encoder, decoder).eval().requires_grad_(False),
        vocabulary=small_vocabulary(),
        preprocessing=Preprocessing(size_px=64),
        decoding=DecodingConfig(max_length=6),
        metrics={"scores": {"cider_d": 0.5}},
        card="# a model\n",
    )
