"""Several networks as one: in each step of the search, the mean of their words' probabilities.

Shapes: B images, H x W pixels, P grid cells, C channels, R rows, V words, N members, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycap.model.beam import Hypothesis, beam_search
from raycap.model.config import DecodingConfig
from raycap.model.decoder import Decoder, Memory, State, Step
from raycap.model.encoder import Encoder
from raycap.model.network import CaptionNetwork, attention_maps


class EnsembleNetwork(nn.Module):
    """Networks that share a vocabulary and caption together. Asked as a `CaptionNetwork` is."""

    def __init__(self, encoders: Sequence[Encoder], members: Sequence[tuple[int, Decoder]]) -> None:
        """Each member is a decoder, and the index of the encoder that it reads."""
        super().__init__()
        self.encoders: Sequence[Encoder] = nn.ModuleList(encoders)  # type: ignore[assignment]
        self.encoder_of = tuple(index for index, _ in members)
        self.decoder = EnsembleDecoder([decoder for _, decoder in members])

    @classmethod
    def of(cls, networks: Sequence[CaptionNetwork]) -> EnsembleNetwork:
        """Equal encoders are kept once, so each image passes them once."""
        encoders: list[Encoder] = []
        members = []
        for network in networks:
            index = next((n for n, encoder in enumerate(encoders) if _equal(encoder, network.encoder)), len(encoders))
            if index == len(encoders):
                encoders.append(network.encoder)
            members.append((index, network.decoder))
        return cls(encoders, members)

    @property
    def members(self) -> list[tuple[int, Decoder]]:
        """What this was made of, besides the encoders."""
        return list(zip(self.encoder_of, self.decoder.members, strict=True))

    def features(self, pixels_BHWC: Tensor) -> tuple[Tensor, ...]:
        """As `CaptionNetwork.features`, of each member."""
        features = [encoder(pixels_BHWC) for encoder in self.encoders]
        return tuple(features[index] for index in self.encoder_of)

    def search(self, pixels_BHWC: Tensor, config: DecodingConfig) -> list[list[Hypothesis]]:
        """As `CaptionNetwork.search`; log_prob is the logarithm of the product of each word's mean probability."""
        return beam_search(self.decoder, self.features(pixels_BHWC), config)

    def attend(self, pixels_BHWC: Tensor, tokens: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """As `CaptionNetwork.attend`, the mean over the members that attend, on the finest of their grids."""
        maps = [
            weights
            for decoder, features_BPC in zip(self.decoder.members, self.features(pixels_BHWC), strict=True)
            if (weights := attention_maps(decoder, features_BPC, tokens)) is not None
        ]
        return [_mean_map(of_image) for of_image in zip(*maps, strict=True)] if maps else None


class EnsembleDecoder(nn.Module):
    """Decoders as one, for `beam_search` and `sample`. Memory and state are those of its members, one after another."""

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        super().__init__()
        self.members: Sequence[Decoder] = nn.ModuleList(decoders)  # type: ignore[assignment]

    def remember(self, features: tuple[Tensor, ...]) -> tuple[Memory, State]:
        """Of the features [B, P, C] of each member."""
        each = [decoder.remember(features_BPC) for decoder, features_BPC in zip(self.members, features, strict=True)]
        return sum((memory for memory, _ in each), ()), sum((state for _, state in each), ())

    def step(self, tokens_R: Tensor, state: State, memory: Memory) -> Step:
        """As `Decoder.step`, of all members. The scores are log-probabilities; there is no attention."""
        states, memories = iter(state), iter(memory)
        steps = [
            decoder.step(
                tokens_R, tuple(islice(states, decoder.num_state)), tuple(islice(memories, decoder.num_memory))
            )
            for decoder in self.members
        ]
        log_probs_NRV = torch.stack([torch.log_softmax(step.logits_RV.float(), -1) for step in steps])
        mean_RV = torch.logsumexp(log_probs_NRV, 0) - math.log(len(steps))
        return Step(mean_RV, sum((step.state for step in steps), ()), None)


def _equal(one: Encoder, other: Encoder) -> bool:
    if one is other:
        return True
    if one.config != other.config:
        return False
    tensors = other.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in one.state_dict().items())


def _mean_map(maps: Sequence[Tensor]) -> Tensor:
    """The mean of weights [T, rows, cols] over grids that may differ."""
    size = max(tuple(weights_TRC.shape[1:]) for weights_TRC in maps)
    total_TRC = torch.stack([F.interpolate(weights[None], size, mode="bilinear")[0] for weights in maps]).sum(0)
    return total_TRC / total_TRC.sum((1, 2), keepdim=True)
