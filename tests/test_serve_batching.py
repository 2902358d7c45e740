"""Batches are made when the model is free, and of those alone who still wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from raycap.serve.batching import Batched, Batcher
from tests.serving import DEADLINE_S, until


class Doubler:
    """Doubles numbers, as often as it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.turns = asyncio.Semaphore(0)
        self.num_cancelled = 0

    def let(self, num_batches: int) -> None:
        """Let it end so many."""
        for _ in range(num_batches):
            self.turns.release()

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self.turns.acquire()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return [2 * item for item in items]


def submit(batcher: Batcher[int, int], *numbers: int) -> list[asyncio.Task[Batched[int]]]:
    return [asyncio.create_task(batcher.submit(number)) for number in numbers]


def test_what_comes_while_the_model_is_busy_is_its_next_batch() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=4)
        first = submit(batcher, 0)
        await until(lambda: len(model.batches) == 1, "the first batch")
        others = submit(batcher, *range(1, 7))
        model.let(3)
        found = await asyncio.gather(*first, *others)
        assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert [each.answer for each in found] == [0, 2, 4, 6, 8, 10, 12]
        assert [each.batch_size for each in found] == [1, 4, 4, 4, 4, 2, 2]
        assert all(each.queue_s >= 0 and each.run_s > 0 for each in found)
        await batcher.close()

    model = Doubler()
    asyncio.run(main())


def test_what_comes_together_is_captioned_together() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=4)
        model.let(1)
        await asyncio.gather(*submit(batcher, 1, 2, 3))

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[1, 2, 3]]


def test_an_idle_model_waits_for_a_batch_to_fill() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=3, wait_s=1e6)
        waiting = submit(batcher, 1, 2)
        for _ in range(10):
            await asyncio.sleep(0)
        assert model.batches == []
        model.let(1)
        await batcher.submit(3)  # fills it
        await asyncio.gather(*waiting)
        await batcher.close()

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[1, 2, 3]]


def test_but_not_for_longer_than_it_may() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=3, wait_s=0.001)
        model.let(1)
        await batcher.submit(1)

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[1]]


def test_several_batches_run_at_a_time_and_more_if_they_are_full() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=3, max_partial=2, max_running=3)
        waiting = []
        for number in range(4):
            waiting += submit(batcher, number)
            for _ in range(3):
                await asyncio.sleep(0)
        assert model.batches == [[0], [1]], "there is room for two that are not full"
        waiting += submit(batcher, 4)
        await until(lambda: len(model.batches) == 3, "a full one")
        waiting += submit(batcher, *range(5, 9))
        for _ in range(3):
            await asyncio.sleep(0)
        assert model.batches == [[0], [1], [2, 3, 4]], "there is no room for a fourth"
        model.let(5)
        assert [each.answer for each in await asyncio.gather(*waiting)] == [2 * number for number in range(9)]
        assert model.batches[3:] == [[5, 6, 7], [8]]

    model = Doubler()
    asyncio.run(main())


def test_what_waits_is_shared_among_those_that_are_idle() -> None:
    async def main(num_items: int) -> list[int]:
        model = Doubler()
        batcher = Batcher(model, max_size=4, max_partial=4, max_running=4, num_shares=2)
        model.let(6)
        await asyncio.gather(*submit(batcher, *range(num_items)))
        return list(map(len, model.batches))

    assert asyncio.run(main(1)) == [1]
    assert asyncio.run(main(5)) == [3, 2]
    assert asyncio.run(main(8)) == [4, 4]
    assert asyncio.run(main(18)) == [4, 4, 4, 4, 1, 1]


def test_who_goes_before_the_batch_is_in_none() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=2)
        [first] = submit(batcher, 0)
        await until(lambda: len(model.batches) == 1, "the first batch")
        gone, also_gone, stays = submit(batcher, 1, 2, 3)
        await asyncio.sleep(0)
        gone.cancel()
        also_gone.cancel()
        model.let(2)
        assert (await stays).answer == 6
        assert (await first).answer == 0

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[0], [3]]


def test_who_goes_while_the_batch_runs_disturbs_nobody() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=2)
        gone, stays = submit(batcher, 1, 2)
        await until(lambda: len(model.batches) == 1, "the batch")
        gone.cancel()
        await asyncio.wait([gone])
        model.let(1)
        assert (await stays).answer == 4

    model = Doubler()
    asyncio.run(main())
    assert model.num_cancelled == 0


def test_a_batch_that_nobody_waits_for_is_given_up() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=2)
        gone = submit(batcher, 1, 2)
        await until(lambda: len(model.batches) == 1, "the batch")
        [stays] = submit(batcher, 3)
        for each in gone:
            each.cancel()
        model.let(1)
        assert (await stays).answer == 6

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[1, 2], [3]]
    assert model.num_cancelled == 1


def test_an_error_is_told_to_its_batch_alone() -> None:
    async def run(items: Sequence[int]) -> list[int]:
        if 1 in items:
            raise ValueError("not 1")
        return list(items)

    async def main() -> None:
        batcher = Batcher(run, max_size=1)
        found = await asyncio.gather(*submit(batcher, 0, 1, 2), return_exceptions=True)
        assert isinstance(found[1], ValueError)
        assert [found[0].answer, found[2].answer] == [0, 2]  # type: ignore[union-attr]

    asyncio.run(main())


def test_too_few_answers_are_an_error_of_the_whole_batch() -> None:
    async def run(items: Sequence[int]) -> list[int]:
        return list(items)[1:]

    async def main() -> None:
        found = await asyncio.gather(*submit(Batcher(run, max_size=2), 0, 1), return_exceptions=True)
        assert [type(each) for each in found] == [ValueError, ValueError]

    asyncio.run(main())


def test_a_batch_that_is_cancelled_from_within_leaves_nobody_waiting() -> None:
    async def run(items: Sequence[int]) -> list[int]:
        raise asyncio.CancelledError

    async def main() -> None:
        batcher = Batcher(run, max_size=1)
        for _ in range(2):
            with pytest.raises(asyncio.CancelledError):
                await batcher.submit(1)

    asyncio.run(main())


def test_is_suspect_while_its_batches_fail_one_after_another() -> None:
    async def run(items: Sequence[int]) -> list[int]:
        if min(items) < 0:
            raise ValueError("negative")
        return list(items)

    async def main() -> list[bool]:
        batcher = Batcher(run, max_size=1)
        found = []
        for item in (-1, -1, 1, -1, -1, -1, 1):
            await asyncio.gather(batcher.submit(item), return_exceptions=True)
            found.append(batcher.is_suspect(1e6))
        return found

    assert asyncio.run(main()) == [False] * 5 + [True, False]


def test_is_suspect_while_a_batch_takes_too_long() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=1)
        assert not batcher.is_suspect(0.0)
        [waiting] = submit(batcher, 1)
        await until(lambda: bool(model.batches), "the batch")
        assert not batcher.is_suspect(1e6)
        assert batcher.is_suspect(0.0)
        model.let(1)
        await waiting
        await asyncio.sleep(0)
        assert not batcher.is_suspect(0.0)

    model = Doubler()
    asyncio.run(main())


def test_closing_ends_what_runs_and_what_waits() -> None:
    async def main() -> None:
        batcher = Batcher(model, max_size=1)
        asked = submit(batcher, 1, 2)
        await until(lambda: bool(model.batches), "the batch")
        await batcher.close()
        with pytest.raises(asyncio.CancelledError):
            await asked[1]
        asked[0].cancel()

    model = Doubler()
    asyncio.run(main())
    assert model.batches == [[1]]
    assert model.num_cancelled == 1
