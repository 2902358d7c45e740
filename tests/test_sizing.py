"""Sizing against numbers worked out by hand."""

from __future__ import annotations

import pytest

from raycap.bulk.sizing import Rates, images_per_s, needs, num_fetch_tasks, num_nodes

FED_BY_THREE = Rates(captions_per_s=600, feed_core_s=0.005, read_s=0.1, image_bytes=50_000, pixel_bytes=150_000)


def test_needs_of_one_actor() -> None:
    need = needs(FED_BY_THREE)
    assert need.cores == pytest.approx(3)  # 600 images/s of 5 ms
    assert need.mb_per_s == pytest.approx(30)  # 600 of 50 kB
    assert need.pixel_mb_per_s == pytest.approx(90)
    assert need.requests_in_flight == pytest.approx(60)  # 600 a second, each for 0.1 s


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "num_tasks"),
    [(8, 1, 7), (32, 4, 28), (4, 4, 4), (1, 1, 1), (1, 8, 8)],
    ids=["a core for the actor", "a core for each actor", "half a core each", "one core", "many GPUs on one core"],
)
def test_fetching_tasks_share_the_cores_with_actors(num_cpus: int, num_gpus: int, num_tasks: int) -> None:
    assert num_fetch_tasks(num_cpus, num_gpus) == num_tasks


@pytest.mark.parametrize(
    ("num_cpus", "num_gpus", "rate", "bottleneck"),
    [
        (8, 1, 600, "captioning"),
        (8, 4, 800, "fetching and decoding on the CPUs"),  # 4 of 8 cores beside 4 actors, 200 images/s each
        (32, 4, 2400, "captioning"),
        (1, 8, 200, "fetching and decoding on the CPUs"),  # 8 tasks on one core are one core
    ],
)
def test_gpus_caption_what_the_cores_feed_them(num_cpus: int, num_gpus: int, rate: float, bottleneck: str) -> None:
    found, limit = images_per_s(FED_BY_THREE, num_cpus, num_gpus)
    assert found == pytest.approx(rate)
    assert limit == bottleneck


def test_without_gpus_the_cores_do_both() -> None:
    rates = Rates(captions_per_s=25, feed_core_s=0.01, read_s=0.1, image_bytes=50_000, pixel_bytes=150_000)
    found, limit = images_per_s(rates, 10, 0)
    assert found == pytest.approx(200)  # 40 ms and 10 ms of each image
    assert limit == "captioning"


@pytest.mark.parametrize(
    ("num_images", "hours", "nodes"), [(3_600_000, 1, 10), (3_600_001, 1, 11), (3_600_000, 4, 3), (1, 100, 1)]
)
def test_nodes_are_whole_and_enough(num_images: int, hours: float, nodes: int) -> None:
    assert num_nodes(num_images, hours, 100) == nodes
