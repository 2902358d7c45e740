"""What runs in the processes of Ray Serve: models, and what takes requests.

Pixels pass once, from an ingress to a replica. torch is imported by the replicas of models alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from grpc.aio import AioRpcError
from prometheus_client.metrics_core import Metric
from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from raycap.images import Preprocessing
from raycap.serve.access import log_to_stderr
from raycap.serve.api import create_app
from raycap.serve.backend import Array, Job, ModelChangedError, ModelInfo, Result
from raycap.serve.batching import Batcher
from raycap.serve.config import ServeConfig
from raycap.serve.health import caption_sample
from raycap.serve.metrics import Metrics, UnionOfMetrics
from raycap.serve.problems import overloaded, unavailable
from raycap.serve.room import room_for
from raycap.serve.schemas import Options

if TYPE_CHECKING:
    from starlette.types import ASGIApp

log = logging.getLogger(__name__)

SPARE_S = 10.0
"""What Ray waits beyond the deadline of requests, which the ingress keeps: for requests and for replicas that end."""
CHECK_S = 20.0
"""For the caption that a replica under suspicion must give; Ray itself waits 30 s for the check."""
SPIN_COUNT = "30000"
"""Loops in which PyTorch's threads wait for work before they sleep: some 100 us, which is more than lies between two
steps of a search. libgomp's own 300,000 take the cores from the ingress and from what it decodes; with 3,000 they sleep
so often that a single image takes 1.1 times as long."""
REPLICA_S = 30.0
"""A replica that answered is believed to be there for so long."""
METRICS_S = 5.0
"""The ingresses have so long to tell their numbers to the one that was asked."""


class ModelReplica:
    """One process with one model. It is there when it has captioned a photo."""

    async def __init__(self, config: ServeConfig, location: str | None, device: str, num_threads: int) -> None:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is imported
        import torch

        from raycap.model.bundle import Bundle
        from raycap.serve.model import OnlineCaptioner, ServedModel

        def load() -> OnlineCaptioner:
            torch.set_num_threads(num_threads)
            bundle = Bundle.load(location, s3=config.s3)
            return OnlineCaptioner(bundle, device=device, precision=config.precision, engine=config.engine)

        log_to_stderr()
        thread = ThreadPoolExecutor(1, "raycap-model")
        captioner = await asyncio.get_running_loop().run_in_executor(thread, load)
        self._model = ServedModel(captioner, batch_size=config.batch_size, thread=thread)
        self._name = ray_serve.get_replica_context().replica_tag
        self._longest_s = config.deadline_s + SPARE_S
        await caption_sample(self._model)

    async def check_health(self) -> None:
        """Raise if the model answers no more, though its process lives: Ray then starts another in its place."""
        if self._model.is_suspect(self._longest_s):
            async with asyncio.timeout(CHECK_S):
                await caption_sample(self._model)

    async def info(self) -> ModelInfo:
        """See `Backend.info`."""
        return await self._model.info()

    async def caption(
        self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Sequence[Options]
    ) -> tuple[str, list[Result]]:
        """This replica's name, and what `ServedModel.caption_each` gives."""
        return self._name, await self._model.caption_each(pixels_BHWC, preprocessing, options)


