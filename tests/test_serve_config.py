"""The endpoint's settings, and what its processes get of a cluster."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from raycap.errors import ConfigurationError
from raycap.serve.config import DEFAULT_MODEL, ServeConfig
from raycap.serve.resources import check_address, check_room, plan_resources

CPU_NODE, GPU_NODE = {"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 0}, "--port must be from 1"),
        ({"num_replicas": 0}, "--num-replicas must be at least 1"),
        ({"num_replicas": 3, "max_replicas": 2}, "--max-replicas must be at least --num-replicas"),
        ({"max_replicas": 5}, "is for 10 batches in work of each ingress; --max-queue must be at least 160, got 128"),
        ({"max_replicas": 4, "num_ingress": 4, "max_queue": 63}, "--max-queue must be at least 64, got 63"),
        ({"max_replicas": 9, "num_ingress": 2}, "--max-queue must be at least 144, got 128"),
        ({"num_ingress": 0}, "--num-ingress"),
        ({"gpus_per_replica": 1.5}, "must be a whole number"),
        ({"gpus_per_replica": -1}, "must not be negative"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_wait_ms": -1}, "--batch-wait-ms"),
        ({"drain_s": -1}, "--drain-s must not be negative"),
        ({"max_queue": 8}, "--max-queue must hold"),
        ({"deadline_s": 0}, "--deadline-s must be above 0"),
        ({"max_latency_s": 0}, "--max-latency-s must be above 0"),
        ({"max_latency_s": 31}, "--max-latency-s must be at most --deadline-s, 30, got 31"),
        ({"max_body_mb": 0}, "--max-body-mb must be above 0"),
        ({"rate_limit": 5}, "give --keys-file too"),
        ({"cors_origins": ("example.org",)}, "expected origins such as https://example.org"),
        ({"cors_origins": ("https://example.org/",)}, "expected origins such as https://example.org"),
        ({"model": ("a=x", "a=y")}, "each name once"),
        ({"model": ("x", "y")}, "each name once"),
        ({"model": ("a=x", "b=y"), "canary": "b=0"}, "share above 0 and up to 1"),
        ({"model": ("a=x", "b=y"), "canary": "b=1.1"}, "share above 0 and up to 1"),
        ({"model": ("a=x", "b=y"), "canary": "b=x"}, "share above 0 and up to 1"),
        ({"model": ("a=x", "b=y"), "canary": "b"}, "share above 0 and up to 1"),
        ({"model": ("a=x", "b=y"), "canary": "a=0.5"}, "gives after the first, got 'a'"),
        ({"canary": "new=0.5"}, "gives after the first, got 'new'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ServeConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"max_replicas": 4}, {"max_replicas": 8, "num_ingress": 2}, {"num_replicas": 8, "max_replicas": 8}],
)
def test_as_many_replicas_as_the_queue_can_call_for_are_let_pass(settings: dict[str, Any]) -> None:
    assert ServeConfig(**settings).max_replicas == settings["max_replicas"]


def test_models_have_names() -> None:
    assert ServeConfig().bundles == {DEFAULT_MODEL: None}
    assert ServeConfig(model=("s3://bucket/run=3/bundle",)).bundles == {DEFAULT_MODEL: "s3://bucket/run=3/bundle"}
    config = ServeConfig(model=("new=s3://bucket/run=3/bundle", "old=bundles/old"))
    assert list(config.bundles.items()) == [("new", "s3://bucket/run=3/bundle"), ("old", "bundles/old")]


def test_replicas_share_the_cores_of_a_machine() -> None:
    alone = plan_resources(ServeConfig(), [CPU_NODE])
    assert (alone.num_threads, alone.gpus) == (8, 0)
    shared = ServeConfig(num_replicas=2, model=("a=x", "b=y"))
    resources = plan_resources(shared, [CPU_NODE])
    assert resources.num_threads == 2
    check_room(shared, resources, [CPU_NODE])
    chosen = ServeConfig(cpus_per_replica=3)
    assert plan_resources(chosen, [CPU_NODE]).num_threads == 3


@pytest.mark.parametrize(
    ("settings", "max_partial", "max_running", "per_replica"),
    [
        ({}, 2, 2, 2),
        ({"num_replicas": 3}, 6, 6, 2),
        ({"num_ingress": 2}, 1, 1, 2),
        ({"num_ingress": 3}, 1, 1, 3),
        ({"num_replicas": 3, "num_ingress": 4}, 2, 2, 8 / 3),
        ({"max_replicas": 4}, 2, 8, 2),
        ({"num_replicas": 2, "max_replicas": 8, "num_ingress": 2}, 2, 8, 2),
    ],
)
def test_a_replica_has_a_batch_in_work_and_the_next_one_waiting(
    settings: dict[str, Any], max_partial: int, max_running: int, per_replica: float
) -> None:
    config = ServeConfig(**settings)
    calls = config.calls
    assert (calls.max_partial(config.num_replicas), calls.max_running) == (max_partial, max_running)
    assert calls.per_replica == pytest.approx(per_replica)
    # Ray starts as many replicas as all ingresses have calls out for.
    most = config.num_ingress * calls.max_running / calls.per_replica
    assert most >= (config.max_replicas or config.num_replicas)


def test_replicas_take_gpus_where_there_are_any() -> None:
    assert plan_resources(ServeConfig(), [CPU_NODE, GPU_NODE]).gpus == 1
    assert plan_resources(ServeConfig(device="cpu"), [GPU_NODE]).gpus == 0
    quarter = ServeConfig(gpus_per_replica=0.25, num_replicas=8)
    check_room(quarter, plan_resources(quarter, [GPU_NODE]), [GPU_NODE])


def test_where_nobody_can_listen_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"--port {port}: another program listens there"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    with pytest.raises(ConfigurationError, match=r"nobody can listen at --host 203\.0\.113\.77"):
        check_address("203.0.113.77", port)
    with pytest.raises(ConfigurationError, match=r"--host no\.such\.host\.invalid"):
        check_address("no.such.host.invalid", port)


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        ({"device": "cuda"}, [CPU_NODE]),
        ({"precision": "float16"}, [CPU_NODE]),
        ({"gpus_per_replica": 1}, [CPU_NODE]),
        ({"gpus_per_replica": 1, "num_replicas": 3}, [GPU_NODE]),
        ({"cpus_per_replica": 8, "num_replicas": 2}, [CPU_NODE]),
    ],
)
def test_what_the_cluster_has_no_room_for_is_refused(settings: dict[str, Any], nodes: list[dict[str, float]]) -> None:
    config = ServeConfig(**settings)
    with pytest.raises(ConfigurationError, match="need"):
        check_room(config, plan_resources(config, nodes), nodes)
