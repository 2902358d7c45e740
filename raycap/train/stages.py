"""A training from its first stage to its last, as one worker sees it: learn, validate, checkpoint, keep the best.

Knows nothing of Ray: what it needs of the place it runs in is a `Place`.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raycap.coco import CaptionedImage
from raycap.errors import ConfigurationError, ObjectError
from raycap.evaluate import score_captions
from raycap.images import decode_image
from raycap.model.beam import beam_search
from raycap.model.network import CaptionNetwork
from raycap.readahead import read_ahead
from raycap.storage import Store, open_store
from raycap.train.config import Stage
from raycap.train.data import CaptionData, read_features
from raycap.train.export import Best, read_state, write_state
from raycap.train.features import Features, compute_features
from raycap.train.job import Job
from raycap.train.loop import Learner, Read
from raycap.train.monitor import Monitor, Tell
from raycap.train.self_critical import SelfCritical
from raycap.train.workers import Workers

BATCH_SIZE = 64
"""Validation images captioned at a time."""
READ_THREADS = 4
NOT_VALIDATED = -1.0
"""CIDEr-D of a checkpoint within an epoch: Ray Train ranks checkpoints by it."""
UNUSABLE = "unusable-images.json"
"""Below the run's directory: images that are missing, broken or could not be read, and why."""
Split = Literal["training", "validation"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a worker runs."""

    rank: int = 0
    world_size: int = 1
    device: torch.device
    cache_dir: Path
    """Of this machine, for copies of a feature cache that is on S3."""
    tell: Tell
    """Takes a line for the user. From the first worker alone, they need to be said once."""
    report: Callable[[dict[str, Any], Path | None], None]
    """All workers call it together; the first one with a directory, which becomes a checkpoint."""
    resume_from: Path | None = None
    """A checkpoint's directory."""
    read_pixels: Callable[[Job, dict[str, str]], Read]
    """Images as pixels, augmented, while the CNN learns; the dictionary takes note of those that cannot be used."""


def run_stages(job: Job, place: Place) -> None:
    """Train through all stages. The last checkpoint holds the best network."""
    _Training(job, place).run()


class _Training:
    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place, self.config = job, place, job.config
        self.workers = Workers(place.rank, place.world_size)
        self.state = self._read_state()
        self.best = Best(**self.state["best"]) if self.state and self.state["best"] else None
        self.monitor = Monitor(job, place.tell) if place.rank == 0 else None
        self.unusable: dict[Split, dict[str, str]] = {"training": {}, "validation": {}}
        self.failed: dict[Split, dict[str, str]] = {"training": {}, "validation": {}}  # those of this worker alone

    def _best_network(self) -> CaptionNetwork:
        """The network that a stage begins with."""
        network = self.best.network(self.job.start) if self.best else copy.deepcopy(self.job.start.single)
        return network.to(self.place.device)

    def _read_state(self) -> dict[str, Any] | None:
        """The state to resume from. Raises ConfigurationError if it is another run's: its weights would pass for those
        of the present settings."""
        if self.place.resume_from is None:
            return None
        state = read_state(self.place.resume_from, self.place.device)
        now, before = self.job.identity, state["identity"]
        if changed := [name for name in now if before.get(name) != now[name]]:
            what = ", ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in changed)
            raise ConfigurationError(
                f"the run {self.config.run_name} in {self.config.run_root} has begun with other settings ({what}); "
                "give the same ones to resume it, or another --name"
            )
        return state

    def run(self) -> None:
        self.workers.check_shared(open_store(self.config.run_path, self.config.s3))
        stages = self.config.stages
        reached = [stage.kind for stage in stages].index(self.state["stage"]) if self.state else 0
        if self.state and self.state["stage_done"]:
            self._tell_resuming(f"after all epochs ({self.state['stage']})")
        for index, stage in enumerate(stages):
            resumed = self.state if index == reached else None
            if index >= reached and not (resumed and resumed["stage_done"]):
                self.network = self._best_network()
                self._run_stage(stage, resumed)

    def _tell_resuming(self, where: str) -> None:
        if self.place.rank == 0:
            self.place.tell(
                f"resuming {where} with {self.place.world_size} worker{'s' if self.place.world_size > 1 else ''}"
            )

    def _run_stage(self, stage: Stage, resumed: dict[str, Any] | None) -> None:
        learner, validation = self._prepare(stage)
        epoch, since_best = 0, 0
        if resumed is not None:
            learner.load_state_dict(resumed["learner"])
            epoch, since_best = resumed["epoch"], resumed["since_best"]
            within = learner.step - epoch * learner.data.steps_per_epoch
            where = f"after epoch {epoch}" if within == 0 else f"in epoch {epoch + 1}, after {within} batches"
            self._tell_resuming(f"{where} of {stage.epochs} ({stage.kind})")
        elif self.best is None and self.config.init is not None:
            self._consider(self.network, validation, stage, 0)
        if self.monitor:
            self.monitor.begin(stage, learner.data.steps_per_epoch, learner.step)

        def state(epoch: int, *, done: bool) -> dict[str, Any]:
            return {
                "identity": self.job.identity, "stage": stage.kind, "stage_done": done, "epoch": epoch,
                "since_best": since_best, "best": self.best and vars(self.best), "learner": learner.state_dict(),
            }  # fmt: skip

        def after_batch(step: int, metrics: dict[str, float]) -> None:
            if self.monitor:
                self.monitor.on_step(step, metrics)
            every, within = self.config.checkpoint_every, step % learner.data.steps_per_epoch
            if every and within and within % every == 0:
                self._checkpoint(state(epoch, done=False), {"stage": stage.kind, "cider_d": NOT_VALIDATED})

        while epoch < stage.epochs:
            metrics: dict[str, Any] = {"stage": stage.kind, "epoch": epoch + 1}
            metrics |= learner.train_epoch(epoch, after_batch)
            self._name_unusable("training")
            scores, improved = self._consider(learner.averaged_network, validation, stage, epoch + 1)
            since_best = 0 if improved else since_best + 1
            epoch += 1
            if self.monitor:
                self.monitor.on_epoch(epoch, metrics | scores, improved=improved, network=learner.averaged_network)
            patient = self.config.patience is None or since_best < self.config.patience
            self._checkpoint(state(epoch, done=epoch == stage.epochs or not patient), metrics | scores)
            if not patient:
                if self.place.rank == 0:
                    self.place.tell(f"no better validation CIDEr-D in {since_best} epochs: this stage ends")
                break
        if self.monitor:
            self.monitor.end()

    def _checkpoint(self, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        if self.monitor is None:
            self.place.report({}, None)
            return
        self.monitor.on_checkpoint()
        with tempfile.TemporaryDirectory() as directory:
            write_state(Path(directory), state)
            self.place.report(metrics, Path(directory))

    def _prepare(self, stage: Stage) -> tuple[Learner, Callable[[CaptionNetwork], Iterator[tuple[list[int], Tensor]]]]:
        """The stage's learner, and what gives the features of validation images."""
        job, place, frozen = self.job, self.place, stage.kind != "fine_tune"
        failed: dict[str, str] = {}
        read: Read
        if frozen:
            train = self._features("training", job.train_images, job.train_store, flip=self.config.flip)
            val = self._features("validation", job.val_images, job.val_store, flip=False)
            failed, read = train.failed, partial(read_features, train, place.device.type == "cuda")
        else:
            read = place.read_pixels(job, self.failed["training"])
        data = CaptionData.encode(
            job.train_images, job.start.vocabulary, max_length=self.config.max_length, failed=failed,
            batch_size=self.config.batch_size, rank=place.rank, world_size=place.world_size, seed=self.config.seed,
        )  # fmt: skip
        self_critical = (
            SelfCritical(self.config, job.train_images, job.start.vocabulary) if stage.kind == "self_critical" else None
        )
        learner = Learner(self.config, stage, self.network, data, read, self_critical)
        return learner, partial(self._cached_validation, val) if frozen else self._fresh_validation

    def _features(self, split: Split, images: list[CaptionedImage], store: Store, *, flip: bool) -> Features:
        """The cached features of these images; all workers compute them together."""

        def progress(done: int, total: int) -> None:
            if self.monitor:
                self.monitor.on_encoding(store.location, done, total)

        features = compute_features(
            self.network.encoder.eval(),
            self.job.start.preprocessing,
            store,
            [image.file_name for image in images],
            open_store(self.config.features_path, self.config.s3),
            local_dir=self.place.cache_dir,
            flip=flip,
            rank=self.place.rank,
            world_size=self.place.world_size,
            from_first=self.workers.from_first,
            barrier=self.workers.barrier,
            progress=progress,
        )
        self.failed[split] |= features.failed
        self._name_unusable(split)
        if len(features.failed) == len(images):
            reason = next(iter(features.failed.values()))
            raise ConfigurationError(f"none of the {len(images)} images in {store.location} can be read: {reason}")
        return features

    def _cached_validation(self, features: Features, network: CaptionNetwork) -> Iterator[tuple[list[int], Tensor]]:
        """This worker's share of the validation images and their features [B, P, C], from the cache."""
        usable = [row for row, image in enumerate(self.job.val_images) if image.file_name not in features.failed]
        for rows in _chunks(usable[self.place.rank :: self.place.world_size]):
            yield rows, features.batch(np.asarray(rows)).to(self.place.device)

    def _fresh_validation(self, network: CaptionNetwork) -> Iterator[tuple[list[int], Tensor]]:
        """The same by the network's own encoder."""
        rows = range(self.place.rank, len(self.job.val_images), self.place.world_size)
        names = [self.job.val_images[row].file_name for row in rows]

        def pixels(data: bytes) -> np.ndarray:
            return decode_image(data, self.job.start.preprocessing).pixels_HWC

        batches = read_ahead(self.job.val_store, names, pixels, batch_size=BATCH_SIZE, num_threads=READ_THREADS)
        for batch in batches:
            failed = {
                names[index]: f"{error.code}: {error}" for index, error in batch if isinstance(error, ObjectError)
            }
            self.failed["validation"] |= failed
            good = [(rows[index], image) for index, image in batch if not isinstance(image, ObjectError)]
            if good:
                pixels_BHWC = torch.from_numpy(np.stack([image for _, image in good])).to(self.place.device)
                with torch.inference_mode():
                    yield [row for row, _ in good], network.encoder(pixels_BHWC)

    def _consider(
        self,
        network: CaptionNetwork,
        validation: Callable[[CaptionNetwork], Iterator[tuple[list[int], Tensor]]],
        stage: Stage,
        epoch: int,
    ) -> tuple[dict[str, float], bool]:
        """Score the network on the validation images, by all workers together; remember it if it is the best so far."""
        network = network.to(self.place.device).eval()
        captions: dict[int, str] = {}
        for rows, features_BPC in validation(network):
            found = beam_search(network.decoder, features_BPC, self.config.decoding)
            for row, hypotheses in zip(rows, found, strict=True):
                captions[self.job.val_images[row].image_id] = self.job.start.vocabulary.decode(hypotheses[0].tokens)
        captions = self.workers.gathered(captions)
        self._name_unusable("validation")
        if not captions:
            reasons = (f", such as {name} ({reason})" for name, reason in self.unusable["validation"].items())
            raise ConfigurationError(
                f"none of the {len(self.job.val_images)} validation images in {self.job.val_store.location} can be "
                f"read{next(reasons, '')}; check --val-images"
            )
        references = self.job.val_references(captions)
        scores = score_captions(references, captions, metrics=("bleu_4", "cider_d"), tokenizer="python").values
        improved = self.best is None or scores["cider_d"] > self.best.cider_d
        if improved:
            self.best = Best.of(network, self.job.start, scores["cider_d"], stage.kind, epoch, captions)
        return scores, improved

    def _name_unusable(self, split: Split) -> None:
        """Tell of images that could not be used and were not told of yet, and name them all in a file; by all workers
        together."""
        known = self.unusable[split]
        new = {name: reason for name, reason in self.workers.gathered(self.failed[split]).items() if name not in known}
        known |= new
        if not new or self.place.rank != 0:
            return
        store = open_store(self.config.run_path, self.config.s3)
        store.write(UNUSABLE, json.dumps(self.unusable, indent=1).encode())
        name, reason = next(iter(new.items()))
        self.place.tell(
            f"{len(new)} {split} images cannot be used, such as {name} ({reason}); all are named in "
            f"{store.uri(UNUSABLE)}"
        )


def _chunks(rows: list[int]) -> Iterable[list[int]]:
    return (rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE))
