"""Progress lines and TensorBoard of a training run, from its first worker."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.utils.tensorboard import SummaryWriter

from raycap.train.config import TrainConfig

Tell = Callable[[str], None]
"""Takes a line for the user."""


class Monitor:
    """Hears of every batch and epoch."""

    def __init__(self, config: TrainConfig, steps_per_epoch: int, tell: Tell) -> None:
        self.config = config
        self.tell = tell
        self.steps_per_epoch = steps_per_epoch
        self.writer = SummaryWriter(str(config.run_path / "tensorboard"))
        self.last = time.monotonic()
        self.best = 0.0

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """After each batch; `step` counts batches since the run began."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        if time.monotonic() - self.last < self.config.log_every_s:
            return
        self.last = time.monotonic()
        epoch, in_epoch = divmod(step - 1, self.steps_per_epoch)
        rate = metrics["train/images_per_s"]
        left_s = (self.config.epochs * self.steps_per_epoch - step) * self.config.batch_size / rate
        self.tell(
            f"epoch {epoch + 1}/{self.config.epochs}  batch {in_epoch + 1}/{self.steps_per_epoch}  "
            f"loss {metrics['train/loss']:.3f}  {rate:.0f} images/s  {left_s / 60:.0f} min left"
        )

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """After each epoch's validation; `epoch` counts from 0."""
        for name in ("cider_d", "bleu_4"):
            self.writer.add_scalar(f"val/{name}", metrics[name], (epoch + 1) * self.steps_per_epoch)
        self.writer.flush()
        best = " (best so far)" if metrics["cider_d"] > self.best else ""
        self.best = max(self.best, metrics["cider_d"])
        self.tell(
            f"epoch {epoch + 1}/{self.config.epochs} done in {metrics['epoch_s']:.0f} s  "
            f"train loss {metrics['train_loss']:.3f}  validation CIDEr-D {100 * metrics['cider_d']:.1f}  "
            f"BLEU-4 {100 * metrics['bleu_4']:.1f}{best}"
        )
