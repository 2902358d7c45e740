"""The simulation beside the bulk job itself, on one and on two Ray nodes of one core each on this machine.

Each node's processes are kept to a core of their own. What the simulation needs to know of the machine is measured on
the same images first, by `raycap plan`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from rich import box
from rich.table import Table

from raycap.benchmark.bulk import steady
from raycap.bulk.config import CaptionConfig
from raycap.bulk.layout import CAPTIONS_PREFIX
from tests.benchmarks.simulation import simulate
from tests.benchmarks.world import World
from tests.commands import starting_commands
from tests.ray_cluster import cluster_of_cores, kept_to

if TYPE_CHECKING:
    from tests.benchmarks.simulate import Options

BATCH_SIZE = CaptionConfig(source="", output="").batch_size


def check(options: Options) -> Table:
    """Images/s of both, and two nodes over one."""
    if options.images is None:
        sys.exit("--check needs --images DIR: images to caption")
    if len(cores := sorted(os.sched_getaffinity(0))) < 2:
        sys.exit("--check needs two CPU cores")
    model = ["--model", options.model] if options.model else []
    world = _world(options, options.images, model, cores[0])
    table = Table(box=box.SIMPLE)
    for title in ("nodes of 1 core", "predicted images/s", "measured images/s", "measured over predicted"):
        table.add_column(title, justify="right")
    measured, predicted = [], []
    for num_nodes in (1, 2):
        predicted.append(simulate(world, num_nodes).images_per_s)
        measured.append(_caption(options.images, model, world.num_images, cores[:num_nodes]))
        table.add_row(str(num_nodes), *_cells(predicted[-1], measured[-1]))
    table.add_row("2 over 1", *_cells(predicted[1] / predicted[0], measured[1] / measured[0], digits=2))
    return table


def _cells(predicted: float, measured: float, *, digits: int = 1) -> tuple[str, str, str]:
    return f"{predicted:.{digits}f}", f"{measured:.{digits}f}", f"{measured / predicted:.2f}"


def _world(options: Options, images: str, model: list[str], core: int) -> World:
    """This machine: no GPU, no S3, no losses; seconds of a core as `raycap plan` measures them on one."""
    samples = ["--num-samples", str(min(256, options.num_check))]
    with kept_to(core), starting_commands() as start:
        code, out, err = start("plan", images, *model, *samples, "--json").finish()
    assert code == 0, err
    plan: dict[str, Any] = json.loads(out)
    return replace(
        options.world,
        num_images=min(options.num_check, plan["num_objects"] - plan["num_skipped"]),
        image_bytes=plan["sample_bytes"] / plan["num_sampled"],
        node_cpus=1,
        node_gpus=0,
        caption_core_s=plan["seconds_per_image"]["caption"],
        feed_core_s=plan["feed_core_seconds_per_image"],
        s3_latency_s=plan["read_seconds"],
        s3_gets_per_s=1e9,
        s3_puts_per_s=1e9,
        losses_per_node_hour=0.0,
    )


def _caption(images: str, model: list[str], num_images: int, cores: list[int]) -> float:
    """Images/s from the first captioned batch to the last, on a node for each core. The driver has all of them."""
    with tempfile.TemporaryDirectory() as folder:
        with cluster_of_cores(cores) as cluster, starting_commands() as start:
            further = ["--limit", str(num_images), "--no-report", "--ray-address", cluster.address]
            command = start("caption", images, f"{folder}/out", *model, *further, env=cluster.env)
            code, _, err = command.finish(deadline_s=3600)
        assert code == 0, err
        rows = pq.read_table(Path(folder) / "out" / CAPTIONS_PREFIX, columns=["captioned_at"])
    times_s = rows["captioned_at"].to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6
    num_steady, start_s, end_s = steady(times_s, BATCH_SIZE)
    return num_steady / (end_s - start_s)
