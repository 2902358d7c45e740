"""Progress lines and TensorBoard of a training run, from its first worker."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from raycap.errors import ObjectError, StorageError
from raycap.evaluate.overlay import attention_strip
from raycap.images import decode_image
from raycap.model.beam import beam_search
from raycap.model.network import CaptionNetwork, attention_maps
from raycap.storage import is_s3, open_store
from raycap.train.config import Stage
from raycap.train.job import Job

Tell = Callable[[str], None]
"""Takes a line for the user."""

NUM_SAMPLE_IMAGES = 4
TENSORBOARD = "tensorboard"


class Monitor:
    """Hears of every batch, epoch and checkpoint."""

    def __init__(self, job: Job, tell: Tell) -> None:
        self.job, self.config, self.tell = job, job.config, tell
        path = f"{self.config.run_path}/{TENSORBOARD}"
        # TensorBoard writes to disks alone: what goes to S3 is copied there before each checkpoint.
        self.copies_to = open_store(path, self.config.s3) if is_s3(path) else None
        self.directory = Path(tempfile.mkdtemp(prefix="raycap-tensorboard-") if self.copies_to else path)
        self.last = time.monotonic()
        self.first_step = 0
        self.samples: list[tuple[str, np.ndarray]] | None = None

    def begin(self, stage: Stage, steps_per_epoch: int, step: int) -> None:
        """A stage begins, or goes on after batch number `step`."""
        self.stage, self.steps_per_epoch = stage, steps_per_epoch
        kinds = [each.kind for each in self.config.stages]
        before = self.config.stages[: kinds.index(stage.kind)]
        most_steps = max(1, len(self.job.train_images) // self.config.batch_size)  # of a stage that can read them all
        self.first_step = sum(each.epochs for each in before) * most_steps
        # What a lost worker has written since the checkpoint comes again.
        self.writer = SummaryWriter(str(self.directory), purge_step=self.first_step + step + 1)

    def on_encoding(self, location: str, done: int, total: int) -> None:
        """While features are computed."""
        if done == total or self._is_time():
            share = " of worker 0's share" if self.config.num_workers > 1 else ""
            self.tell(f"encoding the images of {location}: {done} of {total}{share}")

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """After each batch; `step` counts batches since the stage began."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, self.first_step + step)
        if not self._is_time():
            return
        epoch, in_epoch = divmod(step - 1, self.steps_per_epoch)
        rate = metrics["train/images_per_s"]
        left_s = (self.stage.epochs * self.steps_per_epoch - step) * self.config.batch_size / rate
        learned = (
            f"reward {metrics['train/reward']:.3f}"
            if "train/reward" in metrics
            else f"loss {metrics['train/loss']:.3f}"
        )
        self.tell(
            f"{self.stage.kind} epoch {epoch + 1}/{self.stage.epochs}  batch {in_epoch + 1}/{self.steps_per_epoch}  "
            f"{learned}  {rate:.0f} images/s  {left_s / 60:.0f} min left"
        )

    def _is_time(self) -> bool:
        if time.monotonic() - self.last < self.config.log_every_s:
            return False
        self.last = time.monotonic()
        return True

    def on_epoch(self, epoch: int, metrics: dict[str, Any], *, improved: bool, network: CaptionNetwork) -> None:
        """After each epoch's validation; `epoch` counts finished epochs of the stage."""
        step = self.first_step + epoch * self.steps_per_epoch
        for name in ("cider_d", "bleu_4"):
            self.writer.add_scalar(f"val/{name}", metrics[name], step)
        self._draw_samples(network, step)
        self.tell(
            f"{self.stage.kind} epoch {epoch}/{self.stage.epochs} done in {metrics['epoch_s']:.0f} s  "
            f"train loss {metrics['train_loss']:.3f}  validation CIDEr-D {100 * metrics['cider_d']:.1f}  "
            f"BLEU-4 {100 * metrics['bleu_4']:.1f}{' (best so far)' if improved else ''}"
        )

    def _draw_samples(self, network: CaptionNetwork, step: int) -> None:
        """Captions of a few validation images, with where the decoder looked for each word."""
        if self.samples is None:
            self.samples = self._read_samples()
        vocabulary = self.job.start.vocabulary
        device = next(network.parameters()).device
        for name, pixels_HWC in self.samples:
            with torch.inference_mode():
                features_1PC = network.encoder(torch.from_numpy(pixels_HWC)[None].to(device))
            tokens = beam_search(network.decoder, features_1PC, self.config.decoding)[0][0].tokens
            caption = vocabulary.decode(tokens)
            self.writer.add_text(f"captions/{name}", caption, step)
            maps = attention_maps(network.decoder, features_1PC, [tokens])
            picture = (
                pixels_HWC if maps is None else attention_strip(pixels_HWC, caption.split(), maps[0].cpu().numpy())
            )
            self.writer.add_image(f"attention/{name}", np.asarray(picture), step, dataformats="HWC")

    def _read_samples(self) -> list[tuple[str, np.ndarray]]:
        samples: list[tuple[str, np.ndarray]] = []
        for image in self.job.val_images[: 2 * NUM_SAMPLE_IMAGES]:  # a few of them may be unreadable
            try:
                data = self.job.val_store.read(image.file_name)
                samples.append((image.file_name, decode_image(data, self.job.start.preprocessing).pixels_HWC))
            except ObjectError:
                continue
        return samples[:NUM_SAMPLE_IMAGES]

    def on_checkpoint(self) -> None:
        """Before each checkpoint: a training that goes on from there needs the curves up to it."""
        self.writer.flush()
        if self.copies_to is None:
            return
        try:
            for path in self.directory.iterdir():
                self.copies_to.write(path.name, path.read_bytes())
        except StorageError as error:  # no reason to stop a training
            self.tell(f"the TensorBoard files are not up to date: {error}")

    def end(self) -> None:
        """The stage is over."""
        self.writer.close()
