"""How a cluster is shared out between fetching and captioning, and the work into tasks. Ray is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal

import numpy as np

from raycap.bulk.config import CaptionConfig
from raycap.bulk.layout import CHUNKS_PER_SHARD
from raycap.errors import ConfigurationError

FETCH_CPUS = 0.25
"""CPUs that Ray reserves for a fetching task beside captioning actors on CPUs: decoding takes about a tenth of a core
for each core that captions (3 to 5 ms against 40 an image)."""

PLACES: Final = 64
"""Of the listing, where tasks begin in turn."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the stages get of the cluster."""

    num_actors: int
    """That caption, at the start."""
    max_actors: int
    """As nodes are added."""
    device: Literal["cpu", "cuda"]
    """Of the actors: no more and no less than they are given. Ray hides no GPU from an actor that asked for none, and
    an actor that cannot use the GPU that is reserved for it has to fail."""
    gpus_per_actor: float
    cpus_per_actor: float
    threads_per_actor: int
    cpus_per_fetch: float


def plan_resources(config: CaptionConfig, nodes: list[dict[str, float]]) -> Resources:
    """Share the cluster out; `nodes` are the resources of each node.

    With GPUs: an actor for each, and the CPU cores fetch. Without: actors take three quarters of the cores'
    reservations and fetching the rest, each actor running as many threads as the cores it stands for.

    Raises ConfigurationError if what was asked for is not there: Ray would wait for it without an end.
    """
    cores_by_node = [int(node.get("CPU", 0)) for node in nodes]
    gpus_by_node = [node.get("GPU", 0.0) for node in nodes]
    if not sum(cores_by_node):
        raise ConfigurationError("the Ray cluster has no CPU cores to work with; add a worker node")
    gpus_per_actor = config.gpus_per_actor
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if max(gpus_by_node) >= 1 and config.device != "cpu" else 0.0
    if gpus_per_actor:
        return _on_gpus(config, gpus_per_actor, cores_by_node, gpus_by_node)
    if config.device == "cuda" or config.precision == "float16":
        asked = "--device cuda" if config.device == "cuda" else "--precision float16"
        raise ConfigurationError(
            f"{asked} needs GPUs, but the captioning actors get none of the cluster's {sum(gpus_by_node):g}; start "
            "when a node with a GPU is up, or leave it out to run on CPUs"
        )
    return _on_cpus(config, cores_by_node)


def _on_gpus(
    config: CaptionConfig, gpus_per_actor: float, cores_by_node: list[int], gpus_by_node: list[float]
) -> Resources:
    if gpus_per_actor <= 1:  # an actor's share is of one GPU: two halves of different GPUs are no room for it
        room_by_node = [int(gpus) * int(1 / gpus_per_actor + 1e-9) for gpus in gpus_by_node]
    else:
        room_by_node = [int(gpus / gpus_per_actor) for gpus in gpus_by_node]
    room = sum(room_by_node)
    num_actors = config.num_actors or room
    if not 1 <= num_actors <= room:
        raise ConfigurationError(
            f"{max(1, num_actors)} actors with {gpus_per_actor:g} GPUs each, but the cluster has "
            f"{sum(gpus_by_node):g} GPUs and room for {room}; lower --num-actors or --gpus-per-actor"
        )
    # Where cores are few, actors take half of those beside the GPUs, and as much stays for fetching.
    shares = [cores / (2 * room) for cores, room in zip(cores_by_node, room_by_node, strict=True) if room]
    cpus_per_actor = min(1.0, *shares)
    return Resources(
        num_actors=num_actors,
        max_actors=max(num_actors, config.max_actors or 0),
        device="cpu" if config.device == "cpu" else "cuda",
        gpus_per_actor=gpus_per_actor,
        cpus_per_actor=cpus_per_actor,
        threads_per_actor=1,
        cpus_per_fetch=config.num_cpus_per_fetch or cpus_per_actor or 1,
    )


def _on_cpus(config: CaptionConfig, cores_by_node: list[int]) -> Resources:
    cores = sum(cores_by_node)
    threads = config.cpus_per_actor or (4 if cores >= 16 and max(cores_by_node) >= 4 else 1)
    cpus_per_actor = (1 - FETCH_CPUS) * threads
    cpus_per_fetch = config.num_cpus_per_fetch or FETCH_CPUS
    num_actors = config.num_actors or max(1, sum(node // threads for node in cores_by_node))
    room = sum(int(node / cpus_per_actor) for node in cores_by_node)
    if num_actors > room or num_actors * cpus_per_actor + cpus_per_fetch > cores:
        raise ConfigurationError(
            f"actors of {threads} cores do not fit {num_actors} times into the cluster's {cores} cores, "
            f"{max(cores_by_node)} on its largest node, beside a fetching task of {cpus_per_fetch:g}; "
            "lower --num-actors, --cpus-per-actor or --num-cpus-per-fetch"
        )
    return Resources(
        num_actors=num_actors,
        max_actors=max(num_actors, config.max_actors or 0),
        device="cpu",
        gpus_per_actor=0,
        cpus_per_actor=cpus_per_actor,
        threads_per_actor=threads,
        cpus_per_fetch=cpus_per_fetch,
    )


def plan_tasks(todo: np.ndarray, num_tasks: int) -> list[list[int]]:
    """The chunks of each fetching task, in the order in which tasks begin; `todo` is int64, ascending.

    Where there is enough to do for `num_tasks`, a task does up to CHUNKS_PER_SHARD chunks of one manifest shard, one
    after another: the driver has fewer tasks to keep in mind. Tasks from many places of the listing take turns: S3
    bounds the requests to each partition of a bucket, and neighbours are in one.
    """
    per_task = min(CHUNKS_PER_SHARD, max(1, len(todo) // num_tasks))
    groups = groupby(todo.tolist(), key=lambda chunk: (chunk // CHUNKS_PER_SHARD, chunk % CHUNKS_PER_SHARD // per_task))
    in_order = [list(group) for _, group in groups]
    step = -(-len(in_order) // PLACES)
    return [group for place in range(step) for group in in_order[place::step]]
