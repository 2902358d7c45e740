"""Self-critical training: its loss is the policy gradient, and it raises the reward."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from raycap.coco import CaptionedImage
from raycap.model.beam import beam_search
from raycap.model.config import DecoderKind, DecodingConfig
from raycap.model.decoder import Decoder
from raycap.model.vocabulary import BOS, EOS, PAD, SPECIAL_TOKENS, UNKNOWN, Vocabulary, tokenize
from raycap.train.cider import CiderD
from raycap.train.config import TrainConfig
from raycap.train.data import Batch
from raycap.train.self_critical import SelfCritical
from tests.naive import naive_logits
from tests.small import KINDS
from tests.training import (
    FEATURES_NPC,
    IMAGES,
    VOCABULARY,
    Recording,
    half_trained,
    one_thread,  # noqa: F401  # for the whole module
    tiny_config,
    tiny_learner,
    tiny_network,
)

IMAGES_B = np.array([5, 0, 3])


def settings(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "scst_epochs": 1,
        "dropout": 0.0,
        "batch_size": 8,
        "max_length": 6,
        "scst_temperature": 1.0,
    }
    return tiny_config(**(defaults | changes))


def naive_reward() -> CiderD:
    """On texts, the end being a word."""
    return CiderD([[[*tokenize(caption), "<eos>"] for caption in image.captions] for image in IMAGES])


def naive_score(image: int, tokens: list[int]) -> float:
    """Of words and <eos>."""
    return naive_reward().score(image, [VOCABULARY.words[token] for token in tokens])


def by_image(batch: Batch) -> dict[int, list[tuple[list[int], float]]]:
    """Words and <eos> of each caption of the image of this place in the batch, and its weight."""
    captions = defaultdict(list)
    for image, tokens, length, weight in zip(
        batch.image_N.tolist(),
        batch.tokens_NT.tolist(),
        batch.lengths_N.tolist(),
        batch.weights_N.tolist(),
        strict=True,
    ):
        captions[image].append((tokens[1:length], weight))
    return captions


def sampled(config: TrainConfig, decoder: Decoder) -> tuple[Batch, dict[str, float]]:
    torch.manual_seed(3)
    return SelfCritical(config, IMAGES, VOCABULARY).samples(decoder, IMAGES_B, FEATURES_NPC[IMAGES_B])


def test_the_mean_of_the_others_is_the_baseline() -> None:
    config = settings(scst_samples=4)
    batch, metrics = sampled(config, half_trained().decoder)
    captions, rewards = by_image(batch), []
    assert [len(captions[b]) for b in range(3)] == [4, 4, 4]
    for b, image in enumerate(IMAGES_B):
        scores = [naive_score(int(image), tokens) for tokens, _ in captions[b]]
        for n, (_, weight) in enumerate(captions[b]):
            others = scores[:n] + scores[n + 1 :]
            assert weight == pytest.approx(scores[n] - sum(others) / 3, abs=1e-5)
        assert sum(weight for _, weight in captions[b]) == pytest.approx(0, abs=1e-5)
        rewards += scores
    assert metrics["train/reward"] == pytest.approx(np.mean(rewards))
    assert batch.weights_N.abs().max() > 0.1


def test_the_greedy_caption_is_the_baseline() -> None:
    """The samples are drawn with dropout, where there is any; the greedy caption is not."""
    config = settings(scst_samples=3, scst_baseline="greedy")
    decoder = half_trained(dropout=0.5).decoder.eval()
    greedy = DecodingConfig(beam_size=1, max_length=6, no_repeat_ngram=0)
    found = beam_search(decoder, FEATURES_NPC[IMAGES_B], greedy)
    baselines = [naive_score(int(image), [*best[0].tokens, EOS]) for image, best in zip(IMAGES_B, found, strict=True)]
    assert max(baselines) > 0
    without, _ = sampled(config, decoder.eval())
    batch, _ = sampled(config, decoder.train())
    assert decoder.training
    assert not torch.equal(batch.tokens_NT, without.tokens_NT)
    captions = by_image(batch)
    for b, image in enumerate(IMAGES_B):
        for tokens, weight in captions[b]:
            assert weight == pytest.approx(naive_score(int(image), tokens) - baselines[b], abs=1e-5)


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_an_end_that_nobody_said_is_neither_learned_nor_rewarded(baseline: str) -> None:
    """The references have three words or four, and so have the captions of a network that has half learned them."""
    config = settings(scst_samples=6, scst_baseline=baseline, max_length=3, scst_temperature=0.5)
    decoder = half_trained().decoder
    batch, metrics = sampled(config, decoder)
    greedy = DecodingConfig(beam_size=1, max_length=3, no_repeat_ngram=0)
    greedy_captions = [best[0].tokens for best in beam_search(decoder, FEATURES_NPC[IMAGES_B], greedy)]
    assert {len(tokens) for tokens in greedy_captions} == {3}
    captions = by_image(batch)
    for b, image in enumerate(IMAGES_B):
        scores = [naive_score(int(image), tokens) for tokens, _ in captions[b]]
        of_greedy = naive_score(int(image), greedy_captions[b])
        for n, (_, weight) in enumerate(captions[b]):
            others = scores[:n] + scores[n + 1 :] if baseline == "mean" else [of_greedy]
            assert weight == pytest.approx(scores[n] - np.mean(others), abs=1e-5)
    said = [tokens for of_image in captions.values() for tokens, _ in of_image]
    cut = [tokens for tokens in said if EOS not in tokens]
    assert cut and {len(tokens) for tokens in cut} == {3}
    assert batch.num_tokens == sum(map(len, said))
    assert metrics["train/sample_words"] == pytest.approx(np.mean([len(tokens) - tokens.count(EOS) for tokens in said]))


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_policy_gradient(kind: DecoderKind, baseline: str) -> None:
    """The sum of advantage * gradient of -log p(sample), a token at a time, p being what the samples are drawn from;
    label smoothing has no place in it."""
    config = settings(
        decoder=kind, scst_samples=3, scst_baseline=baseline, max_grad_norm=1e9, label_smoothing=0.5,
        scst_temperature=0.7,
    )  # fmt: skip
    decoder, learner = tiny_network(config).decoder, tiny_learner(config, "self_critical")
    learner.self_critical = recording = Recording(config)
    reported = learner.train_epoch(0)
    ((batch, _),) = recording.given
    loss = torch.zeros(())
    for b, captions in by_image(batch).items():
        for tokens, weight in captions:
            logits = naive_logits(decoder, batch.inputs[b : b + 1], [BOS, *tokens])
            for position, (logits_V, token) in enumerate(zip(logits, tokens, strict=True)):
                never = (PAD, BOS, UNKNOWN) if position else (PAD, BOS, UNKNOWN, EOS)
                drawn = [word for word in range(len(logits_V)) if word not in never]
                loss = loss - weight * torch.log_softmax(logits_V[drawn] / 0.7, -1)[drawn.index(token)]
    mean = loss / sum(len(tokens) for captions in by_image(batch).values() for tokens, _ in captions)
    mean.backward()
    assert reported["train_loss"] == pytest.approx(mean.item(), rel=1e-4, abs=1e-6)
    for found, expected in zip(learner.network.decoder.parameters(), decoder.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-6)
    assert decoder.output_bias.grad is not None and decoder.output_bias.grad.abs().max() > 1e-3


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_it_raises_the_reward(baseline: str) -> None:
    config = settings(scst_baseline=baseline, scst_epochs=100, scst_learning_rate=3e-3, scst_samples=40)
    learner = tiny_learner(config, "self_critical", network=half_trained())
    rewards: list[float] = []
    for epoch in range(100):
        learner.train_epoch(epoch, lambda step, metrics: rewards.append(metrics["train/reward"]))
    assert np.mean(rewards[-5:]) > 1.25 * np.mean(rewards[:5])


def test_a_batch_in_parts_reports_the_reward_of_all() -> None:
    config = settings(batch_size=7, images_per_pass=4, scst_samples=2)
    learner = tiny_learner(config, "self_critical")
    learner.self_critical = recording = Recording(config)
    reported: list[float] = []
    learner.train_epoch(0, lambda step, metrics: reported.append(metrics["train/reward"]))
    first, second = (metrics["train/reward"] for _, metrics in recording.given)
    assert first != second
    assert reported == [pytest.approx((3 * first + 4 * second) / 7)]


def test_words_outside_the_vocabulary_never_match() -> None:
    """A reference of unknown words alone: no sample of any words has a reward, whatever <unk> would have."""
    images = [
        CaptionedImage(1, "1.png", ("zebra quagga", "okapi")),
        CaptionedImage(2, "2.png", ("dog runs", "quagga dog")),
    ]
    vocabulary = Vocabulary([*SPECIAL_TOKENS, "dog", "runs"])
    reward = SelfCritical(settings(), images, vocabulary).reward
    assert reward.score(0, [UNKNOWN, UNKNOWN]) == reward.score(0, [UNKNOWN]) == reward.score(1, [UNKNOWN]) == 0
    assert reward.score(1, [4, 5, EOS]) > reward.score(1, [4, 5]) > 0
    plain = CiderD([[["zebra", "quagga", EOS], ["okapi", EOS]], [["dog", "runs", EOS], ["quagga", "dog", EOS]]])
    assert reward.score(1, [4, 5, EOS]) == plain.score(1, ["dog", "runs", EOS])
