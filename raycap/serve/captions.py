"""From image files to captions: decode in threads, ask the model. Both APIs answer with this."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from raycap.errors import ImageError
from raycap.images import DecodedImage, Preprocessing, decode_image
from raycap.serve.backend import Backend, ModelChangedError, ModelInfo, Result
from raycap.serve.config import ServeConfig
from raycap.serve.metrics import Metrics
from raycap.serve.problems import ProblemError, unavailable
from raycap.serve.room import Room
from raycap.serve.schemas import Options

DECODING_THREADS = 4
"""Pillow decodes outside of Python's lock: at 3 to 5 ms a photo, 4 threads decode about 1,000 a second."""
MAX_ATTEMPTS = 20
"""While bundles with other input sizes change places, an attempt meets the size that it prepared, or learns the other:
whatever the shares, two in a row fail 1 time in 4 at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The captions of a request."""

    model: str
    model_id: str
    results: list[Result | ImageError]
    decode_s: float

    @property
    def done(self) -> list[Result]:
        """The results of the images that could be captioned."""
        return [each for each in self.results if isinstance(each, Result)]


class Captions:
    """Answers requests from one or several models."""

    def __init__(self, config: ServeConfig, backends: Mapping[str, Backend], room: Room, metrics: Metrics) -> None:
        """`backends` by name, the default one first."""
        self._config = config
        self._backends = dict(backends)
        self.room = room
        self._metrics = metrics
        self._infos: dict[str, ModelInfo] = {}
        self._threads = ThreadPoolExecutor(DECODING_THREADS, "raycap-decode")

    @property
    def models(self) -> list[str]:
        """Their names, the default one first."""
        return list(self._backends)

    async def info(self, model: str, *, again: bool = False) -> ModelInfo:
        """What the model was when first asked, or if `again`, is now."""
        if again or model not in self._infos:
            self._infos[model] = await self._backend(model).info()
        return self._infos[model]

    def model_for(self, request_id: str) -> str:
        """The model of a request that names none: the default one, or for its share of the ids, the canary."""
        if self._config.canary_share is not None:
            name, share = self._config.canary_share
            if int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) < share * 2**64:
                return name
        return self.models[0]

    async def caption(self, model: str, images: Sequence[bytes], options: Options) -> Answer:
        """A result for each image file, or what is wrong with it.

        Raises ProblemError for a request that gets no results.
        """
        came_s, num_in_work = time.perf_counter(), self.room.taken
        info = await self._info_for(model, options)
        decoded: dict[Preprocessing, list[DecodedImage | ImageError]] = {}
        decode_s = 0.0
        for _ in range(MAX_ATTEMPTS):
            if info.preprocessing not in decoded:
                start_s = time.perf_counter()
                decoded[info.preprocessing] = await self._decode(images, info.preprocessing)
                decode_s += time.perf_counter() - start_s
            try:
                results = await self._ask(model, decoded[info.preprocessing], options, info)
            except ModelChangedError as changed:
                info = self._infos[model] = changed.info
                continue
            self._metrics.stage("decode", decode_s)
            self._metrics.captioned(model, results)
            if any(isinstance(each, Result) for each in results):  # files that are no images take no time
                self.room.learn(num_in_work, time.perf_counter() - came_s)
            model_id = next((each.model_id for each in results if isinstance(each, Result)), info.model_id)
            if model_id != info.model_id:
                self._infos.pop(model, None)  # another bundle took its place
            return Answer(model=model, model_id=model_id, results=results, decode_s=decode_s)
        raise unavailable()

    def check_number(self, num_images: int) -> None:
        """Raise ProblemError for more images than a request may have."""
        if num_images > self._config.max_images:
            raise ProblemError(
                413, "too_many_images", f"expected at most {self._config.max_images} images, got {num_images}"
            )

    async def _info_for(self, model: str, options: Options) -> ModelInfo:
        """Raises ProblemError for options that the model cannot follow."""
        for again in (False, True):  # another bundle may have taken its place
            info = await self.info(model, again=again)
            if options.samples or (options.alternatives or 0) < (options.beam_size or info.decoding.beam_size):
                return info
        raise ProblemError(
            422,
            "invalid_options",
            f"{info.decoding.beam_size} beams, the model's default, give at most {info.decoding.beam_size - 1} "
            "alternatives: raise beam_size",
        )

    async def _ask(
        self, model: str, decoded: Sequence[DecodedImage | ImageError], options: Options, info: ModelInfo
    ) -> list[Result | ImageError]:
        """The model's results, with the errors in their places."""
        pixels = [image.pixels_HWC for image in decoded if isinstance(image, DecodedImage)]
        found: list[Result] = []
        if pixels:
            found = await self._backend(model).caption(np.stack(pixels), info.preprocessing, options)
        rest = iter(found)
        box = info.preprocessing.box
        return [
            each if isinstance(each, ImageError) else replace(next(rest), box=box(each.width, each.height))
            for each in decoded
        ]

    async def _decode(self, images: Sequence[bytes], preprocessing: Preprocessing) -> list[DecodedImage | ImageError]:
        def decode(data: bytes) -> DecodedImage | ImageError:
            try:
                return decode_image(data, preprocessing, self._config.limits)
            except ImageError as error:
                return error

        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._threads, decode, data) for data in images))

    def _backend(self, model: str) -> Backend:
        try:
            return self._backends[model]
        except KeyError:
            raise ProblemError(
                404, "unknown_model", f"there is no model {model[:64]!r}, but {', '.join(self._backends)}"
            ) from None
