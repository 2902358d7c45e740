"""How a cluster is shared out. What does not fit is refused, since Ray would wait for it without an end."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from raycap.bulk.config import CaptionConfig
from raycap.bulk.layout import CHUNKS_PER_SHARD
from raycap.bulk.resources import FETCH_CPUS, PLACES, Resources, plan_resources, plan_tasks
from raycap.errors import ConfigurationError


def plan(nodes: list[dict[str, float]], **settings: Any) -> Resources:
    return plan_resources(CaptionConfig(source="a", output="b", **settings), nodes)


def nodes(count: int, cpus: float, gpus: float = 0) -> list[dict[str, float]]:
    return [{"CPU": cpus, "memory": 1e10} | ({"GPU": gpus} if gpus else {}) for _ in range(count)]


def test_laptop() -> None:
    assert plan(nodes(1, 2)) == Resources(
        num_actors=2,
        max_actors=2,
        device="cpu",
        gpus_per_actor=0,
        cpus_per_actor=0.75,
        threads_per_actor=1,
        cpus_per_fetch=FETCH_CPUS,
    )


def test_large_cpu_machine_runs_actors_of_four_threads() -> None:
    found = plan(nodes(1, 64))
    assert (found.num_actors, found.threads_per_actor, found.cpus_per_actor) == (16, 4, 3)


def test_one_gpu() -> None:
    assert plan(nodes(1, 16, 1)) == Resources(
        num_actors=1,
        max_actors=1,
        device="cuda",
        gpus_per_actor=1,
        cpus_per_actor=1,
        threads_per_actor=1,
        cpus_per_fetch=1,
    )


def test_gpu_nodes_fed_by_cpu_nodes() -> None:
    found = plan([*nodes(2, 8, 4), *nodes(10, 32)])
    assert (found.num_actors, found.gpus_per_actor, found.cpus_per_actor) == (8, 1, 1)


def test_gpus_can_be_shared_or_left_alone() -> None:
    assert plan(nodes(1, 16, 2), gpus_per_actor=0.5).num_actors == 4
    assert plan(nodes(1, 16, 2), gpus_per_actor=0.1).num_actors == 20
    assert plan(nodes(1, 16, 2), gpus_per_actor=0.6).num_actors == 2  # not 3: no actor lies across two GPUs
    assert plan(nodes(1, 16, 8), gpus_per_actor=2).num_actors == 4
    assert plan(nodes(1, 16, 2), gpus_per_actor=0).gpus_per_actor == 0
    assert plan(nodes(1, 16, 2), device="cpu").gpus_per_actor == 0
    assert plan(nodes(1, 16, 2), num_actors=1).num_actors == 1


def test_actors_are_on_what_is_reserved_for_them() -> None:
    for settings, device in (
        ({}, "cuda"),
        ({"device": "cuda"}, "cuda"),
        ({"gpus_per_actor": 0.5}, "cuda"),
        ({"gpus_per_actor": 0}, "cpu"),
        ({"device": "cpu"}, "cpu"),
        ({"device": "cpu", "gpus_per_actor": 1}, "cpu"),  # where a GPU is only said to be
    ):
        assert plan(nodes(1, 16, 1), **settings).device == device, settings
    assert plan(nodes(1, 16)).device == "cpu"


def test_there_can_be_more_actors_than_at_the_start() -> None:
    for cluster in (nodes(1, 8, 1), nodes(1, 1)):
        assert [plan(cluster, **each).max_actors for each in ({}, {"max_actors": 1}, {"max_actors": 9})] == [1, 1, 9]


def test_few_cores_beside_gpus_leave_some_for_fetching() -> None:
    for cpus, gpus in ((1, 1), (2, 4), (4, 4)):
        found = plan(nodes(1, cpus, gpus))
        assert found.num_actors == gpus
        assert found.num_actors * found.cpus_per_actor + found.cpus_per_fetch <= cpus


def test_threads_are_no_more_than_a_node_has() -> None:
    found = plan(nodes(8, 2))
    assert (found.num_actors, found.threads_per_actor) == (16, 1)


def test_head_node_without_cores_does_not_count() -> None:
    assert plan([{"CPU": 0, "memory": 1e9}, *nodes(2, 4)]).num_actors == 8


@pytest.mark.parametrize(
    ("cluster", "settings", "message"),
    [
        (nodes(1, 0), {}, "no CPU cores"),
        ([{}], {}, "no CPU cores"),
        (nodes(1, 4), {"gpus_per_actor": 1}, "1 actors with 1 GPUs each, but the cluster has 0 GPUs"),
        (nodes(1, 8, 1), {"gpus_per_actor": 1, "num_actors": 2}, "room for 1; lower --num-actors"),
        (nodes(2, 8, 1), {"gpus_per_actor": 2}, "room for 0"),
        (nodes(1, 4), {"num_actors": 6}, "lower --num-actors, --cpus-per-actor or --num-cpus-per-fetch"),
        (nodes(1, 4), {"cpus_per_actor": 8}, "lower --num-actors, --cpus-per-actor or --num-cpus-per-fetch"),
        (nodes(4, 2), {"cpus_per_actor": 4}, "2 on its largest node"),
        (nodes(1, 4), {"device": "cuda"}, "--device cuda needs GPUs"),
        (nodes(1, 4), {"precision": "float16"}, "--precision float16 needs GPUs"),
        (nodes(1, 4), {"device": "cuda"}, "none of the cluster's 0; start when a node with a GPU is up"),
        (nodes(1, 4, 1), {"device": "cuda", "gpus_per_actor": 0}, "--device cuda needs GPUs"),
    ],
)
def test_what_does_not_fit_is_refused(cluster: list[dict[str, float]], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan(cluster, **settings)


def test_every_default_plan_can_be_placed() -> None:
    """Actors node by node, and then one fetching task at least."""
    for count, cpus, gpus in product((1, 2, 5), (1, 2, 3, 4, 7, 8, 16, 64), (0, 1, 8)):
        cluster = nodes(count, cpus, gpus)
        found = plan(cluster)
        free = [dict(node) for node in cluster]
        for _ in range(found.num_actors):
            node = next(
                node
                for node in free
                if node["CPU"] >= found.cpus_per_actor and node.get("GPU", 0) >= found.gpus_per_actor
            )
            node["CPU"] -= found.cpus_per_actor
            node["GPU"] = node.get("GPU", 0) - found.gpus_per_actor
        assert max(node["CPU"] for node in free) >= found.cpus_per_fetch, (count, cpus, gpus)


def test_few_chunks_are_a_task_each() -> None:
    assert plan_tasks(np.array([0, 2, 5, 40]), 16) == [[0], [2], [5], [40]]


def test_a_task_has_chunks_of_one_shard() -> None:
    todo = np.delete(np.arange(100 * CHUNKS_PER_SHARD), 17)
    tasks = plan_tasks(todo, 16)
    assert sorted(chunk for task in tasks for chunk in task) == todo.tolist()
    assert all(task == sorted(task) and len({chunk // CHUNKS_PER_SHARD for chunk in task}) == 1 for task in tasks)
    assert len(tasks) == 100


def test_tasks_that_run_together_are_from_all_over_the_listing() -> None:
    tasks = plan_tasks(np.arange(6400 * CHUNKS_PER_SHARD), 64)
    first = sorted(task[0] // CHUNKS_PER_SHARD for task in tasks[:PLACES])
    assert first == [100 * place for place in range(PLACES)]
