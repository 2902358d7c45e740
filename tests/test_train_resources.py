"""How a cluster is shared out for a training. What does not fit is refused, since Ray would wait for it without end."""

from __future__ import annotations

from typing import Any

import pytest

from raycap.errors import ConfigurationError
from raycap.train.resources import DECODE_CPUS, Share, decode_share, plan_share
from tests.training import tiny_config


def nodes(*cpus: float, gpus: float = 0) -> list[dict[str, float]]:
    """With the memory and the address that Ray counts among resources."""
    return [{"CPU": c, "memory": 1e10, "node:10.0.0.1": 1.0} | ({"GPU": gpus} if gpus else {}) for c in cpus]


def plan(have: list[dict[str, float]], **settings: Any) -> Share:
    return plan_share(tiny_config(batch_size=64, **settings), have)


@pytest.mark.parametrize(
    ("cpus", "num_workers", "threads"),
    [
        ((2,), 1, 2),
        ((2,), 2, 1),
        ((16,), 3, 5),
        ((4, 4, 4), 2, 4),  # not 6: no node has them
        ((7, 7, 7), 2, 7),
        ((4, 4, 4), 4, 2),  # not 3: there would be a place for three
        ((16, 4), 4, 4),
        ((8, 1, 1), 3, 2),  # all three on the first node
    ],
)
def test_workers_take_as_many_threads_as_let_all_find_a_place(
    cpus: tuple[float, ...], num_workers: int, threads: int
) -> None:
    share = plan(nodes(*cpus), num_workers=num_workers)
    assert (share.threads, share.resources) == (threads, {"CPU": threads})


def test_where_images_are_read_workers_leave_some_of_their_cores() -> None:
    assert plan(nodes(2), fine_tune_epochs=1).resources == {"CPU": 2 - DECODE_CPUS}


def test_a_gpu_for_each_worker() -> None:
    share = plan(nodes(8, 8, gpus=4), num_workers=8, use_gpu=True)
    assert (share.threads, share.resources) == (1, {"CPU": 1, "GPU": 1})


@pytest.mark.parametrize(
    ("have", "settings", "message"),
    [
        (
            nodes(4, 4),
            {"cpus_per_worker": 6},
            r"1 workers of 6 CPUs each, .* 0 \(nodes: 2, CPUs: 8, .* largest node: 4",
        ),
        (nodes(4, 4, 4), {"num_workers": 4, "cpus_per_worker": 3}, "a place for 3 "),
        (
            nodes(8, gpus=1),
            {"num_workers": 8, "use_gpu": True},
            "8 workers of 1 CPU and a GPU each, .* for 1 .*GPUs: 1",
        ),
        (nodes(1, gpus=4), {"num_workers": 2, "use_gpu": True}, "a place for 1 "),
        (nodes(4), {"use_gpu": True}, "a place for 0 .*GPUs: 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    have: list[dict[str, float]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"{message}.*or give --min-workers"):
        plan(have, **settings)


def test_min_workers_have_to_fit_alone() -> None:
    assert plan(nodes(8, gpus=1), num_workers=8, min_workers=1, use_gpu=True).threads == 1
    assert plan(nodes(8), num_workers=16, min_workers=2).threads == 1
    assert plan(nodes(4, 4), num_workers=4, min_workers=2, cpus_per_worker=4).threads == 4


def test_one_machine_reads_images_with_what_is_left_of_it() -> None:
    assert decode_share(plan(nodes(2), fine_tune_epochs=1), nodes(2), 1) == (DECODE_CPUS, 1)
    assert decode_share(plan(nodes(16), fine_tune_epochs=1, cpus_per_worker=4), nodes(16), 1) == (12.25, 49)
    assert decode_share(plan(nodes(8, gpus=4), num_workers=4, use_gpu=True), nodes(8, gpus=4), 4) == (1.0, 4)


def test_a_cluster_that_has_grown_reads_with_all_of_it() -> None:
    """Eight workers on GPUs, of which one node was there at first."""
    first = nodes(8, gpus=1) + nodes(16) + [{"memory": 1e9}]
    share = plan(first, num_workers=8, min_workers=1, use_gpu=True, fine_tune_epochs=1)
    assert decode_share(share, first, 1) == (23.25, 23), "a process for each core"
    assert decode_share(share, first + nodes(*[8] * 7, gpus=1), 8) == (9.25, 9)


def test_a_head_without_cores_is_no_second_machine() -> None:
    share = plan(nodes(8), fine_tune_epochs=1, cpus_per_worker=4)
    assert decode_share(share, [{"CPU": 0.0, "memory": 1e9}, *nodes(8)], 1) == decode_share(share, nodes(8), 1)
