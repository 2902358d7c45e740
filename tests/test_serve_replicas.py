"""How an ingress asks the replicas of a model, which may be of two bundles while they change places."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from raycap.images import Preprocessing
from raycap.serve.backend import Array, ModelChangedError, ModelInfo, Result
from raycap.serve.config import ServeConfig
from raycap.serve.problems import ProblemError, unavailable
from raycap.serve.replicas.on_ray import REPLICA_S, ReplicaBackend
from raycap.serve.schemas import Options
from tests.serving import until
from tests.small import small_bundle

Answer = Callable[[Array], list[Result]]


class Handle:
    """Ray Serve's: each call goes to one of the replicas, here to one after another."""

    def __init__(self, *replicas: Answer) -> None:
        self.sizes: list[int] = []
        self.options: list[Sequence[Options]] = []
        self.num_cancelled = 0
        self.delay = 10
        """Turns of the event loop that an answer takes, for each call up to its own."""
        self._replicas = replicas

    @property
    def caption(self) -> Handle:
        return self

    def remote(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Sequence[Options]) -> Response:
        number = len(self.sizes) % len(self._replicas)
        self.sizes.append(len(pixels_BHWC))
        self.options.append(options)
        return Response(self, lambda: (f"replica-{number}", self._replicas[number](pixels_BHWC)))


class Response:
    """A call's answer, which comes a moment later for each call before it."""

    def __init__(self, handle: Handle, answer: Callable[[], tuple[str, list[Result]]]) -> None:
        self._handle, self._answer, self._delay = handle, answer, handle.delay * len(handle.sizes)

    def __await__(self) -> Any:
        for _ in range(self._delay):
            yield from asyncio.sleep(0).__await__()
        return self._answer()

    def cancel(self) -> None:
        self._handle.num_cancelled += 1


def model(model_id: str) -> Answer:
    """Captions an image with its first pixel."""

    def caption(pixels_BHWC: Array) -> list[Result]:
        return [
            Result(
                captions=((str(pixels.flat[0]), -1.0),),
                attention_TRC=None,
                model_id=model_id,
                queue_s=0,
                model_s=0,
                batch_size=len(pixels_BHWC),
            )
            for pixels in pixels_BHWC
        ]

    return caption


def fails(error: Exception) -> Answer:
    def caption(pixels_BHWC: Array) -> list[Result]:
        raise error

    return caption


def changed() -> ModelChangedError:
    bundle = small_bundle()
    return ModelChangedError(ModelInfo(model_id="", preprocessing=bundle.preprocessing, decoding=bundle.decoding))


TWO_REPLICAS = ServeConfig(num_replicas=2, batch_size=4)


async def caption(backend: ReplicaBackend, *numbers: int, options: Options | None = None) -> list[tuple[str, str]]:
    """Text and model of each image."""
    pixels_BHWC = np.array(numbers, np.uint8).reshape(-1, 1, 1, 1)
    results = await backend.caption(pixels_BHWC, Preprocessing(), options or Options())
    return [(result.captions[0][0], result.model_id) for result in results]


def backend_of(handle: Handle, config: ServeConfig = TWO_REPLICAS) -> ReplicaBackend:
    return ReplicaBackend(handle, config)  # type: ignore[arg-type]


def ask(handle: Handle, num_images: int) -> list[tuple[str, str]]:
    """Text and model of each image of one request."""
    return asyncio.run(caption(backend_of(handle), *range(num_images)))


def test_replicas_share_the_images_of_a_request() -> None:
    handle = Handle(model("a"))
    assert ask(handle, 3) == [("0", "a"), ("1", "a"), ("2", "a")]
    assert handle.sizes == [2, 1]


