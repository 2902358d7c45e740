"""Images of many requests in one call of the model.

A batch is made when the model is free, of what came while it was busy. `serve.batch` of Ray 2.60 goes by the clock
alone: while the model is busy it closes batches of whatever came within its wait, and they stay that small. Measured
with batches of up to 16 that take 60 ms and 10 ms an image, 16 clients: 42 images/s against 16.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

MANY_FAILURES = 3
Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Batched(Generic[Answer]):
    """An answer, and how it came."""

    answer: Answer
    queue_s: float
    run_s: float
    batch_size: int


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting(Generic[Item, Answer]):
    item: Item
    since_s: float
    is_alone: bool
    future: asyncio.Future[Batched[Answer]]


class Batcher(Generic[Item, Answer]):
    """Calls `run` in a thread of its own, one batch after another. Belongs to one event loop."""

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Answer]],
        *,
        max_size: int,
        wait_s: float,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        """
        Args:
            run: gives an answer for each item, in their order.
            max_size: most items of a batch.
            wait_s: how long an item that is not alone waits, while nothing runs, for others to fill the batch.
            thread: a pool of one thread for `run`, if not a new one; ends with this.
        """
        self._run = run
        self._max_size = max_size
        self._wait_s = wait_s
        self._waiting: deque[_Waiting[Item, Answer]] = deque()
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = thread or ThreadPoolExecutor(1, "raycap-model")
        self._failed_in_a_row = 0
        self._running_since_s: float | None = None

    async def submit(self, item: Item, *, is_alone: bool = False) -> Batched[Answer]:
        """The item's answer. If the caller is cancelled before its batch starts, the item is in no batch.

        `is_alone`: it waits for no others.

        Raises what `run` raised for its batch.
        """
        loop = asyncio.get_running_loop()
        if self._worker is None:
            # In a context of its own: that of the request which happens to be first ends with it.
            self._worker = loop.create_task(self._work(), context=contextvars.Context())
        future: asyncio.Future[Batched[Answer]] = loop.create_future()
        self._waiting.append(_Waiting(item, time.perf_counter(), is_alone, future))
        self._arrived.set()
        return await future

    def is_suspect(self, longest_s: float) -> bool:
        """Whether the last `MANY_FAILURES` batches failed, or the present one takes longer than `longest_s`."""
        since_s = self._running_since_s
        is_late = since_s is not None and time.perf_counter() - since_s > longest_s
        return is_late or self._failed_in_a_row >= MANY_FAILURES

    async def close(self) -> None:
        """End the worker and its thread; what waits is cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        for each in self._waiting:
            each.future.cancel()
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            start_s = self._running_since_s = time.perf_counter()
            try:
                answers = await loop.run_in_executor(self._thread, self._run, [each.item for each in batch])
            except Exception as error:
                self._failed_in_a_row += 1
                for each in batch:
                    if not each.future.done():
                        each.future.set_exception(error)
                continue
            finally:
                self._running_since_s = None
            self._failed_in_a_row = 0
            run_s = time.perf_counter() - start_s
            for each, answer in zip(batch, answers, strict=True):
                if not each.future.done():
                    each.future.set_result(Batched(answer, start_s - each.since_s, run_s, len(batch)))

    async def _next_batch(self) -> list[_Waiting[Item, Answer]]:
        while True:
            self._drop_cancelled()
            if self._waiting:
                first = self._waiting[0]
                left_s = 0.0 if first.is_alone else first.since_s + self._wait_s - time.perf_counter()
                if len(self._waiting) >= self._max_size or left_s <= 0:
                    return [self._waiting.popleft() for _ in range(min(self._max_size, len(self._waiting)))]
            else:
                left_s = None
            self._arrived.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._arrived.wait()
            except TimeoutError:
                pass

    def _drop_cancelled(self) -> None:
        self._waiting = deque(each for each in self._waiting if not each.future.done())
