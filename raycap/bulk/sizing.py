"""How much of a cluster keeps a captioning actor busy, and how many nodes are done in time. Plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raycap.bulk.config import CaptionConfig
from raycap.bulk.resources import plan_resources


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one image costs each resource."""

    captions_per_s: float
    """Images a second of one captioning actor: of a GPU, or of a CPU core where there are none."""
    feed_core_s: float
    """CPU seconds that fetching and decoding an image takes."""
    read_s: float
    """From asking for an object until all of it is there."""
    image_bytes: float
    """Of the file."""
    pixel_bytes: float
    """Of what is decoded from it, in the size that the model takes."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What goes on beside one captioning actor that never waits."""

    cores: float
    """CPU cores that fetch and decode; its own is not among them."""
    mb_per_s: float
    """From the storage to those cores, in 10^6 bytes a second."""
    pixel_mb_per_s: float
    """From those cores to the actor; over the network where they are on other nodes."""
    requests_in_flight: float


def needs(rates: Rates) -> Needs:
    """Of one actor. Requests in flight are those that arrive times how long each takes (Little 1961)."""
    return Needs(
        cores=rates.captions_per_s * rates.feed_core_s,
        mb_per_s=rates.captions_per_s * rates.image_bytes / 1e6,
        pixel_mb_per_s=rates.captions_per_s * rates.pixel_bytes / 1e6,
        requests_in_flight=rates.captions_per_s * rates.read_s,
    )


def num_fetch_tasks(num_cpus: int, num_gpus: int) -> int:
    """How many tasks fetch and decode at a time beside an actor on each GPU, at the defaults of `raycap caption`."""
    nodes = [{"CPU": float(num_cpus), "GPU": float(num_gpus)}]
    share = plan_resources(CaptionConfig(source="", output=""), nodes)
    return int((num_cpus - share.num_actors * share.cpus_per_actor) / share.cpus_per_fetch + 1e-9)


def images_per_s(rates: Rates, num_cpus: int, num_gpus: int) -> tuple[float, str]:
    """What this much of a cluster captions, and what limits it. Without GPUs the cores do both."""
    if not num_gpus:
        return num_cpus / (1 / rates.captions_per_s + rates.feed_core_s), "captioning"
    feeding_cores = min(num_cpus, num_fetch_tasks(num_cpus, num_gpus))
    return min(
        (num_gpus * rates.captions_per_s, "captioning"),
        (feeding_cores / rates.feed_core_s, "fetching and decoding on the CPUs"),
    )


def num_nodes(num_images: int, hours: float, node_images_per_s: float) -> int:
    """Nodes that caption so many images in so many hours, if none of them waits for another."""
    return max(1, math.ceil(num_images / (3600 * hours * node_images_per_s)))
