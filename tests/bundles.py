"""A small model bundle of random weights, for tests of everything around the model."""

from __future__ import annotations

import torch

from raycap.images import Preprocessing
from raycap.model.bundle import Bundle
from raycap.model.config import DecoderConfig, DecodingConfig, EncoderConfig
from raycap.model.network import CaptionNetwork
from raycap.model.vocabulary import SPECIAL_TOKENS, Vocabulary

SIZE_PX = 64
_NOUNS = "dog cat man woman child horse boat beach street field snow water ball"
_OTHERS = "a the runs sits jumps stands plays on in with under over red blue green white black"
WORDS = [*_NOUNS.split(), *_OTHERS.split()]


def random_bundle(*, seed: int = 0, hidden_size: int = 32) -> Bundle:
    """The architecture of the shipped bundle, small and untrained: its captions are nonsense, but always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = DecoderConfig(
            vocabulary_size=len(SPECIAL_TOKENS) + len(WORDS), hidden_size=hidden_size, attention_size=hidden_size
        )
        network = CaptionNetwork.build(EncoderConfig(), decoder).eval().requires_grad_(False)
    return Bundle(
        network=network,
        vocabulary=Vocabulary([*SPECIAL_TOKENS, *WORDS]),
        preprocessing=Preprocessing(size_px=SIZE_PX),
        decoding=DecodingConfig(beam_size=3, max_length=6),
        metrics={},
        card="# A test's bundle\n",
    )
