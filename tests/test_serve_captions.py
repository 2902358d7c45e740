"""Captions of models that change while requests come."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from raycap.errors import NotAnImageError
from raycap.images import Preprocessing
from raycap.model.bundle import Bundle
from raycap.serve.backend import Array, ModelInfo, Result
from raycap.serve.captions import Captions
from raycap.serve.config import ServeConfig
from raycap.serve.metrics import Metrics
from raycap.serve.model import OnlineCaptioner, ServedModel
from raycap.serve.problems import ProblemError
from raycap.serve.room import Room
from raycap.serve.schemas import Options
from tests.serving import SAMPLES, small_captioner
from tests.small import small_bundle

DOG = (SAMPLES / "dog.jpg").read_bytes()


def test_pixels_are_prepared_again_for_a_model_that_took_anothers_place() -> None:
    class Place:
        """Where one model is, and then another."""

        async def info(self) -> ModelInfo:
            return await model.info()

        async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
            return await model.caption(pixels_BHWC, preprocessing, options)

    async def main() -> str:
        nonlocal model
        captions = Captions(ServeConfig(), {"default": Place()}, Room(8), Metrics())
        await captions.caption("default", [DOG], Options())
        await model.close()
        model = ServedModel(another, batch_size=4)
        answer = await captions.caption("default", [DOG], Options())
        await model.close()
        return answer.done[0].captions[0][0]

    another = OnlineCaptioner(small_bundle(size_px=8), device="cpu")
    model = ServedModel(small_captioner(), batch_size=4)
    assert asyncio.run(main()) == another.caption([another.prepare(DOG)])[0].text


class Mixed:
    """Old and new replicas side by side: each call goes to the next one of a list."""

    def __init__(self, *replicas: ServedModel) -> None:
        self.replicas = list(replicas)

    async def info(self) -> ModelInfo:
        return await self.replicas.pop(0).info()

    async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
        return await self.replicas.pop(0).caption(pixels_BHWC, preprocessing, options)


def served(bundle: Bundle) -> ServedModel:
    return ServedModel(OnlineCaptioner(bundle, device="cpu"), batch_size=4)


def test_an_upgrade_to_another_input_size_fails_no_request() -> None:
    async def main() -> None:
        old, new = served(small_bundle()), served(small_bundle(size_px=8))
        place, metrics = Mixed(old, *[new, old] * 5, old), Metrics()
        captions = Captions(ServeConfig(), {"default": place}, Room(8), metrics)
        answer = await captions.caption("default", [DOG, b"none"], Options())
        assert [type(each) for each in answer.results] == [Result, NotAnImageError]
        assert 'raycap_failures_total{code="not_an_image"} 1.0' in metrics.text().decode()
        place.replicas = [new, old] * 100
        with pytest.raises(ProblemError) as error:
            await captions.caption("default", [DOG], Options())
        assert (error.value.status, error.value.code) == (503, "unavailable")
        await old.close()
        await new.close()

    asyncio.run(main())


def test_what_is_known_of_a_model_changes_with_it() -> None:
    async def main() -> None:
        few = small_bundle()
        many = replace(few, decoding=replace(few.decoding, beam_size=5), model_id="many")
        old, new = served(few), served(many)
        place = Mixed(old, old)
        captions = Captions(ServeConfig(), {"default": place}, Room(8), Metrics())
        await captions.caption("default", [DOG], Options())
        place.replicas = [new, new]  # asked for more than it could, it is asked again what it can
        answer = await captions.caption("default", [DOG], Options(alternatives=4))
        assert (answer.model_id, len(answer.done[0].captions)) == ("many", 5)
        place.replicas = [old, old]  # its answer tells that it is another: who asks next asks it first
        await captions.caption("default", [DOG], Options())
        assert (await captions.info("default")).model_id == few.model_id
        await old.close()
        await new.close()

    asyncio.run(main())
