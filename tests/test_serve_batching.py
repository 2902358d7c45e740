"""Batches are made when the model is free, and of those alone who still wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from raycap.serve.batching import Batched, Batcher
from tests.serving import DEADLINE_S, until


class Doubler:
    """Doubles numbers, as often as it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.turns = threading.Semaphore(0)

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.turns.acquire(timeout=DEADLINE_S)
        return [2 * item for item in items]


def test_what_comes_while_the_model_is_busy_is_its_next_batch() -> None:
    async def main() -> list[Batched[int]]:
        batcher = Batcher(model, max_size=4, wait_s=0.0)
        first = asyncio.create_task(batcher.submit(0))
        await until(lambda: len(model.batches) == 1, "the first batch")
        others = [asyncio.create_task(batcher.submit(number)) for number in range(1, 7)]
        await asyncio.sleep(0)
        model.turns.release(3)
        found = await asyncio.gather(first, *others)
        await batcher.close()
        return found

    model = Doubler()
    found = asyncio.run(main())
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [each.answer for each in found] == [0, 2, 4, 6, 8, 10, 12]
    assert [each.batch_size for each in found] == [1, 4, 4, 4, 4, 2, 2]
    assert all(each.queue_s >= 0 and each.run_s > 0 for each in found)


def test_an_idle_model_waits_for_a_batch_to_fill() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=3, wait_s=1e6)
        waiting = [asyncio.create_task(batcher.submit(number)) for number in (1, 2)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert model.batches == []
        model.turns.release()
        await batcher.submit(3)  # fills it
        await asyncio.gather(*waiting)
        await batcher.close()

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[1, 2, 3]]


def test_who_is_alone_waits_for_nobody() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=3, wait_s=1e6)
        model.turns.release()
        await batcher.submit(1, is_alone=True)
        await batcher.close()

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[1]]


def test_but_not_for_longer_than_it_may() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=3, wait_s=0.001)
        model.turns.release()
        await batcher.submit(1)
        await batcher.close()

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[1]]


def test_who_goes_before_the_batch_is_in_none() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=2, wait_s=0.0)
        first = asyncio.create_task(batcher.submit(0))
        await until(lambda: len(model.batches) == 1, "the first batch")
        gone, also_gone, stays = (asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3))
        await asyncio.sleep(0)
        gone.cancel()
        also_gone.cancel()
        model.turns.release(2)
        assert (await stays).answer == 6
        assert (await first).answer == 0
        await batcher.close()

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[0], [3]]


def test_who_goes_while_the_batch_runs_disturbs_nobody() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=2, wait_s=1e6)
        gone, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
        await until(lambda: len(model.batches) == 1, "the batch")
        gone.cancel()
        model.turns.release()
        assert (await stays).answer == 4
        await batcher.close()

    model = Doubler()
    asyncio.run(main())


def test_an_error_is_told_to_its_batch_alone() -> None:
    def run(items: Sequence[int]) -> list[int]:
        if 1 in items:
            raise ValueError("not 1")
        return list(items)

    async def main() -> None:
        batcher = Batcher(run, max_size=1, wait_s=0.0)
        found = await asyncio.gather(*(batcher.submit(number) for number in range(3)), return_exceptions=True)
        await batcher.close()
        assert isinstance(found[1], ValueError)
        assert [found[0].answer, found[2].answer] == [0, 2]  # type: ignore[union-attr]

    asyncio.run(main())


def test_is_suspect_while_its_batches_fail_one_after_another() -> None:
    def run(items: Sequence[int]) -> list[int]:
        if min(items) < 0:
            raise ValueError("negative")
        return list(items)

    async def main() -> list[bool]:
        batcher = Batcher(run, max_size=1, wait_s=0.0)
        found = []
        for item in (-1, -1, 1, -1, -1, -1, 1):
            await asyncio.gather(batcher.submit(item), return_exceptions=True)
            found.append(batcher.is_suspect(1e6))
        await batcher.close()
        return found

    assert asyncio.run(main()) == [False] * 5 + [True, False]


def test_is_suspect_while_a_batch_takes_too_long() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=1, wait_s=0.0)
        assert not batcher.is_suspect(0.0)
        waiting = asyncio.create_task(batcher.submit(1))
        await until(lambda: bool(model.batches), "the batch")
        assert not batcher.is_suspect(1e6)
        assert batcher.is_suspect(0.0)
        model.turns.release()
        await waiting
        assert not batcher.is_suspect(0.0)
        await batcher.close()

    model = Doubler()
    asyncio.run(main())


def test_closing_ends_what_waits() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=2, wait_s=1e6)
        waiting = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    model = Doubler()
    asyncio.run(main())
    assert model.batches == []
