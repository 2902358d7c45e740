"""A model is ready while it answers, whoever asks; and it is not asked more than it must be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from raycap.serve import health
from raycap.serve.backend import Array, ModelInfo, Result
from raycap.serve.health import Readiness, caption_sample
from raycap.serve.problems import overloaded, unavailable
from raycap.serve.room import Room
from raycap.serve.schemas import Options
from tests.serving import JPEG, picture, problem, serving, until
from tests.small import small_bundle


class Moody:
    """A model that does as it is told, for what a whole one does not do."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.num_asked = 0

    async def info(self) -> ModelInfo:
        bundle = small_bundle()
        return ModelInfo(model_id="", preprocessing=bundle.preprocessing, decoding=bundle.decoding)

    async def caption(self, pixels_BHWC: Array, preprocessing: object, options: Options) -> list[Result]:
        self.num_asked += 1
        await self.is_open.wait()
        if self.error is not None:
            raise self.error
        return []


def watching(main: Callable[[Moody, Readiness, list[float]], Coroutine[None, None, None]]) -> None:
    """Run it with a model, what watches the model, and a clock."""

    async def run() -> None:
        model, now = Moody(), [0.0]
        await main(model, Readiness(model, clock=lambda: now[0]), now)

    asyncio.run(run())


def test_everybody_who_asks_shares_one_probe_and_its_answer_is_believed_for_a_while() -> None:
    async def main(model: Moody, readiness: Readiness, now: list[float]) -> None:
        assert all(await asyncio.gather(*(readiness.is_ready() for _ in range(5))))
        now[0] = health.PROBE_S
        assert await readiness.is_ready()
        assert model.num_asked == 1

    watching(main)


@pytest.mark.parametrize("error", [unavailable(), RuntimeError("broken")])
def test_a_failure_is_believed_for_less(error: Exception) -> None:
    async def main(model: Moody, readiness: Readiness, now: list[float]) -> None:
        model.error = error
        assert not any(await asyncio.gather(*(readiness.is_ready() for _ in range(5))))
        assert not await readiness.is_ready()
        assert model.num_asked == 1
        model.error = None
        now[0] = health.RETRY_S
        assert await readiness.is_ready()

    watching(main)


def test_a_model_that_has_too_much_to_do_is_there() -> None:
    async def main(model: Moody, readiness: Readiness, now: list[float]) -> None:
        model.error = overloaded()
        assert await readiness.is_ready()

    watching(main)


def test_captions_of_requests_are_proof_enough() -> None:
    async def main(model: Moody, readiness: Readiness, now: list[float]) -> None:
        for now[0] in (0.0, 9.0, 18.0):
            await caption_sample(readiness)
        now[0] = 27.0
        assert await readiness.is_ready()
        assert model.num_asked == 3

    watching(main)


def test_nobody_waits_for_long_and_an_answer_that_comes_late_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(model: Moody, readiness: Readiness, now: list[float]) -> None:
        model.is_open.clear()
        assert not await readiness.is_ready()
        assert not await readiness.is_ready()
        assert model.num_asked == 1
        request = asyncio.create_task(caption_sample(readiness))
        await until(lambda: model.num_asked == 2, "a request")
        model.is_open.set()
        await request
        assert await readiness.is_ready()
        assert model.num_asked == 2

    monkeypatch.setattr(health, "WAIT_S", 0.01)
    watching(main)


def test_a_model_that_hangs_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(model: Moody, readiness: Readiness, now: list[float]) -> None:
        model.is_open.clear()
        assert not await readiness.is_ready()
        now[0] = health.RETRY_S
        assert not await readiness.is_ready()
        assert model.num_asked == 2  # the first probe was given up

    monkeypatch.setattr(health, "PROBE_DEADLINE_S", 0.01)
    watching(main)


def test_a_server_about_to_end_says_so_and_answers_on() -> None:
    async def main() -> None:
        room = Room(8)
        async with serving(room=room) as client:
            room.leave()
            for path in ("/v2/health/ready", "/v2/models/default/ready"):
                assert problem(await client.get(path), 503)["code"] == "draining"
            index = (await client.post("/v2/repository/index")).json()
            assert [each["state"] for each in index] == ["UNAVAILABLE"]
            assert (await client.post("/v1/caption", content=picture(), headers=JPEG)).status_code == 200
            assert (await client.get("/healthz")).status_code == 200

    asyncio.run(main())


def test_a_probe_outlives_the_request_that_asked() -> None:
    async def main(model: Moody, readiness: Readiness, now: list[float]) -> None:
        model.is_open.clear()
        asking = asyncio.create_task(readiness.is_ready())
        await until(lambda: model.num_asked == 1, "the probe")
        asking.cancel()
        model.is_open.set()
        assert await readiness.is_ready()
        assert model.num_asked == 1

    watching(main)
