"""Slow, obviously correct twins of the model's fast paths: one image and one beam at a time, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raycap.model.beam import Hypothesis
from raycap.model.config import DecodingConfig
from raycap.model.decoder import Decoder, State
from raycap.model.vocabulary import BOS, EOS, PAD, UNKNOWN


class Beam(NamedTuple):
    """An unfinished caption, with each decoder's state before its last token is read."""

    tokens: list[int]
    """With <bos>, without <eos>."""
    log_prob: float
    states: list[State]


def naive_beam_search(decoder: Decoder, features_1PC: Tensor, config: DecodingConfig) -> list[Hypothesis]:
    """The rules of `beam_search` for one image: every beam is a Python object, and reads its token alone."""
    return naive_ensemble_search([decoder], [features_1PC], config)


@torch.inference_mode()
def naive_ensemble_search(
    decoders: Sequence[Decoder], features: Sequence[Tensor], config: DecodingConfig
) -> list[Hypothesis]:
    """As `naive_beam_search`, with the mean of the words' probabilities of several decoders."""
    remembered = [decoder.remember(features_1PC) for decoder, features_1PC in zip(decoders, features, strict=True)]
    beams = [Beam([BOS], 0.0, [state for _, state in remembered])]
    finished: list[Hypothesis] = []
    for num_tokens in range(1, config.max_length + 2):
        candidates: list[tuple[float, int, Beam]] = []
        for beam in beams:
            steps = [
                decoder.step(torch.tensor(beam.tokens[-1:]), state, memory)
                for decoder, (memory, _), state in zip(decoders, remembered, beam.states, strict=True)
            ]
            read = beam._replace(states=[step.state for step in steps])
            probs_of_members = [torch.softmax(step.logits_RV[0].double(), -1).tolist() for step in steps]
            for word, probs in enumerate(zip(*probs_of_members, strict=True)):
                if allowed(word, beam.tokens, config):
                    candidates.append((beam.log_prob + math.log(sum(probs) / len(probs)), word, read))
        candidates.sort(key=lambda candidate: -candidate[0])
        for log_prob, word, beam in candidates[: config.beam_size]:
            if word == EOS:
                score = log_prob / num_tokens**config.length_penalty
                finished.append(Hypothesis(beam.tokens[1:], log_prob, score))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[: config.beam_size]
        going_on = [candidate for candidate in candidates if candidate[1] != EOS][: config.beam_size]
        beams = [Beam([*beam.tokens, word], log_prob, beam.states) for log_prob, word, beam in going_on]
        if not beams:
            break
        best_unfinished = beams[0].log_prob / num_tokens**config.length_penalty
        if len(finished) == config.beam_size and best_unfinished <= finished[-1].score:
            break
    return finished


def allowed(word: int, tokens: list[int], config: DecodingConfig) -> bool:
    """Whether `word` may follow `tokens` (<bos> and words)."""
    num_words = len(tokens) - 1
    if num_words == config.max_length:
        return word == EOS
    if word in (PAD, BOS) or (word == UNKNOWN and not config.allow_unknown) or (word == EOS and num_words == 0):
        return False
    n = config.no_repeat_ngram
    longer = [*tokens, word]
    ngrams = [tuple(longer[start : start + n]) for start in range(len(longer) - n + 1)]
    return n == 0 or len(tokens) < n or ngrams[-1] not in ngrams[:-1]


def naive_logits(decoder: Decoder, features_1PC: Tensor, tokens: list[int]) -> list[Tensor]:
    """Scores [V] of each next token of one caption, <bos> and <eos> included in `tokens`, step by step."""
    memory, state = decoder.remember(features_1PC)
    logits = []
    for token in tokens[:-1]:
        step = decoder.step(torch.tensor([token]), state, memory)
        state = step.state
        logits.append(step.logits_RV[0])
    return logits


@torch.inference_mode()
def naive_attention(decoder: Decoder, features_1PC: Tensor, words: list[int]) -> list[list[float]]:
    """Weights of the grid cells for each word of one caption, and for its end."""
    memory, state = decoder.remember(features_1PC)
    weights = []
    for token in [BOS, *words]:
        step = decoder.step(torch.tensor([token]), state, memory)
        assert step.attention_RP is not None
        state = step.state
        weights.append(step.attention_RP[0].tolist())
    return weights


def naive_loss_sum(decoder: Decoder, features_1PC: Tensor, tokens: list[int], *, label_smoothing: float) -> float:
    """Sum over one caption's tokens of the cross-entropy with a smoothed target (Szegedy et al. 2016, section 7)."""
    total = 0.0
    for logits_V, target in zip(naive_logits(decoder, features_1PC, tokens), tokens[1:], strict=True):
        log_norm = math.log(sum(math.exp(x) for x in logits_V.tolist()))
        log_probs = [x - log_norm for x in logits_V.tolist()]
        for word, log_prob in enumerate(log_probs):
            share = label_smoothing / len(log_probs) + (1 - label_smoothing) * (word == target)
            total -= share * log_prob
    return total


def naive_log_prob(decoder: Decoder, features_1PC: Tensor, words: list[int]) -> float:
    """The log-probability of a caption and its <eos> under the model, by teacher forcing."""
    return -naive_loss_sum(decoder, features_1PC, [BOS, *words, EOS], label_smoothing=0.0)
