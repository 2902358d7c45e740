"""Random captions, drawn word by word from the decoder's distribution.

Shapes: B images, V words, T tokens, R = B * num_samples rows; those of one image are adjacent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycap.model.beam import NEVER, STEPS_BETWEEN_LOOKS, Features, StepDecoder
from raycap.model.vocabulary import BOS, EOS, PAD, UNKNOWN


@torch.no_grad()
def sample(
    decoder: StepDecoder[Features],
    features: Features,
    *,
    num_samples: int,
    max_length: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`num_samples` captions of each image; they may be equal.

    <pad>, <bos> and <unk> are never drawn, nor is <eos> as the first word. A caption of `max_length` words is ended
    there: that <eos> is not drawn.

    Args:
        features: what the decoder remembers of B images; for a `Decoder` floating point [B, P, C], from `Encoder`.
        generator: on the device of the features; by default torch's own.
        temperature: the scores are divided by it; near 0 the search is greedy.
        top_p: only the most probable words whose probabilities sum to at least this are drawn (nucleus sampling,
            Holtzman et al. 2020, section 3.1).

    Returns:
        tokens int64 [R, T], each row words, <eos>, <pad>; and the length of each row int64 [R], its <eos> counted.
    """
    memory, state = decoder.remember(features)
    state = tuple(tensor.repeat_interleave(num_samples, 0) for tensor in state)
    token_R = torch.full((len(state[0]),), BOS, device=state[0].device)
    ended_R = torch.zeros_like(token_R, dtype=torch.bool)
    columns: list[Tensor] = []
    looks_every = STEPS_BETWEEN_LOOKS.get(token_R.device.type, 1)
    for _ in range(max_length):
        step = decoder.step(token_R, state, memory)
        state = step.state
        scores_RV = drawable(step.logits_RV, temperature, num_first=0 if columns else len(token_R))
        probs_RV = _nucleus(torch.softmax(scores_RV, -1), top_p)
        token_R = torch.multinomial(probs_RV, 1, generator=generator).squeeze(1).masked_fill(ended_R, PAD)
        columns.append(token_R)
        ended_R = ended_R | (token_R == EOS)
        if len(columns) % looks_every == 0 and ended_R.all():
            break
    columns.append(torch.where(ended_R, PAD, EOS))
    tokens_RT = torch.stack(columns, 1)
    lengths_R = (tokens_RT != PAD).sum(1)
    return tokens_RT[:, : int(lengths_R.max())], lengths_R


def drawable(logits_RV: Tensor, temperature: float, *, num_first: int) -> Tensor:
    """The scores that words are drawn by, -inf for what is never drawn; the first `num_first` rows are first words'."""
    scores_RV = logits_RV.float() / temperature
    for word in (PAD, BOS, UNKNOWN):  # one by one: GPUs wait for a list
        scores_RV[:, word] = NEVER
    scores_RV[:num_first, EOS] = NEVER
    return scores_RV


def _nucleus(probs_RV: Tensor, top_p: float) -> Tensor:
    """The fewest most probable words that together have at least `top_p`, at least one; the others get 0."""
    if top_p >= 1:
        return probs_RV
    sorted_RV, word_RV = probs_RV.sort(-1, descending=True)
    left_out_RV = sorted_RV.cumsum(-1) - sorted_RV >= top_p
    left_out_RV[:, 0] = False  # whatever a tiny `top_p` rounds to
    return torch.zeros_like(probs_RV).scatter(-1, word_RV, sorted_RV.masked_fill(left_out_RV, 0.0))
