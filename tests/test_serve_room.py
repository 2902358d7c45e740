"""Who is let in, by what requests took of late."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from raycap.serve.config import ServeConfig
from raycap.serve.problems import ProblemError
from raycap.serve.room import EXPECTED_SHARE, MEMORY_S, Room, room_for
from tests.serving import JPEG, GatedCaptioner, picture, problem, serving, until


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def fill(room: Room) -> int:
    """Let images in one by one until it is full; give their number."""
    num_images = 0
    try:
        while True:
            room.take(1, has=0)
            num_images += 1
    except ProblemError as error:
        assert error.code == "overloaded"
    return num_images


def test_without_a_bound_only_its_size_counts() -> None:
    room = Room(50)
    room.learn(1, 1e6)
    assert fill(room) == 50


def test_until_requests_were_answered_only_its_size_counts() -> None:
    assert fill(Room(50, max_latency_s=1e-6)) == 50


@pytest.mark.parametrize(("num_in_work", "seconds"), [(1, 0.1), (10, 1.0), (64, 6.4)])
def test_lets_in_what_is_answered_in_time(num_in_work: int, seconds: float) -> None:
    room = Room(100, max_latency_s=4.0)
    room.learn(num_in_work, seconds)
    assert room.expected_s(20) == pytest.approx(2.0)
    assert fill(room) == int(EXPECTED_SHARE * 4.0 / 0.1)


def test_what_many_took_together_counts_for_more_and_what_is_long_ago_for_less() -> None:
    clock = Clock()
    room = Room(1000, max_latency_s=1.0, clock=clock)
    for _ in range(20):  # one after another, as long as it takes without a batch
        room.learn(1, 0.1)
    assert room.expected_s(1) == pytest.approx(0.1)
    for num_in_work in range(1, 101):  # then many at a time, whose batches are quicker
        room.learn(num_in_work, 0.01 * num_in_work)
    assert room.expected_s(1) == pytest.approx(0.01, rel=0.1)
    clock.now_s += MEMORY_S * math.log(1000)
    room.learn(5050, 2 * 5050 * 0.01)
    assert room.expected_s(1) == pytest.approx(0.02, rel=0.01)


def test_what_it_learned_is_not_believed_for_ever() -> None:
    clock = Clock()
    room = Room(50, max_latency_s=8.0, always=5, clock=clock)
    room.learn(10, 1e6)
    clock.now_s = 8.0
    assert fill(room) == 5
    clock.now_s = 8.1
    assert fill(room) == 45, "and so the rest"


def test_files_that_are_no_images_teach_nothing() -> None:
    async def main() -> None:
        room = Room(8, max_latency_s=1.0)
        async with serving(ServeConfig(), room=room) as client:
            await client.post("/v1/caption", content=b"no image", headers=JPEG)
            assert room.expected_s(1) == 0
            assert (await client.post("/v1/caption", content=picture(), headers=JPEG)).status_code == 200
            assert room.expected_s(1) > 0

    asyncio.run(main())


def test_as_many_as_keep_the_models_busy_are_always_let_in() -> None:
    room = Room(100, max_latency_s=1.0, always=10)
    room.learn(1, 1e6)
    assert fill(room) == 10
    assert fill(Room(4, max_latency_s=1.0, always=10)) == 4


def test_what_few_took_counts_only_as_long_as_nothing_is_known_of_many() -> None:
    clock = Clock()
    room = Room(100, max_latency_s=8.0, always=10, clock=clock)
    room.learn(2, 1.0)
    assert room.expected_s(10) == pytest.approx(5.0)
    room.learn(20, 2.0)
    room.learn(2, 1.0)
    assert room.expected_s(10) == pytest.approx(1.0)
    clock.now_s = 8.0
    room.learn(2, 1.0)
    assert room.expected_s(10) == pytest.approx(1.0)
    clock.now_s = 8.1
    assert room.expected_s(10) > 1.5
    assert fill(room) > 10


def test_after_a_slow_hour_those_that_are_let_in_show_that_it_is_over() -> None:
    clock = Clock()
    room = Room(100, max_latency_s=8.0, always=10, clock=clock)
    room.learn(50, 24.0)
    assert fill(room) == 10
    room.taken = 0
    for _ in range(30):  # requests of 9 images, of which no second one has room
        clock.now_s += 1.0
        room.learn(9, 0.1)
    assert fill(room) == 100


def test_two_batches_of_each_replica_are_always_let_in() -> None:
    def always(**settings: Any) -> int:
        room = room_for(ServeConfig(max_latency_s=1.0, **settings))
        room.learn(1000, 1e6)
        return fill(room)

    assert always() == 32
    assert always(num_replicas=2) == 64
    assert always(num_replicas=2, num_ingress=4) == 16
    assert always(max_queue=20) == 20


def test_who_comes_alone_is_let_in_however_slow_it_is() -> None:
    room = Room(8, max_latency_s=1.0)
    room.learn(1, 100.0)
    with room.place() as place:
        place.hold(8)
        assert room.taken == 8
        with pytest.raises(ProblemError), room.place():
            pass
    with room.place(), pytest.raises(ProblemError), room.place():
        pass
    assert room.taken == 0


def test_requests_that_would_take_too_long_are_refused_at_once() -> None:
    async def main() -> None:
        captioner, room = GatedCaptioner(), Room(8, max_latency_s=1.0)
        async with serving(ServeConfig(), captioner=captioner, room=room) as client:
            room.learn(1, 0.3)  # so two are in time, and three are not
            taken = [asyncio.create_task(client.post("/v1/caption", content=picture(), headers=JPEG)) for _ in range(2)]
            await until(lambda: room.taken == 2, "two requests")
            refused = await client.post("/v1/caption", content=picture(), headers=JPEG)
            assert problem(refused, 503)["code"] == "overloaded"
            assert int(refused.headers["retry-after"]) >= 1
            captioner.gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*taken)] == [200, 200]
            assert room.expected_s(1) != pytest.approx(0.3), "it has learned from them"

    asyncio.run(main())
