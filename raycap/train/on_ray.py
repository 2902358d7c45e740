"""Training on Ray Train: one worker or many, on CPUs (gloo) or GPUs (NCCL); images through Ray Data while the CNN
learns."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from ray.data import ExecutionResources
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from torch import Tensor

from raycap.errors import EndpointError
from raycap.on_ray import connect, mailbox, raycap_cause
from raycap.storage import arrow_filesystem, is_s3, open_store
from raycap.storage.lock import OutputLock
from raycap.train.config import TrainConfig
from raycap.train.data import Part
from raycap.train.dry_run import dry_run
from raycap.train.export import write_bundle
from raycap.train.job import Job
from raycap.train.monitor import Tell
from raycap.train.pixels import Pixels, read_part
from raycap.train.resources import DECODE_CPUS, Share, decode_share, plan_share
from raycap.train.stages import Place, run_stages

log = logging.getLogger(__name__)

LOCK = "lock.json"
"""Below the run's directory, while a driver works on it."""
PREFETCHED_PARTS = 4
COLLECTIVE_TIMEOUT_S = 4 * 3600
"""Workers wait for each other while features are computed, which may end hours apart where machines differ. Ray itself
notices at once when a worker is lost."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, and write the bundle of the best epoch to `config.output`. Returns the bundle's metrics.

    Everything that can be checked before workers start is checked here; errors are ConfigurationError or StorageError.
    With `config.dry_run`, only that and one batch are done.
    """
    # Workers have directories of their own: a relative path means the driver's.
    job = Job.open(replace(config, run_dir=config.run_root))
    if config.dry_run:
        return dry_run(job)
    run = open_store(job.config.run_path, config.s3)
    run.check_writable()
    connect(config.ray_address)
    nodes = _nodes()
    if len(nodes) > 1 and not is_s3(job.config.run_root):
        log.warning("--run-dir %s must be a directory that all %d nodes share", job.config.run_root, len(nodes))
    share = plan_share(job.config, nodes)
    with OutputLock(run, LOCK) as lock:
        with mailbox(log.info) as box:
            settings = {"job": ray.put(job), "share": share, "mailbox": box}

            def fit() -> Result:
                lock.check()
                return _trainer(job.config, share, settings).fit()

            checkpoint = persevere(fit, config.max_failures).checkpoint
        assert checkpoint is not None, "every stage ends with a checkpoint"
        lock.check()
        with checkpoint.as_directory() as directory:
            return write_bundle(job, Path(directory))


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def persevere(fit: Callable[[], Result], max_failures: int) -> Result:
    """Train to the end, replacing lost workers. Errors of ours are not tried again, since they would come again; but
    for an S3 endpoint that cannot be reached."""
    failures = 0
    while True:
        try:
            return fit()
        except (ray.train.TrainingFailedError, RayActorError) as error:  # the latter: Ray Train's own actor was lost
            cause = raycap_cause(error)
            failures += 1
            may_pass = cause is None or isinstance(cause, EndpointError)
            if not may_pass or failures > max_failures >= 0:
                if cause is None:
                    raise
                raise cause from None
            reason = str(cause or error).strip().splitlines()[-1]
            log.warning("a worker failed (%s); going on from the last checkpoint, failure %d", reason, failures)


def _trainer(config: TrainConfig, share: Share, settings: dict[str, Any]) -> ray.train.torch.TorchTrainer:
    num_workers = (config.min_workers, config.num_workers) if config.min_workers else config.num_workers
    return ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config=settings,
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=num_workers,  # type: ignore[arg-type]  # inherited from an older class without pairs
            use_gpu=config.use_gpu,
            resources_per_worker=share.resources,
        ),
        run_config=RunConfig(
            name=config.run_name,
            storage_path=config.run_root.removeprefix("s3://"),
            storage_filesystem=arrow_filesystem(config.s3) if is_s3(config.run_root) else None,
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep_checkpoints, checkpoint_score_attribute="cider_d", checkpoint_score_order="max"
            ),
        ),
    )


def _train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    share: Share = settings["share"]
    torch.set_num_threads(share.threads)
    job: Job = ray.get(settings["job"])
    context = ray.train.get_context()

    def report(metrics: dict[str, Any], directory: Path | None) -> None:
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory) if directory else None)

    def tell(line: str) -> None:
        settings["mailbox"].post.remote(line)

    with ExitStack() as stack:
        checkpoint = ray.train.get_checkpoint()
        run_stages(
            job,
            Place(
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                device=ray.train.torch.get_device(),
                cache_dir=Path(job.config.cache_dir or Path(tempfile.gettempdir()) / "raycap-features"),
                tell=tell,
                report=report,
                resume_from=Path(stack.enter_context(checkpoint.as_directory())) if checkpoint else None,
                read_pixels=lambda job, failed: partial(_read_pixels, job, share, failed, tell),
            ),
        )


def _read_pixels(
    job: Job, share: Share, failed: dict[str, str], tell: Tell, parts: Iterable[Part]
) -> Iterator[tuple[Part, Tensor, np.ndarray]]:
    """Parts with their images' pixels [B, H, W, 3], read, decoded and augmented by Ray Data's tasks on any node;
    `failed` takes note of images that cannot be used.

    A block is a part, in the order of the parts. Each worker has a stream of its own with its share of the cluster.
    """
    parts = list(parts)
    context, nodes = ray.train.get_context(), _nodes()
    num_workers = context.get_world_size()
    decode_cpus, num_actors = decode_share(share, nodes, num_workers)
    memory = sum(node.get("object_store_memory", 0) for node in nodes) / (2 * num_workers)
    options = ray.data.DataContext.get_current().execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources(cpu=decode_cpus, gpu=0, object_store_memory=memory)
    ray.data.DataContext.get_current().enable_progress_bars = False
    names = [image.file_name for image in job.train_images]
    # from_items, since from_arrow asks for a whole CPU to look at its tables, which may not be there.
    items = [{"name": [names[image] for image in part.images_B], "seed": part.seeds_B.tolist()} for part in parts]
    config = job.config
    read = partial(read_part, job.train_store, job.start.preprocessing, flip=config.flip, crop=config.crop)
    blocks = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            Pixels,
            fn_constructor_args=(read,),
            batch_size=None,
            batch_format="numpy",
            num_cpus=DECODE_CPUS,
            # Actors, since Ray starts a new process for most tasks that come now and then.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_actors),
        )
        # A split is driven by an actor of its own, not by a thread that would share this process's lock with training.
        .streaming_split(1)[0]
        .iter_batches(
            batch_size=None,  # type: ignore[arg-type]  # whole blocks, as its docstring says
            batch_format="numpy",
            prefetch_batches=PREFETCHED_PARTS,
        )
    )
    for part, block in zip(parts, blocks, strict=True):
        readable_B = block["error"] == ""
        for name, error in zip(block["name"][~readable_B], block["error"][~readable_B], strict=True):
            if not failed and context.get_world_rank() == 0:  # an epoch may take hours
                tell(f"{name} cannot be used ({error}); others like it are counted and named after the epoch")
            failed[str(name)] = str(error)
        yield part, torch.from_numpy(np.ascontiguousarray(block["pixels"])), readable_B
