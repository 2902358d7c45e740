"""Batched beam search: all images and all beams in one tensor.

Shapes: B images still searched, K beams, V words, T tokens so far, R = B * K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from raycap.errors import ConfigurationError
from raycap.model.config import DecodingConfig
from raycap.model.decoder import Memory, State, Step
from raycap.model.vocabulary import BOS, EOS, PAD, UNKNOWN

NEVER = float("-inf")
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 4}
"""By device: how often it is looked whether images are done. A GPU's look waits for all that was begun before it."""
Features = TypeVar("Features", contravariant=True)


class StepDecoder(Protocol[Features]):
    """What a search or a sampler asks of a `Decoder`, or of several as one."""

    def remember(self, features: Features, /) -> tuple[Memory, State]:
        """As `Decoder.remember`."""

    def step(self, tokens_R: Tensor, state: State, memory: Memory) -> Step:
        """As `Decoder.step`."""


class Hypothesis(NamedTuple):
    """One caption as token ids."""

    tokens: list[int]
    """Word ids, without <bos> and <eos>."""
    log_prob: float
    """Natural logarithm of the probability of the words and the <eos>, as the model gives it."""
    score: float
    """log_prob / num_tokens ** length_penalty: what the search ranks by."""


@torch.inference_mode()
def beam_search(decoder: StepDecoder[Features], features: Features, config: DecodingConfig) -> list[list[Hypothesis]]:
    """The `config.beam_size` best captions of each image, best first; all of one image differ from each other.

    In each step every image keeps its K best unfinished beams; a beam that ends among its image's K best candidates is
    finished. An image is done when it has K finished captions and no unfinished beam scores better than the worst of
    them at its present length. Captions that reach `max_length` words are ended there, at the cost of their <eos>.
    Beam size 1 is greedy decoding.

    Args:
        features: what the decoder remembers of B images; for a `Decoder` floating point [B, P, C], from `Encoder`.

    Returns:
        One list for each image, of 1 to K hypotheses. Fewer than K only if no more captions are allowed, as with a
        tiny vocabulary.

    Raises ConfigurationError if the decoder's scores are not numbers.
    """
    beams, max_length = config.beam_size, config.max_length
    memory, state = decoder.remember(features)
    num_images, device = len(state[0]), state[0].device
    found: list[list[Hypothesis]] = [[] for _ in range(num_images)]
    image_B = list(range(num_images))
    finished = _Finished.none(num_images, config, device)
    # All beams of an image would start equal, so in the first step there is one.
    tokens_BKT = torch.full((num_images, 1, 1), BOS, device=device)
    log_probs_BK = torch.zeros(num_images, 1, device=device)
    steps_between_looks = STEPS_BETWEEN_LOOKS.get(device.type, 1)

    for length in range(1, max_length + 2):  # tokens after this step, <eos> counted
        step = decoder.step(tokens_BKT[:, :, -1].reshape(-1), state, memory)
        scores_BKV = _candidates(step.logits_RV, log_probs_BK, tokens_BKT, config, last=length > max_length)
        # 2K candidates hold K that go on, however many end.
        top_B2K, index_B2K = scores_BKV.flatten(1).topk(min(2 * beams, scores_BKV[0].numel()), -1)
        origin_B2K, word_B2K = index_B2K // scores_BKV.shape[-1], index_B2K % scores_BKV.shape[-1]
        ends_B2K = word_B2K == EOS
        finished = finished.with_ends(tokens_BKT, origin_B2K, top_B2K, ends_B2K, length, config)

        log_probs_BK, rank_BK = top_B2K.masked_fill(ends_B2K, NEVER).topk(min(beams, top_B2K.shape[-1]), -1)
        origin_BK = origin_B2K.gather(1, rank_BK)
        word_BK = word_B2K.gather(1, rank_BK)
        open_B = log_probs_BK[:, 0] / length**config.length_penalty > finished.score_BK[:, -1]
        # What is done stays as it is: nothing more can end there.
        log_probs_BK = log_probs_BK.masked_fill(~open_B[:, None], NEVER)
        going_on_B = torch.arange(len(open_B), device=device)
        if length % steps_between_looks == 0:
            # Done images leave the batch: nothing more is spent on them.
            is_open = open_B.tolist()
            if not all(is_open):
                finished.collect(
                    [None if open_ else found[image] for open_, image in zip(is_open, image_B, strict=True)]
                )
                going_on_B = open_B.nonzero().squeeze(1)
                image_B = [image for open_, image in zip(is_open, image_B, strict=True) if open_]
                origin_BK, word_BK, log_probs_BK = _select((origin_BK, word_BK, log_probs_BK), going_on_B)
                memory, finished = _select(memory, going_on_B), _Finished(*_select(finished, going_on_B))
                if not image_B:
                    break
        row_R = (going_on_B[:, None] * tokens_BKT.shape[1] + origin_BK).flatten()
        state = _select(step.state, row_R)
        history_BKT = tokens_BKT.flatten(0, 1).index_select(0, row_R).view(len(image_B), -1, length)
        tokens_BKT = torch.cat([history_BKT, word_BK[:, :, None]], -1)

    finished.collect([found[image] for image in image_B])
    if not all(found):
        raise ConfigurationError(
            "the decoder's scores are not numbers (NaN): its weights are damaged, or the precision is too low; "
            "try --precision float32"
        )
    return found


