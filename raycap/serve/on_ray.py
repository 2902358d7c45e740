"""The endpoint on Ray Serve.

    HAProxy -> front -> Ingress (checks, decodes; CPU) -> a deployment for each model (batches, captions; GPU or CPU)

What runs in the processes of the last two is in replicas/on_ray.py, and front is in the ingress's. Where there is no
HAProxy, front is in one of Ray's Python proxies, from which requests go on to an ingress.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from queue import SimpleQueue
from types import FrameType
from typing import Any

import ray
from pydantic import TypeAdapter, ValidationError
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, ControllerOptions, HTTPOptions
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus, LoggingConfig

from raycap.errors import ConfigurationError
from raycap.on_ray import cluster_address, connect
from raycap.serve import front, haproxy
from raycap.serve.config import ServeConfig
from raycap.serve.keys import ApiKeys
from raycap.serve.problems import RETRY_AFTER_S
from raycap.serve.replicas.on_ray import SPARE_S, Ingress, ModelReplica
from raycap.serve.resources import INGRESS_CPUS, Resources, check_address, check_room, plan_resources
from raycap.serve.urls import UrlFetcher

log = logging.getLogger(__name__)

APP = "raycap"
SURGE_PERCENT = 100
"""In an upgrade the new replicas come first, as far as there is room, and each of the old ones goes for one of them."""
STATUS_S = 0.5
"""Ray is asked so often whether the endpoint has come up."""
BESIDE = 1000
"""Requests that an ingress may have beyond its queue: those that it refuses, health, metrics. What comes beyond these
Ray's proxy refuses, and has no line in the log; with a limit of 24, a burst of 100 requests met it."""
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)  # the guard writes the access log


