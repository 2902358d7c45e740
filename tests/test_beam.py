"""The batched beam search against its naive twin and against the promises of its docstring."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raycap.errors import ConfigurationError
from raycap.model.beam import STEPS_BETWEEN_LOOKS, Hypothesis, beam_search
from raycap.model.config import DecoderKind, DecodingConfig
from raycap.model.decoder import Decoder
from raycap.model.sampling import sample
from raycap.model.vocabulary import BOS, EOS, PAD, UNKNOWN
from tests.naive import naive_beam_search, naive_log_prob
from tests.small import KINDS, small_decoder, small_features, small_vocabulary

LENGTH_PENALTIES = (0.0, 0.7, 2.0)


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    torch.testing.assert_close([h.log_prob for h in found], [h.log_prob for h in expected], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close([h.score for h in found], [h.score for h in expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beam_size", [1, 2, 3, 4, 5])
def test_equals_the_naive_search(kind: DecoderKind, beam_size: int) -> None:
    settings = itertools.product(LENGTH_PENALTIES, (0, 1, 2, 3), (False, True))
    for seed, (length_penalty, no_repeat_ngram, allow_unknown) in enumerate(settings):
        config = DecodingConfig(
            beam_size=beam_size,
            max_length=5,
            length_penalty=length_penalty,
            no_repeat_ngram=no_repeat_ngram,
            allow_unknown=allow_unknown,
        )
        decoder, features_BPC = small_decoder(kind, seed=seed, vocabulary_size=9), small_features(3, seed=seed)
        found = beam_search(decoder, features_BPC, config)
        for image, hypotheses in enumerate(found):
            assert_same(hypotheses, naive_beam_search(decoder, features_BPC[image : image + 1], config))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_looking_less_often_changes_nothing(beam_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are done stay in the batch for some steps, as on GPUs."""
    for max_length in range(1, 10):
        config = DecodingConfig(beam_size=beam_size, max_length=max_length)
        decoder, features_BPC = small_decoder(seed=max_length), small_features(20, seed=max_length)
        monkeypatch.setitem(STEPS_BETWEEN_LOOKS, "cpu", 1)
        often = beam_search(decoder, features_BPC, config)
        monkeypatch.setitem(STEPS_BETWEEN_LOOKS, "cpu", 4)
        for one, other in zip(beam_search(decoder, features_BPC, config), often, strict=True):
            assert_same(one, other)


