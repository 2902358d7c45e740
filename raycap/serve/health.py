"""Whether the models answer: with a real caption, not with a promise."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from importlib.resources import files

import numpy as np

from raycap.images import decode_image
from raycap.serve.backend import Backend
from raycap.serve.problems import ProblemError
from raycap.serve.schemas import Options

log = logging.getLogger(__name__)

PROBE_S = 10.0
"""An answer is believed for so long."""
PROBE_DEADLINE_S = 10.0
SAMPLE = "dog.jpg"


async def caption_sample(backend: Backend) -> None:
    """Have it caption a photo; raise what it raises."""
    preprocessing = (await backend.info()).preprocessing
    image = decode_image((files("raycap") / "samples" / SAMPLE).read_bytes(), preprocessing)
    await backend.caption(np.stack([image.pixels_HWC]), preprocessing, Options())


class Readiness:
    """Asks one model for the caption of a photo, at most once in `PROBE_S` seconds."""

    def __init__(self, backend: Backend, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend = backend
        self._clock = clock
        self._answered_s: float | None = None
        self._asking = asyncio.Lock()

    async def is_ready(self) -> bool:
        """Whether it answers."""
        async with self._asking:  # who comes meanwhile gets the same answer
            if self._answered_s is None or self._clock() - self._answered_s > PROBE_S:
                self._answered_s = self._clock() if await self._answers() else None
            return self._answered_s is not None

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_DEADLINE_S):
                await caption_sample(self._backend)
        except ProblemError as problem:
            # A model with too much to do is there: without it, all the more would go to the others.
            return problem.code == "overloaded"
        except Exception as error:
            log.warning("the model does not answer: %s", error)
            return False
        return True
