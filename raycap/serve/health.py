"""Whether the models answer: with real captions, not with a promise."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Callable
from importlib.resources import files

import numpy as np

from raycap.images import Preprocessing, decode_image
from raycap.serve.backend import Array, Backend, ModelInfo, Result
from raycap.serve.problems import ProblemError
from raycap.serve.schemas import Options

log = logging.getLogger(__name__)

PROBE_S = 10.0
"""An answer is believed for so long."""
RETRY_S = 1.0
"""And a failure for so long."""
PROBE_DEADLINE_S = 10.0
WAIT_S = 3.0
"""Nobody waits longer to hear how a model is: load balancers give up after 5 s or so."""
SAMPLE = "dog.jpg"


async def caption_sample(backend: Backend) -> None:
    """Have it caption a photo; raise what it raises."""
    preprocessing = (await backend.info()).preprocessing
    image = decode_image((files("raycap") / "samples" / SAMPLE).read_bytes(), preprocessing)
    await backend.caption(np.stack([image.pixels_HWC]), preprocessing, Options())


class Readiness:
    """A `Backend` that knows whether it answers.

    Every caption that it gives is a proof; without one in `PROBE_S` seconds it is asked for that of a photo. So a model
    with a long queue is ready as long as it gets on.
    """

    def __init__(self, backend: Backend, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._answered_s = self._failed_s = -math.inf
        self._probe: asyncio.Task[None] | None = None

    async def info(self) -> ModelInfo:
        """See `Backend.info`."""
        return await self._backend.info()

    async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
        """See `Backend.caption`."""
        results = await self._backend.caption(pixels_BHWC, preprocessing, options)
        self._answered_s = self._clock()
        return results

    async def is_ready(self) -> bool:
        """Whether it answers, as far as is known within `WAIT_S`."""
        if not self._has_answered() and self._clock() - self._failed_s >= RETRY_S:
            if self._probe is None or self._probe.done():
                # In a context of its own: that of the request which happens to ask ends with it.
                self._probe = asyncio.create_task(self._ask(), context=contextvars.Context())
            await asyncio.wait([self._probe], timeout=WAIT_S)
        return self._has_answered()

    def _has_answered(self) -> bool:
        return self._clock() - self._answered_s <= PROBE_S

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(PROBE_DEADLINE_S):
                await caption_sample(self)
        except Exception as error:
            if isinstance(error, ProblemError) and error.code == "overloaded":
                # A model with too much to do is there: without it, all the more would go to the others.
                self._answered_s = self._clock()
                return
            self._failed_s = self._clock()
            log.warning("the model does not answer: %s", error or type(error).__name__)
