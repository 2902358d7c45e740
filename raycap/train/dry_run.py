"""`raycap train --dry-run`: is everything there, and does it fit? One worker's batch of each stage, without Ray."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycap.coco import CaptionedImage
from raycap.errors import ConfigurationError
from raycap.model.vocabulary import UNKNOWN
from raycap.storage import Store
from raycap.train.config import Stage
from raycap.train.data import CaptionData, Part
from raycap.train.job import Job
from raycap.train.loop import Learner
from raycap.train.pixels import read_part
from raycap.train.self_critical import SelfCritical

log = logging.getLogger(__name__)


def dry_run(job: Job) -> dict[str, Any]:
    """Say what the training would work with, and run one worker's share of a batch through each stage. Writes nothing.

    Returns what was found. Raises ConfigurationError if no image of the first batch can be read.
    """
    config, bundle = job.config, job.start
    device = torch.device("cuda" if config.use_gpu and torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {
        "num_train_images": len(job.train_images),
        "num_val_images": len(job.val_images),
        "num_captions": job.num_captions,
        "num_words": len(bundle.vocabulary),
        "unknown_words": _unknown_words(job),
        "num_parameters": sum(parameter.numel() for parameter in bundle.network.parameters()),
    }
    log.info("%.2f%% of the captions' words are not in the vocabulary", 100 * found["unknown_words"])
    log.info(
        "%s with %s: %.1f million parameters, images of %d px, on %s",
        bundle.single.encoder.config.name,
        bundle.single.decoder.config.kind,
        found["num_parameters"] / 1e6,
        bundle.preprocessing.size_px,
        device,
    )
    names_in_train = {image.file_name for image in job.train_images}
    if job.train_store.location == job.val_store.location and (
        shared := sum(image.file_name in names_in_train for image in job.val_images)
    ):
        log.warning("%d validation images are training images too: their scores will be too good", shared)
    _read(job, job.val_images, job.val_store, "validation")
    pixels_BHWC, readable_B = _read(job, job.train_images, job.train_store, "training")
    share = np.flatnonzero(readable_B)[: math.ceil(config.batch_size / config.num_workers)]
    for stage in config.stages:
        found[stage.kind] = _one_batch(job, stage, share, pixels_BHWC[share].to(device))
    log.info("nothing was written; leave out --dry-run to train")
    return found


def _unknown_words(job: Job) -> float:
    """Share of the training captions' words that are not in the vocabulary."""
    counts: Counter[bool] = Counter()
    for image in job.train_images:
        for caption in image.captions:
            counts.update(id_ == UNKNOWN for id_ in job.start.vocabulary.encode(caption)[1:-1])
    return counts[True] / max(1, counts.total())


def _read(job: Job, images: list[CaptionedImage], store: Store, what: str) -> tuple[Tensor, np.ndarray]:
    """The first images as pixels, and which of them could be read."""
    names = np.array([image.file_name for image in images[: job.config.batch_size]])
    rows = {"name": names, "seed": np.arange(len(names))}
    block = read_part(store, job.start.preprocessing, rows, flip=False, crop=1.0)
    readable_B = block["error"] == ""
    errors = [str(error) for error in block["error"][~readable_B]]
    if len(errors) == len(names):
        raise ConfigurationError(f"none of the first {len(names)} {what} images can be read: {errors[0]}")
    log.info("%s images: %d of the first %d can be read", what, readable_B.sum(), len(names))
    for name, error in zip(names[~readable_B], errors, strict=True):
        log.warning("%s: %s", name, error)
    return torch.from_numpy(block["pixels"]), readable_B


def _one_batch(job: Job, stage: Stage, images: np.ndarray, pixels_BHWC: Tensor) -> dict[str, float]:
    """Learn twice from the training images of these places; the second time is the one to judge by."""
    config, network = job.config, job.start.single.to(pixels_BHWC.device)
    data = CaptionData.encode(
        job.train_images[: images[-1] + 1],
        job.start.vocabulary,
        max_length=config.max_length,
        batch_size=len(images),
        seed=config.seed,
    )
    data = replace(data, images=images)
    with torch.no_grad():
        inputs = pixels_BHWC if stage.kind == "fine_tune" else network.encoder.eval()(pixels_BHWC)

    def read(parts: Iterable[Part]) -> Iterator[tuple[Part, Tensor, np.ndarray]]:
        for part in parts:
            yield part, inputs[np.searchsorted(images, part.images_B)], np.ones(len(images), dtype=bool)

    self_critical = (
        SelfCritical(config, job.train_images, job.start.vocabulary) if stage.kind == "self_critical" else None
    )
    learner = Learner(config, stage, network, data, read, self_critical)
    seen: dict[str, float] = {}
    for epoch in range(2):
        started = time.monotonic()
        learner.train_epoch(epoch, lambda step, metrics: seen.update(metrics))
        seen["batch_s"] = time.monotonic() - started
    log.info(
        "%s: inputs %s, loss %.3f, gradient norm %.2f, %.2f s for %d images%s",
        stage.kind, list(inputs.shape), seen["train/loss"], seen["train/grad_norm"], seen["batch_s"], len(images),
        f", the share of one of {config.num_workers} workers" if config.num_workers > 1 else "",
    )  # fmt: skip
    return seen
