"""What each training worker takes of a cluster, and what is left for reading images. Without Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raycap.errors import ConfigurationError
from raycap.train.config import TrainConfig

Nodes = list[dict[str, float]]
"""The resources of each node, as Ray names them."""

DECODE_CPUS = 0.25
"""What a process that reads and decodes images asks for. Each worker on CPUs leaves this much of its own: otherwise
there would be none on a small machine, and the training would wait for ever."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each worker takes."""

    threads: int
    resources: dict[str, float]
    """What it reserves."""


def plan_share(config: TrainConfig, nodes: Nodes) -> Share:
    """Share the cluster out: a worker lies on one node. By default workers on CPUs take as many threads as let all of
    them find a place.

    Raises ConfigurationError if not enough of them do: Ray would wait for a larger cluster without an end.
    """
    cores = sum(int(node.get("CPU", 0)) for node in nodes)

    def places(threads: int) -> int:
        gpus = [node.get("GPU", 0) if config.use_gpu else math.inf for node in nodes]
        return sum(int(min(node.get("CPU", 0) // threads, most)) for node, most in zip(nodes, gpus, strict=True))

    threads = config.cpus_per_worker or 1
    if config.cpus_per_worker is None and not config.use_gpu:
        fair = range(cores // config.num_workers, 1, -1)
        threads = next((threads for threads in fair if places(threads) >= config.num_workers), 1)
    least = config.min_workers or config.num_workers
    if places(threads) < least:
        each = f"{threads} CPU{'s' if threads > 1 else ''}{' and a GPU' if config.use_gpu else ''}"
        have = f"nodes: {len(nodes)}, CPUs: {cores}, of the largest node: {max(node.get('CPU', 0) for node in nodes):g}"
        have += f", GPUs: {sum(node.get('GPU', 0) for node in nodes):g}" if config.use_gpu else ""
        raise ConfigurationError(
            f"training needs {least} workers of {each} each, but Ray has a place for {places(threads)} ({have}); lower "
            "--num-workers or --cpus-per-worker, use a larger cluster, or give --min-workers: then the training begins "
            "with as many and takes in others when the cluster grows"
        )
    reserved: dict[str, float] = {"CPU": threads - (DECODE_CPUS if config.fine_tune_epochs else 0)}
    return Share(threads=threads, resources=reserved | ({"GPU": 1} if config.use_gpu else {}))


def decode_share(share: Share, nodes: Nodes, num_workers: int) -> tuple[float, int]:
    """The CPUs that one worker's processes for reading and decoding images may take of the cluster as it is now, and
    how many processes at most: on a single machine one for each `DECODE_CPUS`, on several one for each core."""
    cores = [node["CPU"] for node in nodes if node.get("CPU")]
    left = max(DECODE_CPUS, sum(cores) / num_workers - share.resources["CPU"])
    return left, max(1, int(left / DECODE_CPUS if len(cores) == 1 else left))
