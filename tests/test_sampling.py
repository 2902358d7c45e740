"""Sampled captions follow the decoder's distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from raycap.model.beam import STEPS_BETWEEN_LOOKS, beam_search
from raycap.model.config import DecoderKind, DecodingConfig
from raycap.model.sampling import sample
from raycap.model.vocabulary import BOS, EOS, PAD, UNKNOWN
from tests.naive import naive_logits
from tests.small import KINDS, small_decoder, small_features


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [1, 4, 12])
def test_rows_are_words_an_end_and_padding(kind: DecoderKind, max_length: int) -> None:
    decoder, features_BPC = small_decoder(kind, scale=1.0), small_features(5)
    tokens_RT, lengths_R = sample(decoder, features_BPC, num_samples=7, max_length=max_length, generator=seeded())
    assert tokens_RT.dtype == lengths_R.dtype == torch.int64
    assert tokens_RT.shape == (35, int(lengths_R.max()))
    for row, length in zip(tokens_RT.tolist(), lengths_R.tolist(), strict=True):
        assert 2 <= length <= max_length + 1
        assert not {PAD, BOS, EOS, UNKNOWN} & set(row[: length - 1])
        assert row[length - 1 :] == [EOS] + [PAD] * (len(row) - length)
    assert (int(lengths_R.min()) == 2) and (len(lengths_R.unique()) > 1 or max_length == 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (2.0, 0.8)])
def test_captions_are_as_frequent_as_they_are_probable(kind: DecoderKind, temperature: float, top_p: float) -> None:
    """All captions of up to two words of a vocabulary of four, for two images in one batch."""
    num_samples, words = 4000, range(4, 8)
    decoder, features_BPC = small_decoder(kind, vocabulary_size=8, scale=2.0), small_features(2)
    tokens_RT, _ = sample(
        decoder,
        features_BPC,
        num_samples=num_samples,
        max_length=2,
        generator=seeded(),
        temperature=temperature,
        top_p=top_p,
    )
    for image, tokens_ST in enumerate(tokens_RT.split(num_samples)):
        found = Counter(tuple(token for token in row if token >= UNKNOWN) for row in tokens_ST.tolist())
        total = 0.0
        for caption in [(word,) for word in words] + list(itertools.product(words, words)):
            probability = 1.0
            tokens = [BOS, *caption, EOS]
            all_logits = naive_logits(decoder, features_BPC[image : image + 1], tokens)
            for position, logits_V in enumerate(all_logits[:2]):  # after two words the end is not drawn
                allowed = [*words, EOS] if position else list(words)
                probability *= naive_distribution(logits_V, allowed, temperature, top_p).get(tokens[position + 1], 0.0)
            total += probability
            deviation = math.sqrt(probability * (1 - probability) / num_samples)
            assert found[caption] / num_samples == pytest.approx(probability, abs=5 * deviation), caption
        assert total == pytest.approx(1.0)


def naive_distribution(
    logits_V: torch.Tensor, allowed: list[int], temperature: float, top_p: float
) -> dict[int, float]:
    weights = sorted(((math.exp(logits_V[word].item() / temperature), word) for word in allowed), reverse=True)
    norm = sum(weight for weight, _ in weights)
    kept: dict[int, float] = {}
    for weight, word in weights:
        if sum(kept.values()) >= top_p:
            break
        kept[word] = weight / norm
    return {word: weight / sum(kept.values()) for word, weight in kept.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_almost_no_temperature_is_greedy(kind: DecoderKind) -> None:
    decoder, features_BPC = small_decoder(kind), small_features(4)
    tokens_RT, lengths_R = sample(decoder, features_BPC, num_samples=2, max_length=8, temperature=1e-4)
    greedy = beam_search(decoder, features_BPC, DecodingConfig(beam_size=1, max_length=8, no_repeat_ngram=0))
    for row, length, image in zip(tokens_RT.tolist(), lengths_R.tolist(), [0, 0, 1, 1, 2, 2, 3, 3], strict=True):
        assert row[: length - 1] == greedy[image][0].tokens


def test_a_seed_decides_and_the_tokens_can_be_trained_on() -> None:
    decoder, features_BPC = small_decoder(scale=1.0), small_features(3)
    drawn = [
        sample(decoder, features_BPC, num_samples=2, max_length=6, generator=seeded(seed))[0] for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].shape != drawn[2].shape or not torch.equal(drawn[0], drawn[2])
    decoder.embedding(drawn[0]).sum().backward()
    assert decoder.embedding.weight.grad is not None


def test_looking_less_often_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All captions may have ended some steps ago, as on GPUs."""
    for max_length in range(1, 10):
        decoder, features_BPC = small_decoder(seed=max_length), small_features(4, seed=max_length)
        drawn = []
        for steps in (1, 4):
            monkeypatch.setitem(STEPS_BETWEEN_LOOKS, "cpu", steps)
            drawn.append(sample(decoder, features_BPC, num_samples=2, max_length=max_length, generator=seeded(0)))
        for one, other in zip(*drawn, strict=True):
            assert torch.equal(one, other)
