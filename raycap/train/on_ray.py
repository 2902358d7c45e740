"""Training on Ray Train: one worker or many, on CPUs (gloo) or GPUs (NCCL)."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, Result, RunConfig, ScalingConfig
from torch import nn

from raycap.coco import CaptionedImage, read_captions
from raycap.errors import ConfigurationError
from raycap.evaluate import score_captions
from raycap.images import Preprocessing
from raycap.model.decoder import Decoder
from raycap.model.encoder import Encoder
from raycap.model.vocabulary import Vocabulary
from raycap.on_ray import connect, mailbox, raycap_cause
from raycap.storage import Store, open_store
from raycap.train.config import TrainConfig
from raycap.train.data import CaptionData
from raycap.train.export import read_state, write_bundle, write_checkpoint
from raycap.train.features import Features, compute_features
from raycap.train.job import Job, frozen_encoder, identity, new_decoder
from raycap.train.loop import Learner, caption_features
from raycap.train.monitor import Monitor, Tell

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, and write the bundle of the best epoch to `config.output`. Returns the bundle's metrics.

    Everything that can be checked before workers start is checked here; errors are ConfigurationError or StorageError.
    """
    train_images = read_captions(config.annotations, config.s3)
    val_images = read_captions(config.val_annotations, config.s3)
    train_store = open_store(config.images, config.s3)
    val_store = open_store(config.val_images or config.images, config.s3)
    train_store.check_readable()
    val_store.check_readable()
    open_store(config.output, config.s3).check_writable()
    vocabulary = Vocabulary.from_captions(
        (c for image in train_images for c in image.captions), min_count=config.min_count
    )
    log.info(
        "training on %d images (%d captions), validating on %d; %d words",
        len(train_images),
        sum(len(image.captions) for image in train_images),
        len(val_images),
        len(vocabulary),
    )
    frozen_encoder(config)  # is there such an encoder, with its weights?
    connect(config.ray_address)
    # Workers have directories of their own: a relative path means the driver's.
    config = replace(config, run_dir=str(config.run_path.parent))
    job = Job(
        config=config,
        vocabulary=vocabulary,
        train_images=train_images,
        val_images=val_images,
        train_store=train_store,
        val_store=val_store,
    )
    result = _fit(job)
    checkpoint = max(result.best_checkpoints or [], key=lambda pair: pair[1]["cider_d"])[0]
    with checkpoint.as_directory() as directory:
        return write_bundle(job, Path(directory))


def _fit(job: Job) -> Result:
    config = job.config
    cpus = _cpus_per_worker(config)
    available = ray.cluster_resources()
    wanted = {"CPU": cpus * config.num_workers, "GPU": config.num_workers if config.use_gpu else 0}
    for resource, amount in wanted.items():
        if amount > available.get(resource, 0):
            raise ConfigurationError(
                f"training needs {amount} {resource}s ({config.num_workers} workers), but Ray has "
                f"{available.get(resource, 0):g}; lower --num-workers or --cpus-per-worker, or use a larger cluster"
            )
    try:
        config.run_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--run-dir: cannot make {config.run_path}: {error.strerror}") from error
    with mailbox(log.info) as box:
        return _fit_with(job, cpus, box)


def _fit_with(job: Job, cpus: int, box: Any) -> Result:
    config = job.config
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={"job": ray.put(job), "cpus": cpus, "mailbox": box},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=_resources(config, cpus)
        ),
        run_config=RunConfig(
            name=config.run_name,
            storage_path=str(config.run_path.parent),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="cider_d", checkpoint_score_order="max"
            ),
        ),
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = raycap_cause(error)
        if cause is None:
            raise
        raise cause from None