class ReplicaBackend:
    """A `Backend` behind a handle: whichever replica of the model has the least to do.

    Images of many requests go in one call, since each costs both processes some milliseconds.
    """

    def __init__(
        self, handle: DeploymentHandle[Any], config: ServeConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._handle = handle
        self._config = config
        self._calls = config.calls
        self._clock = clock
        self._batchers: dict[Preprocessing, Batcher[Job, Result]] = {}
        """By what was prepared for which bundle: several while one takes another's place."""
        self._answered_s: dict[str, float] = {}
        """When each replica answered last."""

    async def info(self) -> ModelInfo:
        """See `Backend.info`."""
        info: ModelInfo = await self._answer(self._handle.info.remote())
        return info

    async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
        """See `Backend.caption`."""
        jobs = [Job(pixels_HWC, options) for pixels_HWC in pixels_BHWC]
        batcher = self._batcher(preprocessing)
        asked = [asyncio.ensure_future(batcher.submit(job)) for job in jobs]
        try:
            found = await asyncio.gather(*asked)
            if len({each.answer.model_id for each in found}) == 1:
                return [replace(each.answer, queue_s=each.queue_s + each.answer.queue_s) for each in found]
        except ModelChangedError:
            if len(jobs) == 1:
                raise
        finally:
            for each in asked:
                each.cancel()
        # While bundles change places, one replica must answer for all of a request's images.
        return await self._ask(preprocessing, jobs)

    @property
    def num_replicas(self) -> int:
        """As many as there are at least, or as have answered of late: some of these may have died."""
        return min(max(self._config.num_replicas, len(self._answered_s)), self._calls.max_replicas)

    def _batcher(self, preprocessing: Preprocessing) -> Batcher[Job, Result]:
        if preprocessing not in self._batchers:
            self._batchers[preprocessing] = Batcher(
                partial(self._ask, preprocessing),
                max_size=self._config.batch_size,
                wait_s=self._config.batch_wait_ms / 1000,
                max_running=self._calls.max_running,
            )
        batcher = self._batchers[preprocessing]
        batcher.max_partial, batcher.num_shares = self._calls.max_partial(self.num_replicas), self.num_replicas
        return batcher

    async def _ask(self, preprocessing: Preprocessing, jobs: Sequence[Job]) -> list[Result]:
        pixels_BHWC = np.stack([job.pixels_HWC for job in jobs])
        response = self._handle.caption.remote(pixels_BHWC, preprocessing, [job.options for job in jobs])
        answer: tuple[str, list[Result]] = await self._answer(response)
        replica, results = answer
        now_s = self._answered_s[replica] = self._clock()
        self._answered_s = {name: at_s for name, at_s in self._answered_s.items() if now_s - at_s <= REPLICA_S}
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
        except (RayError, DeploymentUnavailableError, AioRpcError) as error:
            log.warning("a replica has gone: %s", error)
            raise unavailable() from None


class IngressMetrics(Metrics):
    """The numbers of one ingress, and the way to those of the others."""

    def __init__(self) -> None:
        super().__init__()
        context = ray_serve.get_replica_context()
        self._name, self._deployment = context.replica_tag, (context.deployment, context.app_name)
        self._handle: DeploymentHandle[Any] | None = None

    def mine(self) -> tuple[str, list[Metric]]:
        """With the name of this process."""
        return self._name, self.families()

    async def told(self) -> bytes:
        """See `Metrics.told`."""
        if self._handle is None:
            self._handle = await asyncio.to_thread(ray_serve.get_deployment_handle, *self._deployment)
        try:
            found = await self._handle.broadcast("numbers").results_async(timeout_s=METRICS_S, return_exceptions=True)
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            log.warning("the other ingresses' numbers are missing: %s", error)
            found = []
        return UnionOfMetrics(dict([self.mine(), *(each for each in found if isinstance(each, tuple))])).text()


@ray_serve.ingress()
class Ingress:
    """One process that takes requests."""

    def __init__(self, config: ServeConfig, models: dict[str, DeploymentHandle[Any]]) -> None:
        log_to_stderr()
        self._config = config
        # A handle asks as the process that made it was told to (see `front.environment`): let that be this one.
        self._models = {
            name: ray_serve.get_deployment_handle(handle.deployment_name, handle.app_name)
            for name, handle in models.items()
        }
        self._room = room_for(config)
        self._metrics = IngressMetrics()

    async def numbers(self) -> tuple[str, list[Metric]]:
        """See `IngressMetrics.mine`."""
        return self._metrics.mine()

    async def close(self, drain_s: float) -> None:
        """For `drain_s` say that the end is near, then refuse new requests; return when those before are answered."""
        # The driver deletes the application then, or if it was killed meanwhile, as by `ray job stop` after 3 s, this.
        app = ray_serve.get_replica_context().app_name
        asyncio.get_running_loop().call_later(
            drain_s + self._config.deadline_s + 2 * SPARE_S, ray_serve.delete, app, False
        )
        self._room.leave()
        await asyncio.sleep(drain_s)
        await self._room.close()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        backends = {name: ReplicaBackend(handle, self._config) for name, handle in self._models.items()}
        return create_app(self._config, backends, room=self._room, metrics=self._metrics, names_answers=False)
