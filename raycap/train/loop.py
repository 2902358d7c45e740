"""The training loop of one worker in one stage: batches in, a better network out.

Knows nothing of Ray; several workers meet in torch.distributed.

Shapes: B images, N captions, T tokens, M tokens to predict, in order of time, V words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from raycap.errors import ConfigurationError
from raycap.model.captioner import auto_dtype
from raycap.model.decoder import Decoder
from raycap.model.encoder import Encoder
from raycap.model.network import CaptionNetwork
from raycap.train.config import Stage, TrainConfig
from raycap.train.data import Batch, CaptionData, Part, in_order_of_time
from raycap.train.schedule import learning_rate_share, moving_average
from raycap.train.self_critical import SelfCritical

Report = Callable[[int, dict[str, float]], None]
Read = Callable[[Iterable[Part]], Iterator[tuple[Part, Tensor, np.ndarray]]]
"""Parts in; parts with their inputs out (pixels or features of each image) and whether each image was readable."""
LEAST_SCALE = 2.0**-10
"""Of float16 losses. It begins at 65,536 and halves with each overflow; what is not finite below this is none."""


class Scorer(nn.Module):
    """What learns, with one forward for both kinds of input."""

    def __init__(self, encoder: Encoder | None, decoder: Decoder) -> None:
        """`encoder` is None where it stays as it is: then the inputs are its features."""
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, inputs: Tensor, image_N: Tensor, tokens_NT: Tensor, lengths_N: Tensor) -> Tensor:
        """Logits [M, V] of `Decoder.forward`. Inputs are features, or with an encoder pixels."""
        features_BPC = inputs if self.encoder is None else self.encoder(inputs)
        logits_MV, _ = self.decoder(features_BPC, image_N, tokens_NT, lengths_N)
        result: Tensor = logits_MV
        return result


class Learner:
    """A network with the optimizer, learning rate schedule and averaged weights of one stage."""

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        network: CaptionNetwork,
        data: CaptionData,
        read: Read,
        self_critical: SelfCritical | None = None,
    ) -> None:
        """Goes on with the weights of `network`, in place. `self_critical` belongs to the stage of this kind."""
        self.config, self.stage, self.network, self.data, self.read = config, stage, network, data, read
        self.self_critical = self_critical
        self.scorer = Scorer(network.encoder if stage.kind == "fine_tune" else None, network.decoder)
        self.scorer.requires_grad_(True)
        if self.scorer.encoder is not None:
            self.scorer.encoder.freeze(config.frozen_stages)
        self.device = next(network.decoder.parameters()).device
        # gloo and NCCL meet here; a single worker needs no wrapping.
        self.wrapped = DistributedDataParallel(self.scorer) if data.world_size > 1 else self.scorer
        if isinstance(self.wrapped, DistributedDataParallel):
            # They are batch normalisation's statistics, which never move. Not as an argument: torch 2.14 warns of it.
            self.wrapped.broadcast_buffers = False
        groups = [{"params": list(network.decoder.parameters()), "peak": stage.learning_rate}]
        if self.scorer.encoder is not None:
            learning = [parameter for parameter in network.encoder.parameters() if parameter.requires_grad]
            groups.append({"params": learning, "peak": stage.encoder_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.averaged = AveragedModel(self.scorer, multi_avg_fn=moving_average(config.ema_decay))
        self.dtype = training_dtype(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step = 0
        self.epoch_loss, self.epoch_tokens = 0.0, 0.0  # of all workers

    @property
    def averaged_network(self) -> CaptionNetwork:
        """The network with averaged weights, in evaluation mode."""
        scorer = self.averaged.module
        assert isinstance(scorer, Scorer)
        return CaptionNetwork(scorer.encoder or self.network.encoder, scorer.decoder).eval()

    @property
    def total_steps(self) -> int:
        """Batches of the whole stage."""
        return self.data.steps_per_epoch * self.stage.epochs

    def train_epoch(self, epoch: int, report: Report = lambda step, metrics: None) -> dict[str, float]:
        """The rest of an epoch's pass over the data, from batch number `step`; `report(step, metrics)` is called after
        every batch.

        All chance is seeded by seed, stage, batch and worker, so a resumed run goes on exactly as one that was never
        stopped. Raises ConfigurationError if the loss is no longer a number, or if no image of the epoch can be read.
        """
        before = epoch * self.data.steps_per_epoch
        start = self.step - before
        if start == 0:
            self.epoch_loss, self.epoch_tokens = 0.0, 0.0
        started = time.monotonic()
        for part, inputs, readable_B in self.read(self.data.epoch(epoch, start=start)):
            self._seed()
            rate = self._set_learning_rate()
            batches, extra = self._batches(part, inputs.to(self.device), readable_B)
            own_loss, own_tokens, grad_norm = self._optimize(batches)
            own = (own_loss, own_tokens, len(part.images_B), *extra.values())
            loss, num_tokens, num_images, *sums = self._over_workers(*own)
            self.step += 1
            self.epoch_loss, self.epoch_tokens = self.epoch_loss + loss, self.epoch_tokens + num_tokens
            done = self.data.batch_size * (self.step - before - start)
            report(
                self.step,
                {
                    "train/loss": loss / max(num_tokens, 1),
                    "train/learning_rate": rate,
                    "train/grad_norm": grad_norm,
                    "train/images_per_s": done / (time.monotonic() - started),
                    **{name: value / num_images for name, value in zip(extra, sums, strict=True)},
                },
            )
        if self.epoch_tokens == 0:
            raise ConfigurationError(
                f"none of the training images of epoch {epoch + 1} can be read; check that --images is where they are"
            )
        return {"train_loss": self.epoch_loss / self.epoch_tokens, "epoch_s": time.monotonic() - started}

    def _seed(self) -> None:
        """Dropout and samples of the next batch are those of this stage, batch and worker, whatever came before."""
        kinds = ("cross_entropy", "fine_tune", "self_critical")
        key = [self.config.seed, kinds.index(self.stage.kind), self.step, self.data.rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _set_learning_rate(self) -> float:
        share = learning_rate_share(self.step, self.stage.warmup_steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        return self.stage.learning_rate * share

    def _batches(self, part: Part, inputs: Tensor, readable_B: np.ndarray) -> tuple[list[Batch], dict[str, float]]:
        """What this worker learns from in one step; and what else there is to say of it, summed over its images."""
        extra: dict[str, float] = {}
        batches = []
        for images in part.pieces(self.config.images_per_pass):
            piece = Part(part.images_B[images], part.seeds_B[images])
            if self.self_critical is None:
                batches.append(self.data.references(piece, inputs[images], readable_B[images]))
            else:
                self.scorer.train()
                with self._arithmetic():
                    batch, metrics = self.self_critical.samples(self.network.decoder, piece.images_B, inputs[images])
                batches.append(batch)
                for name, value in metrics.items():
                    extra[name] = extra.get(name, 0.0) + len(piece.images_B) * value
        return batches, extra

    def _optimize(self, batches: list[Batch]) -> tuple[float, int, float]:
        """One optimizer step. Returns the sum of the losses of this worker's tokens, their number, and the gradient's
        norm."""
        num_tokens = sum(batch.num_tokens for batch in batches)
        divisor = torch.tensor(float(num_tokens), device=self.device)
        if self.data.world_size > 1:
            # DistributedDataParallel averages gradients over workers; the loss is a mean over all their tokens.
            dist.all_reduce(divisor)
            divisor /= self.data.world_size
        self._training_mode()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, batch in enumerate(batches):
            with self._without_exchange(last=index + 1 == len(batches)):
                loss_sum = self._loss_sum(batch)
                self.scaler.scale(loss_sum / divisor.clamp(min=1)).backward()
            total += loss_sum.item()
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.scorer.parameters(), self.config.max_grad_norm).item()
        # The scaler leaves out a step that overflows, and scales the next ones less.
        may_overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= LEAST_SCALE
        if not (math.isfinite(grad_norm) or may_overflow):
            raise ConfigurationError(
                f"training diverged: at batch {self.step + 1} the loss is {total / max(num_tokens, 1)} and its "
                f"gradient's norm {grad_norm}; lower the learning rate, now {self.stage.learning_rate}"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.averaged.update_parameters(self.scorer)
        return total, num_tokens, grad_norm

    def _over_workers(self, *sums: float) -> list[float]:
        """This worker's sums as those of all."""
        if self.data.world_size == 1:
            return list(sums)
        sums_of_all = torch.tensor(sums, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums_of_all)
        result: list[float] = sums_of_all.tolist()
        return result

    def _training_mode(self) -> None:
        self.wrapped.train()
        if self.scorer.encoder is not None:
            self.scorer.encoder.eval()  # batch normalisation keeps its ImageNet statistics: batches are small

    def _without_exchange(self, *, last: bool) -> Any:
        """Workers exchange gradients once a step, with the last part of the batch."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _loss_sum(self, batch: Batch) -> Tensor:
        """Sum over the captions' tokens of weight times cross-entropy."""
        image_N, tokens_NT = batch.image_N.to(self.device), batch.tokens_NT.to(self.device)
        caption_M, targets_M = in_order_of_time(tokens_NT, batch.lengths_N)
        with self._arithmetic():
            inputs_NT = self._own_words(batch, image_N, tokens_NT)
        # Not in the same context: until torch 2.10 weights that autocast has cast without gradients stay without.
        with self._arithmetic():
            logits_MV = self.wrapped(batch.inputs, image_N, inputs_NT, batch.lengths_N)
        logits_MV = logits_MV.float()
        if self.self_critical is None:
            losses_M = F.cross_entropy(
                logits_MV, targets_M, reduction="none", label_smoothing=self.config.label_smoothing
            )
        else:
            scores_MV = self.self_critical.logits(logits_MV, num_captions=len(batch.lengths_N))
            losses_M = F.cross_entropy(scores_MV, targets_M, reduction="none")
        return (losses_M * batch.weights_N.to(self.device)[caption_M]).sum()

    @torch.no_grad()
    def _own_words(self, batch: Batch, image_N: Tensor, tokens_NT: Tensor) -> Tensor:
        """Scheduled sampling: the tokens with some words replaced by what the model would say there."""
        share = self.config.scheduled_sampling * self.step / self.total_steps
        if share == 0 or self.self_critical is not None:
            return tokens_NT
        logits_MV = self.scorer(batch.inputs, image_N, tokens_NT, batch.lengths_N)
        drawn_M = torch.multinomial(torch.softmax(logits_MV.float(), -1), 1).squeeze(1)
        own_NT = tokens_NT.clone()
        place_NT = torch.arange(tokens_NT.numel(), device=self.device).view_as(tokens_NT)
        _, place_M = in_order_of_time(place_NT, batch.lengths_N)
        chosen_M = torch.rand(drawn_M.shape, device=self.device) < share
        own_NT.view(-1)[place_M[chosen_M]] = drawn_M[chosen_M]
        return own_NT

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs."""
        return {
            "scorer": self.scorer.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch_loss": self.epoch_loss,
            "epoch_tokens": self.epoch_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with any number of workers."""
        for name in ("scorer", "averaged", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for group in self.optimizer.param_groups:
            group["fused"] = True  # as here, not as where the state was saved
        self.step, self.epoch_loss, self.epoch_tokens = state["step"], state["epoch_loss"], state["epoch_tokens"]


def training_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Of the arithmetic of forward and backward."""
    if config.precision == "auto":
        return auto_dtype(device)
    dtype: torch.dtype = getattr(torch, config.precision)
    return dtype