class _Finished(NamedTuple):
    """The K best finished captions of each image, best first; a score of -inf where there is none."""

    score_BK: Tensor
    log_prob_BK: Tensor
    words_BKT: Tensor
    """Padded to the longest that is allowed."""

    @classmethod
    def none(cls, num_images: int, config: DecodingConfig, device: torch.device) -> _Finished:
        never_BK = torch.full((num_images, config.beam_size), NEVER, device=device)
        return cls(never_BK, never_BK, torch.full((*never_BK.shape, config.max_length), PAD, device=device))

    def with_ends(
        self,
        tokens_BKT: Tensor,
        origin_B2K: Tensor,
        top_B2K: Tensor,
        ends_B2K: Tensor,
        length: int,
        config: DecodingConfig,
    ) -> _Finished:
        """Also the beams that end among the K best candidates of their image."""
        best_BK = slice(None), slice(config.beam_size)
        log_prob_BK = top_B2K[best_BK].masked_fill(~ends_B2K[best_BK], NEVER)
        ended_BKT = _take(tokens_BKT[:, :, 1:], origin_B2K[best_BK])
        log_prob_B2K = torch.cat([self.log_prob_BK, log_prob_BK], 1)
        score_B2K = torch.cat([self.score_BK, log_prob_BK / length**config.length_penalty], 1)
        words_B2KT = torch.cat([self.words_BKT, F.pad(ended_BKT, (0, config.max_length - length + 1), value=PAD)], 1)
        score_BK, rank_BK = score_B2K.topk(config.beam_size, -1)
        return _Finished(score_BK, log_prob_B2K.gather(1, rank_BK), _take(words_B2KT, rank_BK))

    def collect(self, into: Sequence[list[Hypothesis] | None]) -> None:
        """Append each image's captions to its list, where it has one."""
        for hypotheses, scores, log_probs, captions in zip(into, *(each.tolist() for each in self), strict=True):
            if hypotheses is not None:
                for score, log_prob, words in zip(scores, log_probs, captions, strict=True):
                    if score > NEVER:
                        end = words.index(PAD) if words[-1] == PAD else len(words)
                        hypotheses.append(Hypothesis(words[:end], log_prob, score))


def _candidates(
    logits_RV: Tensor, log_probs_BK: Tensor, tokens_BKT: Tensor, config: DecodingConfig, *, last: bool
) -> Tensor:
    """Log-probability [B, K, V] of every continuation of every beam; forbidden ones are -inf."""
    step_BKV = torch.log_softmax(logits_RV.float(), -1).view(*log_probs_BK.shape, -1)
    if last:
        only_end_BKV = torch.full_like(step_BKV, NEVER)
        only_end_BKV[..., EOS] = step_BKV[..., EOS]
        return only_end_BKV + log_probs_BK[:, :, None]
    # One by one: a list would be copied to a GPU, which waits for all that was begun before it.
    step_BKV[..., PAD] = NEVER
    step_BKV[..., BOS] = NEVER
    if not config.allow_unknown:
        step_BKV[..., UNKNOWN] = NEVER
    if tokens_BKT.shape[-1] == 1:
        step_BKV[..., EOS] = NEVER  # a caption has at least one word
    _block_repeats(step_BKV, tokens_BKT, config.no_repeat_ngram)
    return step_BKV + log_probs_BK[:, :, None]


def _block_repeats(scores_BKV: Tensor, tokens_BKT: Tensor, n: int) -> None:
    """Forbid, in place, every word that would complete an n-gram that its beam already holds."""
    if n == 0 or tokens_BKT.shape[-1] < n:
        return
    windows_BKWn = tokens_BKT.unfold(-1, n, 1)
    last_BK1n = tokens_BKT[:, :, None, tokens_BKT.shape[-1] - n + 1 :]
    repeats_BKW = (windows_BKWn[..., : n - 1] == last_BK1n).all(-1)
    penalty_BKW = torch.where(repeats_BKW, NEVER, 0.0)
    scores_BKV.scatter_add_(-1, windows_BKWn[..., -1], penalty_BKW)


def _take(rows_BKT: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of each image."""
    return rows_BKT.gather(1, index_BK[:, :, None].expand(-1, -1, rows_BKT.shape[-1]))


def _select(tensors: Sequence[Tensor], index: Tensor) -> Memory:
    return tuple(tensor.index_select(0, index) for tensor in tensors)
