"""How an ingress asks the replicas of a model, which may be of two bundles while they change places."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from raycap.images import Preprocessing
from raycap.serve.backend import Array, ModelChangedError, ModelInfo, Result
from raycap.serve.problems import ProblemError, unavailable
from raycap.serve.replicas.on_ray import ReplicaBackend
from raycap.serve.schemas import Options
from tests.small import small_bundle

Answer = Callable[[Array], list[Result]]


class Handle:
    """Ray Serve's: each call goes to one of the replicas, here to one after another."""

    def __init__(self, *replicas: Answer) -> None:
        self.sizes: list[int] = []
        self.are_alone: list[bool] = []
        self.num_cancelled = 0
        self._replicas = replicas

    @property
    def caption(self) -> Handle:
        return self

    def remote(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options, *, is_alone: bool) -> Response:
        answer = self._replicas[len(self.sizes) % len(self._replicas)]
        self.sizes.append(len(pixels_BHWC))
        self.are_alone.append(is_alone)
        return Response(self, lambda: answer(pixels_BHWC))


class Response:
    """A call's answer, which comes a moment later for each call before it."""

    def __init__(self, handle: Handle, answer: Callable[[], list[Result]]) -> None:
        self._handle, self._answer, self._delay = handle, answer, 10 * len(handle.sizes)

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


def ask(handle: Handle, num_images: int) -> list[tuple[str, str]]:
    """Text and model of each image."""
    pixels_BHWC = np.arange(num_images, dtype=np.uint8).reshape(-1, 1, 1, 1)
    results = asyncio.run(ReplicaBackend(handle).caption(pixels_BHWC, Preprocessing(), Options()))  # type: ignore[arg-type]
    return [(result.captions[0][0], result.model_id) for result in results]


def test_replicas_share_the_images_of_a_request() -> None:
    handle = Handle(model("a"))
    assert ask(handle, 3) == [("0", "a"), ("1", "a"), ("2", "a")]
    assert handle.sizes == [1, 1, 1]
    assert handle.are_alone == [False] * 3
    alone = Handle(model("a"))
    assert ask(alone, 1) == [("0", "a")]
    assert alone.are_alone == [True]


def test_one_model_answers_for_all_images_of_a_request() -> None:
    handle = Handle(model("old"), model("new"))
    assert ask(handle, 3) == [("0", "new"), ("1", "new"), ("2", "new")]
    assert handle.sizes == [1, 1, 1, 3]


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
    assert handle.num_cancelled == 3
