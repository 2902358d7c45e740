"""The endpoint on Ray Serve.

    HTTP proxy -> Ingress (checks, decodes; CPU) -> a deployment for each model (batches, captions; GPU or CPU)

Pixels pass once, from the ingress to a replica. torch is imported by the replicas of models alone.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import ray
from pydantic import TypeAdapter, ValidationError
from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from raycap.errors import ConfigurationError
from raycap.images import Preprocessing
from raycap.on_ray import connect
from raycap.serve.api import create_app
from raycap.serve.backend import Array, ModelInfo, Result
from raycap.serve.captions import Room
from raycap.serve.config import ServeConfig
from raycap.serve.health import caption_sample
from raycap.serve.problems import RETRY_AFTER_S, overloaded, unavailable
from raycap.serve.resources import INGRESS_CPUS, Resources, check_room, plan_resources
from raycap.serve.schemas import Options

if TYPE_CHECKING:
    from starlette.types import ASGIApp

log = logging.getLogger(__name__)

APP = "raycap"
SPARE_S = 10.0
"""What Ray waits beyond the deadline of requests, which the ingress keeps: for requests and for replicas that end."""
BESIDE = 1000
"""Requests that an ingress may have beyond its queue: those that it refuses, health, metrics. What comes beyond these
Ray's proxy refuses, in plain text; with a limit of 24, a burst of 100 requests met it."""
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)  # the guard writes the access log


class ModelReplica:
    """One process with one model. It is there when it has captioned a photo."""

    async def __init__(self, config: ServeConfig, location: str | None, device: str, num_threads: int) -> None:
        import torch

        from raycap.model.bundle import Bundle
        from raycap.serve.model import OnlineCaptioner, ServedModel

        _log_to_stderr()
        torch.set_num_threads(num_threads)
        bundle = Bundle.load(location, s3=config.s3)
        captioner = OnlineCaptioner(bundle, device=device, precision=config.precision, engine=config.engine)
        self._model = ServedModel(captioner, batch_size=config.batch_size, batch_wait_s=config.batch_wait_ms / 1000)
        await caption_sample(self._model)

    async def info(self) -> ModelInfo:
        """See `Backend.info`."""
        return await self._model.info()

    async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
        """See `Backend.caption`."""
        return await self._model.caption(pixels_BHWC, preprocessing, options)


class ReplicaBackend:
    """A `Backend` behind a handle: whichever replica of the model has the least to do."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def info(self) -> ModelInfo:
        """See `Backend.info`."""
        info: ModelInfo = await self._answer(self._handle.info.remote())
        return info

    async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
        """See `Backend.caption`."""
        results: list[Result] = await self._answer(self._handle.caption.remote(pixels_BHWC, preprocessing, options))
        return results

    async def _answer(self, response: Any) -> Any:
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise overloaded() from None
        except RayTaskError:  # an error of the model's, not of the way to it
            raise
        except (RayError, DeploymentUnavailableError) as error:
            log.warning("a replica has gone: %s", error)
            raise unavailable() from None


@ray_serve.ingress()
class Ingress:
    """One process that takes requests."""

    def __init__(self, config: ServeConfig, models: dict[str, DeploymentHandle[Any]]) -> None:
        _log_to_stderr()
        self._config = config
        self._models = models
        self._room = Room(config.max_queue)

    async def close(self) -> None:
        """Refuse new requests; return when those that came before are answered."""
        await self._room.close()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        backends = {name: ReplicaBackend(handle) for name, handle in self._models.items()}
        return create_app(self._config, backends, room=self._room, names_answers=False)


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
    return _application(config, plan_resources(config, _nodes()))


def serve(config: ServeConfig) -> int:
    """Answer requests until SIGINT or SIGTERM, then answer what has come in, and end; return the exit code.

    Raises ConfigurationError if the endpoint cannot start.
    """
    from raycap.model.bundle import Bundle

    for location in config.bundles.values():
        Bundle.load(location, s3=config.s3)  # a wrong one is told here; from a replica it would come as a traceback
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    connect(config.ray_address)
    resources = plan_resources(config, _nodes())
    check_room(config, resources, _nodes())
    options = HTTPOptions(host=config.host, port=config.port, request_timeout_s=config.deadline_s + SPARE_S)
    try:
        ray_serve.start(http_options=options, logging_config=LOGGING)
        ingress = ray_serve.run(_application(config, resources), name=APP, route_prefix="/", logging_config=LOGGING)
    except RuntimeError as error:
        raise ConfigurationError(f"the endpoint did not start: {' '.join(str(error).split())}") from error
    log.info("answering at http://%s:%d", config.host, config.port)
    _wait_for_signal()
    log.info("answering what has come in")
    ingress.broadcast("close").results(timeout_s=config.deadline_s + SPARE_S)
    ray_serve.delete(APP)
    ray.shutdown()  # of a cluster, which may serve other applications, this only lets go
    return 0


def _wait_for_signal() -> None:
    """Return at the first SIGINT or SIGTERM; the next one does what it did before."""
    came = threading.Event()
    before = {number: signal.signal(number, lambda *_: came.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    came.wait()
    for number, handler in before.items():
        signal.signal(number, handler)


def _application(config: ServeConfig, resources: Resources) -> Application:
    drain_s = config.deadline_s + SPARE_S
    # The ingress keeps to its room; Ray's own queues are a second fence, a little further out.
    scaling: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.max_replicas is not None:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.num_replicas,
                max_replicas=config.max_replicas,
                target_ongoing_requests=2 * config.batch_size,  # a batch in work and the next one waiting
            )
        }
    model = ray_serve.deployment(
        **scaling,
        max_ongoing_requests=config.max_queue,
        max_queued_requests=config.max_queue,
        graceful_shutdown_timeout_s=drain_s,
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
        logging_config=LOGGING,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    )(Ingress)
    return ingress.bind(config, models)


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _log_to_stderr() -> None:
    """What raycap logs goes into the process's log file, which Ray keeps."""
    logger = logging.getLogger("raycap")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
