"""Batched beam search: all images and all beams in one tensor.

Shapes: B images still searched, K beams, V words, T tokens so far, R = B * K rows.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from raycap.errors import ConfigurationError
from raycap.model.config import DecodingConfig
from raycap.model.decoder import Memory, State, Step
from raycap.model.vocabulary import BOS, EOS, PAD, UNKNOWN

NEVER = float("-inf")
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
    beams = config.beam_size
    memory, state = decoder.remember(features)
    num_images, device = len(state[0]), state[0].device
    state = tuple(tensor.repeat_interleave(beams, 0) for tensor in state)
    tokens_BKT = torch.full((num_images, beams, 1), BOS, device=device)
    # All beams of an image start equal, so only the first is continued in the first step: that keeps captions distinct.
    log_probs_BK = torch.full((num_images, beams), NEVER, device=device, dtype=torch.float32)
    log_probs_BK[:, 0] = 0.0
    finished = [_Finished(beams) for _ in range(num_images)]
    image_B = list(range(num_images))

    for length in range(1, config.max_length + 2):  # tokens after this step, <eos> counted
        step = decoder.step(tokens_BKT[:, :, -1].reshape(-1), state, memory)
        scores_BKV = _candidates(step.logits_RV, log_probs_BK, tokens_BKT, config, last=length > config.max_length)
        # 2K candidates hold K that go on, however many end.
        top_B2K, index_B2K = scores_BKV.flatten(1).topk(min(2 * beams, scores_BKV[0].numel()), -1)
        origin_B2K, word_B2K = index_B2K // scores_BKV.shape[-1], index_B2K % scores_BKV.shape[-1]
        ends_B2K = word_B2K == EOS
        _collect(finished, image_B, tokens_BKT, origin_B2K, top_B2K, ends_B2K, length, config)

        log_probs_BK, rank_BK = top_B2K.masked_fill(ends_B2K, NEVER).topk(beams, -1)
        origin_BK = origin_B2K.gather(1, rank_BK)
        word_BK = word_B2K.gather(1, rank_BK)
        best_B = (log_probs_BK[:, 0] / length**config.length_penalty).tolist()
        open_ = [b for b, image in enumerate(image_B) if best_B[b] > finished[image].bar]
        if not open_:
            break
        # Done images leave the batch: nothing is spent on them.
        open_B = torch.tensor(open_, device=device)
        image_B = [image_B[b] for b in open_]
        if len(open_) < len(log_probs_BK):
            origin_BK, word_BK, log_probs_BK = (x.index_select(0, open_B) for x in (origin_BK, word_BK, log_probs_BK))
            memory = _select(memory, open_B)
        row_R = (open_B[:, None] * beams + origin_BK).flatten()
        state = _select(step.state, row_R)
        history_BKT = tokens_BKT.flatten(0, 1).index_select(0, row_R).view(len(open_), beams, -1)
        tokens_BKT = torch.cat([history_BKT, word_BK[:, :, None]], -1)

    if not all(pool.hypotheses for pool in finished):
        raise ConfigurationError(
            "the decoder's scores are not numbers (NaN): its weights are damaged, or the precision is too low; "
            "try --precision float32"
        )
    return [pool.hypotheses for pool in finished]


class _Finished:
    """The K best finished hypotheses of one image, best first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.hypotheses: list[Hypothesis] = []

    def add(self, hypothesis: Hypothesis) -> None:
        self.hypotheses.append(hypothesis)
        self.hypotheses.sort(key=lambda h: -h.score)
        del self.hypotheses[self.size :]

    @property
    def bar(self) -> float:
        """The score that an unfinished beam must beat to be worth continuing."""
        return self.hypotheses[-1].score if len(self.hypotheses) == self.size else NEVER


def _candidates(
    logits_RV: Tensor, log_probs_BK: Tensor, tokens_BKT: Tensor, config: DecodingConfig, *, last: bool
) -> Tensor:
    """Log-probability [B, K, V] of every continuation of every beam; forbidden ones are -inf."""
    step_BKV = torch.log_softmax(logits_RV.float(), -1).view(*log_probs_BK.shape, -1)
    if last:
        only_end_BKV = torch.full_like(step_BKV, NEVER)
        only_end_BKV[..., EOS] = step_BKV[..., EOS]
        return only_end_BKV + log_probs_BK[:, :, None]
    step_BKV[..., [PAD, BOS]] = NEVER
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


def _collect(
    finished: list[_Finished],
    image_B: list[int],
    tokens_BKT: Tensor,
    origin_B2K: Tensor,
    top_B2K: Tensor,
    ends_B2K: Tensor,
    length: int,
    config: DecodingConfig,
) -> None:
    """Move the beams that end among the K best candidates of their image to its finished hypotheses."""
    best_BK = slice(None), slice(config.beam_size)
    for b, rank in (ends_B2K[best_BK] & (top_B2K[best_BK] > NEVER)).nonzero().tolist():
        log_prob = top_B2K[b, rank].item()
        words = tokens_BKT[b, origin_B2K[b, rank], 1:].tolist()
        finished[image_B[b]].add(Hypothesis(words, log_prob, log_prob / length**config.length_penalty))


def _select(tensors: Memory, index: Tensor) -> Memory:
    return tuple(tensor.index_select(0, index) for tensor in tensors)
