"""The training loop of one worker: batches in, a better decoder out.

Knows nothing of Ray; several workers meet in torch.distributed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from raycap.errors import ConfigurationError
from raycap.model.beam import beam_search
from raycap.model.config import DecodingConfig
from raycap.model.decoder import Decoder
from raycap.model.vocabulary import Vocabulary
from raycap.train.config import TrainConfig
from raycap.train.data import Batch, CaptionData
from raycap.train.features import Features

Report = Callable[[int, dict[str, float]], None]


class Learner:
    """A decoder with its optimizer, learning rate schedule and averaged weights."""

    def __init__(
        self, config: TrainConfig, decoder: Decoder, data: CaptionData, wrapped: nn.Module | None = None
    ) -> None:
        """`wrapped` is the decoder as the workers share it (DistributedDataParallel); by default the decoder itself."""
        self.config = config
        self.decoder = decoder
        self.data = data
        self.wrapped = wrapped or decoder
        self.device = next(decoder.parameters()).device
        self.optimizer = torch.optim.AdamW(
            decoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.averaged = AveragedModel(decoder, avg_fn=moving_average(config.ema_decay))
        self.step = 0

    @property
    def best_decoder(self) -> Decoder:
        """The decoder with averaged weights, in evaluation mode."""
        averaged = self.averaged.module.eval()
        assert isinstance(averaged, Decoder)
        return averaged

    def train_epoch(self, epoch: int, report: Report = lambda step, metrics: None) -> dict[str, float]:
        """One pass over the data; `report(step, metrics)` is called after every batch.

        Dropout is seeded by (seed, epoch, rank), so a resumed run goes on exactly as one that was never stopped.
        Raises ConfigurationError if the loss is no longer a number.
        """
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, epoch, self.data.rank]).generate_state(1)[0]))
        self.wrapped.train()
        total_loss, total_tokens, started = 0.0, 0, time.monotonic()
        for batch in self.data.epoch(epoch):
            rate = learning_rate(self.step, self.config, self.data.steps_per_epoch * self.config.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, grad_norm = self._train_batch(batch)
            self.step += 1
            total_loss, total_tokens = total_loss + loss * batch.num_tokens, total_tokens + batch.num_tokens
            images = self.data.batch_size * (self.step - epoch * self.data.steps_per_epoch)
            report(
                self.step,
                {
                    "train/loss": loss,
                    "train/learning_rate": rate,
                    "train/grad_norm": grad_norm,
                    "train/images_per_s": images / (time.monotonic() - started),
                },
            )
        return {"train_loss": total_loss / max(total_tokens, 1), "epoch_s": time.monotonic() - started}

    def _train_batch(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step. Returns the mean loss of a token of this worker's batch and the gradient's norm."""
        loss_sum = self._loss_sum(batch)
        num_tokens = torch.tensor(float(batch.num_tokens), device=self.device)
        if self.data.world_size > 1:
            # DistributedDataParallel averages gradients over workers; the loss is a mean over all their tokens.
            dist.all_reduce(num_tokens)
            num_tokens /= self.data.world_size
        self.optimizer.zero_grad(set_to_none=True)
        (loss_sum / num_tokens).backward()
        grad_norm = nn.utils.clip_grad_norm_(self.decoder.parameters(), self.config.max_grad_norm)
        if not math.isfinite(grad_norm.item()):
            raise ConfigurationError(
                f"training diverged: at batch {self.step + 1} the loss is {loss_sum.item() / batch.num_tokens} and its "
                f"gradient's norm {grad_norm.item()}; lower --learning-rate, now {self.config.learning_rate}"
            )
        self.optimizer.step()
        self.averaged.update_parameters(self.decoder)
        return loss_sum.item() / batch.num_tokens, grad_norm.item()

    def _loss_sum(self, batch: Batch) -> Tensor:
        logits_MV, targets_M = self.wrapped(
            batch.features_BPC.to(self.device),
            batch.image_N.to(self.device),
            batch.tokens_NT.to(self.device),
            batch.lengths_N,
        )
        return F.cross_entropy(logits_MV, targets_M, label_smoothing=self.config.label_smoothing, reduction="sum")

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs."""
        return {
            "decoder": self.decoder.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.decoder.load_state_dict(state["decoder"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """Linear warm-up, then a half cosine to 0 (Loshchilov and Hutter 2017, without restarts)."""
    warmup = min(config.warmup_steps, total_steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An exponential moving average that forgets the random start faster: its decay climbs to `decay` as
    (1 + n) / (10 + n), n being the number of weights averaged so far."""

    def average(averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        n = int(num_averaged)
        return averaged.lerp(current, 1 - min(decay, (1 + n) / (10 + n)))

    return average


def caption_features(
    decoder: Decoder,
    features: Features,
    rows: Sequence[int],
    vocabulary: Vocabulary,
    decoding: DecodingConfig,
    *,
    batch_size: int = 64,
) -> list[str]:
    """Captions of cached images, one for each row, by beam search."""
    decoder.eval()
    device = next(decoder.parameters()).device
    captions = []
    for start in range(0, len(rows), batch_size):
        features_BPC = features.batch(np.asarray(rows[start : start + batch_size])).to(device)
        captions += [
            vocabulary.decode(hypotheses[0].tokens) for hypotheses in beam_search(decoder, features_BPC, decoding)
        ]
    return captions