class Calls(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_list_is_an_index() -> None:
    """On a GPU it would be copied there in each step, and a copy waits for all that was begun before it."""
    with Calls() as calls:
        beam_search(small_decoder(), small_features(), DecodingConfig())
        sample(small_decoder(), small_features(), num_samples=2, max_length=5)
    assert {"topk", "multinomial"} <= calls.names
    assert not {"index_put_", "_index_put_impl_"} & calls.names


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_an_argmax_rollout(kind: DecoderKind) -> None:
    config = DecodingConfig(beam_size=1, max_length=8, no_repeat_ngram=0)
    for seed in range(10):
        decoder, features_BPC = small_decoder(kind, seed=seed), small_features(2, seed=seed)
        found = beam_search(decoder, features_BPC, config)
        assert [[h.tokens for h in of_image] for of_image in found] == [
            [argmax_rollout(decoder, features_BPC[image : image + 1], config.max_length)] for image in range(2)
        ]


@torch.inference_mode()
def argmax_rollout(decoder: Decoder, features_1PC: torch.Tensor, max_length: int) -> list[int]:
    memory, state = decoder.remember(features_1PC)
    words: list[int] = []
    token = BOS
    while len(words) < max_length:
        step = decoder.step(torch.tensor([token]), state, memory)
        forbidden = [PAD, BOS, UNKNOWN] if words else [PAD, BOS, UNKNOWN, EOS]
        step.logits_RV[:, forbidden] = float("-inf")
        token, state = int(step.logits_RV.argmax()), step.state
        if token == EOS:
            break
        words.append(token)
    return words


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_is_the_teacher_forced_log_probability(kind: DecoderKind) -> None:
    config = DecodingConfig(beam_size=4, max_length=6, length_penalty=1.3)
    for seed in range(5):
        decoder, features_BPC = small_decoder(kind, seed=seed), small_features(2, seed=seed)
        for image, hypotheses in enumerate(beam_search(decoder, features_BPC, config)):
            for tokens, log_prob, score in hypotheses:
                expected = naive_log_prob(decoder, features_BPC[image : image + 1], tokens)
                assert log_prob == pytest.approx(expected, abs=1e-4)
                assert score == pytest.approx(log_prob / (len(tokens) + 1) ** 1.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ngram", [0, 1, 2, 3])
def test_promises(kind: DecoderKind, ngram: int) -> None:
    vocabulary = small_vocabulary()
    config = DecodingConfig(beam_size=5, max_length=8, length_penalty=2.0, no_repeat_ngram=ngram)
    repeated = False
    for seed in range(8):
        for hypotheses in beam_search(small_decoder(kind, seed=seed), small_features(4, seed=seed), config):
            assert len(hypotheses) == 5
            assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
            texts = [vocabulary.decode(h.tokens) for h in hypotheses]
            assert len(set(texts)) == 5, "alternatives must differ"
            for tokens, _, _ in hypotheses:
                assert 1 <= len(tokens) <= 8
                assert not {PAD, BOS, EOS, UNKNOWN} & set(tokens)
                ngrams = [tuple(tokens[i : i + max(ngram, 2)]) for i in range(len(tokens) - max(ngram, 2) + 1)]
                repeated |= len(set(ngrams)) < len(ngrams)
                if ngram == 1:
                    assert len(set(tokens)) == len(tokens)
    assert repeated == (ngram == 0), "without blocking these decoders repeat themselves; with it they may not"


def test_unknown_appears_only_if_allowed() -> None:
    decoder, features_BPC = small_decoder(), small_features()
    with torch.no_grad():
        decoder.output_bias[UNKNOWN] = 50.0
    for allowed in (False, True):
        found = beam_search(decoder, features_BPC, DecodingConfig(allow_unknown=allowed, no_repeat_ngram=0))
        assert all((UNKNOWN in h.tokens) == allowed for of_image in found for h in of_image[:1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_an_image_alone_gives_what_it_gives_in_a_batch(kind: DecoderKind, beam_size: int) -> None:
    config = DecodingConfig(beam_size=beam_size, max_length=10)
    decoder, features_BPC = small_decoder(kind), small_features(17)
    together = beam_search(decoder, features_BPC, config)
    assert len({len(of_image[0].tokens) for of_image in together}) > 1, "the images must end at different times"
    for image in range(17):
        assert_same(together[image], beam_search(decoder, features_BPC[image : image + 1], config)[0])


def test_an_eager_eos_ends_after_one_word() -> None:
    decoder = small_decoder()
    with torch.no_grad():
        decoder.output_bias[EOS] = 50.0
    found = beam_search(decoder, small_features(2), DecodingConfig(beam_size=1))
    assert [len(h.tokens) for of_image in found for h in of_image] == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [1, 2, 5])
@pytest.mark.parametrize("ngram", [0, 1, 2])
def test_fewer_words_than_beams(kind: DecoderKind, max_length: int, ngram: int) -> None:
    config = DecodingConfig(beam_size=5, max_length=max_length, no_repeat_ngram=ngram)
    for vocabulary_size in (5, 6):  # one word, two words
        decoder, features_BPC = small_decoder(kind, vocabulary_size=vocabulary_size), small_features(2)
        for image, hypotheses in enumerate(beam_search(decoder, features_BPC, config)):
            assert 1 <= len(hypotheses) <= 5
            assert all(1 <= len(h.tokens) <= max_length for h in hypotheses)
            assert_same(hypotheses, naive_beam_search(decoder, features_BPC[image : image + 1], config))


def test_one_word_that_may_not_be_repeated_leaves_one_caption() -> None:
    config = DecodingConfig(beam_size=3, no_repeat_ngram=1)
    (hypotheses,) = beam_search(small_decoder(vocabulary_size=5), small_features(1), config)
    assert [h.tokens for h in hypotheses] == [[4]]


def test_an_endless_model_is_ended_at_max_length() -> None:
    decoder = small_decoder()
    with torch.no_grad():
        decoder.output_bias[EOS] = -50.0
    found = beam_search(decoder, small_features(2), DecodingConfig(max_length=7, no_repeat_ngram=0))
    assert all(len(h.tokens) == 7 and h.log_prob < -30 for of_image in found for h in of_image)


def test_scores_that_are_no_numbers_are_named() -> None:
    with pytest.raises(ConfigurationError, match="not numbers"):
        beam_search(small_decoder(), small_features(2) * float("nan"), DecodingConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_size": 0}, "beam_size must be from 1 to 64, got 0"),
        ({"max_length": 0}, "max_length must be from 1 to 200 words, got 0"),
        ({"length_penalty": -0.1}, "length_penalty must be from 0 to 5"),
        ({"length_penalty": float("nan")}, "length_penalty must be from 0 to 5"),
        ({"no_repeat_ngram": 11}, "no_repeat_ngram must be from 0 to 10"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DecodingConfig().updated(**settings)


def test_updating_with_none_keeps_a_setting() -> None:
    assert DecodingConfig(beam_size=4).updated(beam_size=None, max_length=9) == DecodingConfig(
        beam_size=4, max_length=9
    )