def test_requests_that_wait_go_in_one_call_with_their_own_options() -> None:
    async def main() -> None:
        backend = backend_of(handle, ServeConfig(batch_size=3))
        greedy, both = Options(beam_size=1), (1, 2)
        asked = [asyncio.create_task(caption(backend, 0))]
        await until(lambda: handle.sizes == [1], "the first call")
        asked.append(asyncio.create_task(caption(backend, *both)))
        await until(lambda: handle.sizes == [1, 2], "the second call")
        asked += [asyncio.create_task(caption(backend, number, options=greedy)) for number in (3, 4)]
        asked.append(asyncio.create_task(caption(backend, 5, 6)))
        texts = [text for found in await asyncio.gather(*asked) for text, _ in found]
        assert texts == [str(number) for number in range(7)]
        assert handle.sizes == [1, 2, 3, 1], "a batch in work, and the next one waiting"
        assert handle.options[2] == [greedy, greedy, Options()]

    handle = Handle(model("a"))
    asyncio.run(main())


def test_replicas_that_have_come_are_asked_as_much_as_the_others() -> None:
    async def main() -> None:
        now_s = 0.0
        config = ServeConfig(batch_size=4, max_replicas=3)
        backend = ReplicaBackend(handle, config, clock=lambda: now_s)  # type: ignore[arg-type]
        await caption(backend, *range(6))
        assert handle.sizes == [4, 2], "for one replica, as much as a call takes"
        for number in range(6):
            await caption(backend, number)
        assert backend.num_replicas == 3
        del handle.sizes[:]
        await caption(backend, *range(6))
        assert handle.sizes == [2, 2, 2]
        now_s = REPLICA_S + 1
        await caption(backend, 0)
        assert backend.num_replicas == 1, "nobody has heard of the others"

    handle = Handle(model("a"), model("a"), model("a"))
    asyncio.run(main())


def test_replicas_that_took_the_place_of_dead_ones_are_not_counted_besides() -> None:
    async def main() -> None:
        backend = backend_of(handle)
        for number in range(5):
            await caption(backend, number)
        assert backend.num_replicas == 2

    handle = Handle(*[model("a")] * 5)
    asyncio.run(main())


def test_a_call_waits_to_be_filled_where_it_is_told_to() -> None:
    async def main() -> None:
        backend = backend_of(handle, ServeConfig(batch_size=2, max_images=2, batch_wait_ms=1e6))
        first = asyncio.create_task(caption(backend, 0))
        for _ in range(10):
            await asyncio.sleep(0)
        assert handle.sizes == []
        await asyncio.gather(first, caption(backend, 1))
        assert handle.sizes == [2]

    handle = Handle(model("a"))
    asyncio.run(main())


def test_a_request_that_goes_leaves_the_call_to_the_others() -> None:
    async def main() -> None:
        backend = backend_of(handle, ServeConfig(batch_size=2, max_images=2))
        both = [asyncio.create_task(caption(backend, number)) for number in (0, 1)]
        await until(lambda: handle.sizes == [2], "the call")
        both[0].cancel()
        assert await both[1] == [("1", "a")]
        assert handle.num_cancelled == 0
        handle.delay = 1_000_000
        alone = asyncio.create_task(caption(backend, 2))
        await until(lambda: handle.sizes == [2, 1], "the call")
        alone.cancel()
        await until(lambda: handle.num_cancelled == 1, "the end of the call")

    handle = Handle(model("a"))
    asyncio.run(main())


def test_one_model_answers_for_all_images_of_a_request() -> None:
    handle = Handle(model("old"), model("new"))
    assert ask(handle, 3) == [("0", "old"), ("1", "old"), ("2", "old")]
    assert handle.sizes == [2, 1, 3]


def test_also_when_the_models_want_other_sizes() -> None:
    handle = Handle(model("old"), fails(changed()), model("old"))
    assert ask(handle, 2) == [("0", "old"), ("1", "old")]
    assert handle.sizes == [1, 1, 2]
    with pytest.raises(ModelChangedError):
        ask(Handle(fails(changed())), 1)


def test_a_replica_that_has_gone_is_no_error_of_ours() -> None:
    ended = AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata(), "the server has ended")
    with pytest.raises(ProblemError) as caught:
        ask(Handle(fails(ended)), 1)
    assert (caught.value.status, caught.value.code) == (503, "unavailable")


def test_when_one_call_fails_the_others_are_given_up() -> None:
    handle = Handle(fails(unavailable()), model("a"))
    with pytest.raises(ProblemError):
        ask(handle, 4)
    assert handle.sizes == [2, 2]
    assert handle.num_cancelled == 1