def _cpus_per_worker(config: TrainConfig) -> int:
    if config.cpus_per_worker:
        return config.cpus_per_worker
    return 1 if config.use_gpu else max(1, int(ray.cluster_resources().get("CPU", 1)) // config.num_workers)


def _resources(config: TrainConfig, cpus: int) -> dict[str, float]:
    return {"CPU": cpus, "GPU": 1} if config.use_gpu else {"CPU": cpus}


def _train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    torch.set_num_threads(settings["cpus"])
    job: Job = ray.get(settings["job"])
    config = job.config
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()

    def tell(line: str) -> None:
        """A line for the user, from the first worker."""
        if rank == 0:
            settings["mailbox"].post.remote(line)

    encoder, preprocessing = frozen_encoder(config)
    encoder = encoder.to(device).eval()
    train_features = _features(
        job.train_images, job.train_store, encoder, preprocessing, config, tell, flip=config.flip
    )
    val_features = _features(job.val_images, job.val_store, encoder, preprocessing, config, tell, flip=False)

    torch.manual_seed(config.seed)
    decoder = new_decoder(config, encoder, job.vocabulary).to(device)
    wrapped = ray.train.torch.prepare_model(decoder, move_to_device=False)
    data = CaptionData.encode(
        job.train_images,
        train_features,
        job.vocabulary,
        max_length=config.max_length,
        batch_size=config.batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
    )
    learner = Learner(
        config, decoder, data, wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else None
    )
    start_epoch = _restore(learner, job, tell)
    monitor = Monitor(config, data.steps_per_epoch, tell) if rank == 0 else None
    for epoch in range(start_epoch, config.epochs):
        metrics = learner.train_epoch(epoch, monitor.on_step if monitor else lambda step, metrics: None)
        captions = _validation_captions(learner.best_decoder, val_features, job, rank, world_size)
        if monitor is None:
            ray.train.report({})
            continue
        references = {image.image_id: list(image.captions) for image in job.val_images if image.image_id in captions}
        scores = score_captions(references, captions, metrics=("bleu_4", "cider_d"))
        metrics |= scores.values | {"epoch": epoch + 1}
        monitor.on_epoch(epoch, metrics)
        with tempfile.TemporaryDirectory() as directory:
            state = learner.state_dict() | {"epoch": epoch + 1, "identity": identity(job)}
            write_checkpoint(Path(directory), state, captions)
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))


def _features(
    images: list[CaptionedImage],
    store: Store,
    encoder: Encoder,
    preprocessing: Preprocessing,
    config: TrainConfig,
    tell: Tell,
    *,
    flip: bool,
) -> Features:
    """The cached features of these images; all workers compute them together."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > config.log_every_s:
            last = time.monotonic()
            whose = " of worker 0's share" if context.get_world_size() > 1 else ""
            tell(f"encoding the images of {store.location}: {done} of {total}{whose}")

    features = compute_features(
        encoder,
        preprocessing,
        store,
        [image.file_name for image in images],
        config.features_path,
        flip=flip,
        rank=rank,
        world_size=context.get_world_size(),
        barrier=_barrier,
        progress=progress,
    )
    if features.failed:
        name, reason = next(iter(features.failed.items()))
        tell(f"{len(features.failed)} images cannot be used, such as {name} ({reason})")
    if len(features.failed) == len(images):
        reason = next(iter(features.failed.values()))
        raise ConfigurationError(f"none of the {len(images)} images in {store.location} can be read: {reason}")
    return features


def _barrier() -> None:
    """Wait for all workers."""
    if dist.is_initialized():
        dist.barrier()


def _validation_captions(decoder: Decoder, features: Features, job: Job, rank: int, world_size: int) -> dict[int, str]:
    """Captions of all validation images by image id, made by all workers together."""
    rows = [row for row, image in enumerate(job.val_images) if image.file_name not in features.failed][rank::world_size]
    captions = caption_features(decoder, features, rows, job.vocabulary, job.config.decoding)
    mine = {job.val_images[row].image_id: caption for row, caption in zip(rows, captions, strict=True)}
    if world_size == 1:
        return mine
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, mine)
    return {image_id: caption for part in parts for image_id, caption in part.items()}


def _restore(learner: Learner, job: Job, tell: Tell) -> int:
    """Load the run's last checkpoint, if it has one; return the epoch to go on with.

    Raises ConfigurationError if the run was another one: its weights would pass for those of the present settings.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as directory:
        state = read_state(Path(directory), learner.device)
    now = identity(job)
    before = state.get("identity", now)
    if changed := [name for name in now if before.get(name) != now[name]]:
        what = ", ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in changed)
        raise ConfigurationError(
            f"the run {job.config.run_name} in {job.config.run_path.parent} has begun with other settings ({what}); "
            "give the same ones to resume it, or another --name"
        )
    learner.load_state_dict(state)
    epoch: int = state["epoch"]
    tell(f"resuming after epoch {epoch}")
    return epoch