def build_app(args: dict[str, Any]) -> Application:
    """The application for the config file of `serve deploy`: `args` are fields of `ServeConfig`.

    Host and port are those of the file's http_options. Raises ConfigurationError for wrong settings.
    """
    unknown = ", ".join(sorted(args.keys() - {field.name for field in fields(ServeConfig)}))
    if unknown:
        raise ConfigurationError(f"args: {unknown} is no setting of the endpoint; see raycap serve --help")
    try:
        config = TypeAdapter(ServeConfig).validate_python(args)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigurationError(f"args: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if front.max_body_mb() < config.max_body_mb:
        raise ConfigurationError(
            f"args: max_body_mb is {config.max_body_mb:g}, but Ray's proxies let {front.max_body_mb():g} MB through; "
            f"set {front.MAX_BODY_MB} in the environment of the cluster's nodes"
        )
    if front.CALLBACK not in os.environ:
        log.warning(
            "Ray's proxies answer for themselves: set in the nodes' environment %s",
            front.environment(config.max_body_mb),
        )
    _check_hosts(config)
    resources = plan_resources(config, _nodes())
    try:
        check_room(config, resources, _nodes())
    except ConfigurationError as error:
        log.warning("waiting for the cluster to grow: %s", error)
    return _application(config, resources)


def serve(config: ServeConfig) -> int:
    """Answer requests until SIGINT or SIGTERM, then answer what has come in, and end; return the exit code.

    Raises ConfigurationError if the endpoint cannot start.
    """
    from raycap.model.bundle import Bundle

    # What is wrong is told here: from a replica it would come as a traceback.
    for location in config.bundles.values():
        Bundle.load(location, s3=config.s3)
    _check_hosts(config)
    if cluster_address(config.ray_address) is None:  # a cluster's nodes have files and ports of their own
        if config.keys_file:
            ApiKeys(config.keys_file)
        check_address(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    connect(config.ray_address)
    resources = plan_resources(config, _nodes())
    check_room(config, resources, _nodes())
    application = _application(config, resources)
    try:
        start_proxies(config)
        with _signals() as came:
            target = ray_serve.RunTarget(application, name=APP, route_prefix="/", logging_config=LOGGING)
            # It may answer before Ray says so: a signal must find us waiting from here on.
            [ingress] = ray_serve.run_many([target], wait_for_applications_running=False)
            is_running = _wait_until_running(came)
            if is_running:
                _client().wait_for_proxies_serving()
                log.info("answering at http://%s:%d", config.host, config.port)
            drain_s = config.drain_s if came.get() == signal.SIGTERM else 0.0
    except (RuntimeError, TimeoutError, RayError) as error:
        raise ConfigurationError(f"the endpoint did not start: {' '.join(str(error).split())}") from error
    log.info("answering what has come in")
    try:
        closing = ingress.broadcast("close", drain_s)
        closing.results(timeout_s=drain_s + config.deadline_s + SPARE_S, return_exceptions=True)
    except (TimeoutError, RayError, DeploymentUnavailableError) as error:
        if is_running:
            log.warning("the endpoint did not end in time: %s", error)
    try:
        ray_serve.delete(APP, _blocking=is_running)
    except (TimeoutError, RayError) as error:
        log.warning("the endpoint was not removed from Ray Serve: %s", error)
    ray.shutdown()  # of a cluster, which may serve other applications, this only lets go
    return 0


def start_proxies(config: ServeConfig) -> None:
    """Have Ray's HTTP proxies listen, with `front` before them.

    Raises ConfigurationError if they listen elsewhere already: Ray would leave them as they are.
    """
    timeout_s = config.deadline_s + SPARE_S
    client = _client()
    if client is not None:
        there = client.http_config
        there_s = math.inf if there.request_timeout_s is None else there.request_timeout_s
        if (there.host, there.port) != (config.host, config.port) or there_s < timeout_s:
            raise ConfigurationError(
                f"Ray Serve on this cluster listens at {there.host}:{there.port} already, for {there_s:g} s a request: "
                f"give --host {there.host}, --port {there.port} and a --deadline-s of at most {there_s - SPARE_S:g}, "
                "or end it with `serve shutdown`"
            )
    # Ray kills a proxy that takes longer than this to start, 5 s by default, and the start with it: on a busy machine.
    environment = front.environment(config.max_body_mb) | {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    program = haproxy.program()
    # The nodes of a cluster may have the program elsewhere, or not at all.
    if program is not None and cluster_address(config.ray_address) is None:
        environment |= haproxy.environment(str(program)) | haproxy.own_environment()
    ray_serve.start(
        http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=timeout_s),
        controller_options=ControllerOptions(runtime_env={"env_vars": environment}),
        logging_config=LOGGING,
    )


@contextmanager
def _signals() -> Iterator[SimpleQueue[int]]:
    """Gives the queue to which the first SIGINT or SIGTERM goes; the next one does what it did before."""
    came: SimpleQueue[int] = SimpleQueue()

    def put(number: int, _: FrameType | None) -> None:
        restore()
        came.put(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, put)
        yield came
    finally:
        restore()


def _wait_until_running(came: SimpleQueue[int]) -> bool:
    """Whether the endpoint came up before a signal did. Raises RuntimeError if it cannot start."""
    while came.empty():
        app = ray_serve.status().applications.get(APP)
        if app is None:
            raise RuntimeError("it was removed from Ray Serve")
        if app.status == ApplicationStatus.RUNNING:
            return True
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(app.message)
        time.sleep(STATUS_S)
    return False


def _client() -> Any:
    """Of Ray Serve, where it runs."""
    return ray_serve.context._get_global_client(raise_if_no_controller_running=False)


def _check_hosts(config: ServeConfig) -> None:
    """Raise ConfigurationError for names that an ingress would refuse when it starts."""
    if config.allow_urls:
        UrlFetcher(config.allow_urls, max_bytes=config.max_body_bytes)


def _application(config: ServeConfig, resources: Resources) -> Application:
    drain_s = config.deadline_s + SPARE_S
    # The ingress keeps to its room; Ray's own queues are a second fence, a little further out.
    scaling: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.num_replicas,
                max_replicas=config.max_replicas,
                target_ongoing_requests=config.calls.per_replica,
            )
        }
    model = ray_serve.deployment(
        **scaling,
        max_ongoing_requests=config.max_queue,
        max_queued_requests=config.max_queue,
        graceful_shutdown_timeout_s=drain_s,
        max_surge_percent=SURGE_PERCENT,
        logging_config=LOGGING,
        ray_actor_options={"num_cpus": resources.cpus, "num_gpus": resources.gpus},
    )(ModelReplica)
    device = config.device if resources.gpus else "cpu"
    models = {
        name: model.options(name=f"model-{name}").bind(config, location, device, resources.num_threads)
        for name, location in config.bundles.items()
    }
    ingress = ray_serve.deployment(
        num_replicas=config.num_ingress,
        max_ongoing_requests=config.max_queue + BESIDE,
        max_queued_requests=BESIDE,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=drain_s,
        max_surge_percent=SURGE_PERCENT,
        logging_config=LOGGING,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    )(Ingress)
    return ingress.bind(config, models)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
