"""The simulation of tests/benchmarks against what can be worked out by hand, and against losing or doubling images."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from raycap.bulk.layout import CHUNK_ROWS, num_chunks
from tests.benchmarks.simulation import Result, simulate
from tests.benchmarks.world import World

QUIET = World(
    num_images=4_000_000, losses_per_node_hour=0, s3_partitions=1000, in_key_order=False, driver_core_s=1e-6,
    actors_per_committer=1, s3_latency_s=0.01,
)  # fmt: skip
"""A world in which nothing but the GPUs is short."""


def simulated(num_nodes: int, world: World = QUIET, **changes: Any) -> Result:
    return simulate(replace(world, **changes), num_nodes)


def check_each_chunk_once(result: Result, num_images: int) -> None:
    """What was committed, in order, goes from the first chunk to the last without a gap or an overlap."""
    committed = sorted(result.committed)
    assert committed[0][0] == 0
    assert all(first + chunks == after for (first, chunks), (after, _) in pairwise(committed))
    assert sum(committed[-1]) == num_chunks(num_images)


@pytest.mark.parametrize("num_images", [1, 255, 257, 4096, 1_000_001])
@pytest.mark.parametrize("losses", [0, 2, 60])
@pytest.mark.parametrize("num_nodes", [1, 7])
def test_each_image_is_captioned_once_whatever_is_lost(num_images: int, losses: float, num_nodes: int) -> None:
    for seed in range(3):
        world = World(num_images=num_images, losses_per_node_hour=losses, restart_s=20, seed=seed)
        check_each_chunk_once(simulate(world, num_nodes), num_images)


def test_losses_while_others_have_nothing_to_do_are_done_again() -> None:
    # Five tasks of a chunk for four nodes, and a loss every few seconds: most meet nodes that wait for work.
    world = replace(QUIET, num_images=5 * CHUNK_ROWS, gpu_images_per_s=20, losses_per_node_hour=200, restart_s=5)
    results = [simulate(replace(world, seed=seed), 4) for seed in range(20)]
    assert sum(result.num_losses for result in results) >= 20
    assert sum(result.captions_lost for result in results) > 0
    for result in results:
        check_each_chunk_once(result, world.num_images)


@pytest.mark.parametrize(
    ("changes", "images_per_s", "bottleneck"),
    [
        ({}, 10_000, "captioning"),
        ({"node_gpus": 4, "node_cpus": 32}, 40_000, "captioning"),
        ({"feed_core_s": 0.01}, 7000, "cores that fetch and decode"),  # 7 of 8 cores on each node
        ({"s3_latency_s": 0.2}, 5600, "requests in flight"),  # 7 tasks of 16 for 0.2 s
        ({"image_bytes": 1.25e6}, 5000, "network"),  # 500 images a second through 625 MB/s
        ({"driver_core_s": 0.032}, 8000, "driver"),  # 31.25 chunks of 256 a second
        ({"s3_partitions": 1}, 5500, "S3 GETs"),
        ({"s3_puts_per_s": 10}, 2560, "S3 PUTs"),
        ({"actors_per_committer": 10, "commit_core_s": 0.064}, 4000, "committers"),  # 1 of 64 ms a chunk
    ],
    ids=lambda value: next(iter(value), "GPUs") if isinstance(value, dict) else "",
)
def test_rate_is_that_of_what_is_short(changes: dict[str, Any], images_per_s: float, bottleneck: str) -> None:
    result = simulated(10, **changes)
    assert result.images_per_s == pytest.approx(images_per_s, rel=0.03)
    assert next(iter(result.busy)) == bottleneck
    assert result.busy[bottleneck] == pytest.approx(1, abs=0.03)
    assert result.gpu_share == pytest.approx(images_per_s / 10_000 / changes.get("node_gpus", 1), rel=0.03)


def test_nodes_without_gpus_caption_on_their_cores() -> None:
    # 40 ms and 10 ms of a core for each image, 8 cores.
    result = simulated(10, num_images=500_000, node_gpus=0, caption_core_s=0.04, feed_core_s=0.01)
    assert result.images_per_s == pytest.approx(1600, rel=0.03)


def test_more_nodes_are_faster_until_something_else_is_short() -> None:
    rates = {num_nodes: simulated(num_nodes, s3_partitions=5) for num_nodes in (1, 2, 4, 8, 16, 32, 64, 128)}
    for (few, fewer), (_, more) in pairwise(rates.items()):
        assert more.captioning_h <= fewer.captioning_h * 1.001
        if 2 * few * 1000 < 5 * 5500:
            assert more.images_per_s == pytest.approx(2 * fewer.images_per_s, rel=0.05)
            assert more.bottleneck == "captioning"
    assert rates[128].images_per_s == pytest.approx(5 * 5500, rel=0.03)
    assert next(iter(rates[128].busy)) == "S3 GETs"


def test_what_is_read_in_the_order_of_keys_meets_one_partition_at_a_time() -> None:
    spread = simulated(10, s3_partitions=16)
    in_order = simulated(10, s3_partitions=16, in_key_order=True, buffer_chunks=32)
    assert spread.images_per_s == pytest.approx(10_000, rel=0.03)
    # In flight: 10 nodes with 2 tasks of 16 chunks, a third of a partition of 250,000.
    assert in_order.images_per_s == pytest.approx(5500 * (1 + 10 * 32 * CHUNK_ROWS / 250_000), rel=0.03)


def test_lost_nodes_cost_their_absence_and_little_more() -> None:
    # A loss every half hour, five minutes each: away for a seventh of the time.
    result = simulated(20, num_images=100_000_000, losses_per_node_hour=2, restart_s=300)
    assert result.images_per_s == pytest.approx(20_000 * 6 / 7, rel=0.05)
    assert result.num_losses == pytest.approx(20 * 2 * result.captioning_h * 6 / 7, rel=0.3)
    assert 0 < result.captions_lost < result.num_losses * CHUNK_ROWS
    assert result.reads_lost < result.num_losses * (120 + 16) * CHUNK_ROWS


def test_phases_add_up_to_time_and_cost() -> None:
    result = simulated(
        100, num_images=22_800 * 3600, start_s=36, row_bytes=128, join_core_s=0.05, s3_latency_s=0.05,
        node_price_per_hour=2,
    )  # fmt: skip
    assert result.listing_h == pytest.approx(1)
    assert result.captioning_h == pytest.approx(0.01 + 22_800 / 100_000, rel=0.02)
    # 321 pages of names; 83 files at once, 3,863 chunks in each.
    assert result.joining_h == pytest.approx((321 * 0.05 + 3863 * 0.1) / 3600, rel=0.01)
    assert result.cost == pytest.approx(200 * result.hours)
    assert (result.bottleneck, result.next_bottleneck) == ("listing", "captioning")
    assert result.gpu_share_of_all == pytest.approx(22_800 / 100_000 / result.hours, rel=0.01)


def test_same_seed_gives_the_same_run() -> None:
    world = replace(QUIET, losses_per_node_hour=5)
    assert simulate(world, 9) == simulate(world, 9)
    assert simulate(world, 9) != simulate(replace(world, seed=1), 9)
