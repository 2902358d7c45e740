"""What a stage's learning rate and its average's decay are after so many batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def learning_rate_share(step: int, warmup_steps: int, total_steps: int) -> float:
    """Of the peak: linear warm-up, then a half cosine to 0 (Loshchilov and Hutter 2017, without restarts)."""
    warmup = min(warmup_steps, total_steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """An exponential moving average that forgets the random start faster: its decay climbs to `decay` as
    (1 + n) / (10 + n), n being the number of weights averaged so far."""

    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)

    return average
