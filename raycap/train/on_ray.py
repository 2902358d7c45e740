"""Training on Ray Train: one worker or many, on CPUs (gloo) or GPUs (NCCL); images through Ray Data while the CNN
learns."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from torch import Tensor

from raycap.errors import ConfigurationError
from raycap.on_ray import connect, mailbox, raycap_cause
from raycap.storage import arrow_filesystem, is_s3, open_store
from raycap.train.config import TrainConfig
from raycap.train.data import Part
from raycap.train.dry_run import dry_run
from raycap.train.export import write_bundle
from raycap.train.job import Job
from raycap.train.pixels import read_part
from raycap.train.stages import Place, run_stages

log = logging.getLogger(__name__)

DECODE_CPUS = 0.25
"""What a task that reads and decodes images asks for. Each worker on CPUs leaves this much of its own: otherwise there
would be none on a small machine, and the training would wait for ever."""
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
    open_store(job.config.run_path, config.s3).check_writable()
    connect(config.ray_address)
    checkpoint = _fit(job).checkpoint
    assert checkpoint is not None, "every stage ends with a checkpoint"
    with checkpoint.as_directory() as directory:
        return write_bundle(job, Path(directory))


@dataclass(frozen=True)
class _Share:
    """What each worker takes of the cluster."""

    threads: int
    resources: dict[str, float]
    decode: ExecutionResources
    """For reading and decoding images, while the CNN learns."""

    @classmethod
    def of(cls, config: TrainConfig) -> _Share:
        """Raises ConfigurationError if the cluster has not enough."""
        cluster = ray.cluster_resources()
        cores = cluster.get("CPU", 1)
        threads = config.cpus_per_worker or (1 if config.use_gpu else max(1, int(cores) // config.num_workers))
        least = config.min_workers or config.num_workers
        wanted = {"CPU": threads * least, "GPU": least if config.use_gpu else 0}
        for resource, amount in wanted.items():
            if amount > cluster.get(resource, 0):
                raise ConfigurationError(
                    f"training needs {amount} {resource}s ({least} workers), but Ray has "
                    f"{cluster.get(resource, 0):g}; lower --num-workers or --cpus-per-worker, or use a larger cluster"
                )
        resources: dict[str, float] = {"CPU": threads - (DECODE_CPUS if config.fine_tune_epochs else 0)}
        if config.use_gpu:
            resources["GPU"] = 1
        left = max(DECODE_CPUS, cores / config.num_workers - resources["CPU"])
        memory = cluster.get("object_store_memory", 0) / (2 * config.num_workers)
        return cls(threads, resources, ExecutionResources(cpu=left, gpu=0, object_store_memory=memory))


def _fit(job: Job) -> Result:
    """Train to the end, replacing lost workers. Errors of ours are not tried again: they would come again."""
    config, share = job.config, _Share.of(job.config)
    failures = 0
    with mailbox(log.info) as box:
        settings = {"job": ray.put(job), "share": share, "mailbox": box}
        while True:
            try:
                return _trainer(config, share, settings).fit()
            except ray.train.TrainingFailedError as error:
                cause = raycap_cause(error)
                if cause is not None:
                    raise cause from None
                failures += 1
                if failures > config.max_failures >= 0:
                    raise
                reason = str(error).strip().splitlines()[-1]
                log.warning("a worker failed (%s); going on from the last checkpoint, failure %d", reason, failures)


def _trainer(config: TrainConfig, share: _Share, settings: dict[str, Any]) -> ray.train.torch.TorchTrainer:
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
    share: _Share = settings["share"]
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
                read_pixels=lambda job: partial(_read_pixels, job, share.decode, tell),
            ),
        )


def _read_pixels(
    job: Job, limits: ExecutionResources, tell: Any, parts: Iterable[Part]
) -> Iterator[tuple[Part, Tensor, np.ndarray]]:
    """Parts with their images' pixels [B, H, W, 3], read, decoded and augmented by Ray Data's tasks on any node.

    A block is a part, in the order of the parts. Each worker has a stream of its own with its share of the cluster.
    """
    parts = list(parts)
    options = ray.data.DataContext.get_current().execution_options
    options.preserve_order = True
    options.resource_limits = limits
    ray.data.DataContext.get_current().enable_progress_bars = False
    names = [image.file_name for image in job.train_images]
    # from_items, since from_arrow asks for a whole CPU to look at its tables, which may not be there.
    items = [{"name": [names[image] for image in part.images_B], "seed": part.seeds_B.tolist()} for part in parts]
    config = job.config
    read = partial(read_part, job.train_store, job.start.preprocessing, flip=config.flip, crop=config.crop)
    blocks = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            _Pixels,
            fn_constructor_args=(read,),
            batch_size=None,
            batch_format="numpy",
            num_cpus=DECODE_CPUS,
            # Actors, since Ray starts a new process for most tasks that come now and then.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int((limits.cpu or 0) / DECODE_CPUS))),
        )
        # A split is driven by an actor of its own, not by a thread that would share this process's lock with training.
        .streaming_split(1)[0]
        .iter_batches(
            batch_size=None,  # type: ignore[arg-type]  # whole blocks, as its docstring says
            batch_format="numpy",
            prefetch_batches=PREFETCHED_PARTS,
        )
    )
    failed: dict[str, str] = {}
    for part, block in zip(parts, blocks, strict=True):
        readable_B = block["error"] == ""
        for name, error in zip(block["name"][~readable_B], block["error"][~readable_B], strict=True):
            if not failed:
                tell(f"{name} cannot be used ({error}); it is left out, as are others like it")
            failed[str(name)] = str(error)
        yield part, torch.from_numpy(np.ascontiguousarray(block["pixels"])), readable_B
    if failed:
        tell(f"{len(failed)} images could not be used in this epoch")


class _Pixels:
    """What a part's images are to the CNN. A part is a block of one row, whose values are lists."""

    def __init__(self, read: Callable[[dict[str, Any]], dict[str, np.ndarray]]) -> None:
        self.read = read

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        return self.read({name: values[0] for name, values in block.items()})
