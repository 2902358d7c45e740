"""Requests to an endpoint, as the benchmark sends them from a process of its own: no torch and no Ray here."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import httpx2 as httpx
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 120.0


@dataclass(kw_only=True)
class Answers:
    """What came back."""

    latencies_s: list[float] = field(default_factory=list)
    """Of the requests that got captions, from the moment at which they were due."""
    done_s: list[float] = field(default_factory=list)
    """When each of their images was done, since the start."""
    num_refused: int = 0
    """Requests that got 503."""
    num_failed: int = 0
    """Requests that got anything else."""
    last_refusal: str = ""
    """What the last of both kinds got."""
    batch_sizes: dict[str, float] = field(default_factory=dict)
    """Images by the size of their batch: up to 1, up to 2, up to 4 and so on."""


def closed_loop(
    address: str,
    files: Sequence[bytes],
    *,
    num_senders: int,
    seconds: float,
    max_requests: int | None = None,
    num_images: int = 1,
) -> Answers:
    """Senders that ask again as soon as they are answered (503: when they are told to), for so long or until each has
    asked so often. Each request has so many images."""

    async def send_all(load: _Load) -> None:
        num_sent = 0
        while load.now_s() < seconds and num_sent != max_requests:
            await asyncio.sleep(await load.send(load.now_s(), num_images))
            num_sent += 1

    async def run() -> Answers:
        async with _Load(address, files) as load:
            await asyncio.gather(*(send_all(load) for _ in range(num_senders)))
        return load.answers

    return asyncio.run(run())


def open_loop(address: str, files: Sequence[bytes], *, rate: float, seconds: float) -> Answers:
    """Requests at random moments, `rate` a second (a Poisson process, always the same), however long answers take."""
    dice = random.Random(0)

    async def run() -> Answers:
        async with _Load(address, files) as load, asyncio.TaskGroup() as pending:
            due_s = 0.0
            while (due_s := due_s + dice.expovariate(rate)) < seconds:
                await asyncio.sleep(due_s - load.now_s())
                pending.create_task(load.send(due_s))
        return load.answers

    return asyncio.run(run())


class _Load:
    """One load from its first request to its last answer."""

    def __init__(self, address: str, files: Sequence[bytes]) -> None:
        self.answers = Answers()
        self._files = cycle(files)
        # As many connections as it takes: a client that waits for one would hide how long the server takes.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=address, timeout=TIMEOUT_S, limits=limits)

    async def __aenter__(self) -> _Load:
        self._batches_before = await self._batch_sizes()
        self._start_s = time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        after = await self._batch_sizes()
        self.answers.batch_sizes = {size: count - self._batches_before.get(size, 0) for size, count in after.items()}
        await self._client.aclose()

    def now_s(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start_s

    async def send(self, due_s: float, num_images: int = 1) -> float:
        """One request that was due then; gives the seconds that its answer asks to wait."""
        files = list(islice(self._files, num_images))
        body: dict[str, Any] = {"content": files[0], "headers": {"Content-Type": "application/octet-stream"}}
        if num_images > 1:
            body = {"files": [("image", file) for file in files]}
        try:
            answer = await self._client.post("/v1/caption", **body)
        except httpx.TransportError as error:
            self.answers.num_failed += 1
            self.answers.last_refusal = repr(error)
            return 0.0
        done_s = self.now_s()
        if answer.status_code == 200:
            self.answers.latencies_s.append(done_s - due_s)
            self.answers.done_s += [done_s] * num_images
            return 0.0
        self.answers.last_refusal = f"{answer.status_code} {answer.text[:500]}"
        if answer.status_code == 503:
            self.answers.num_refused += 1
        else:
            self.answers.num_failed += 1
        return float(answer.headers.get("retry-after", 0))

    async def _batch_sizes(self) -> dict[str, float]:
        """Images by the size of their batch, since the endpoint started."""
        counts: dict[str, float] = {}
        text = (await self._client.get("/metrics")).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "raycap_batch_size_bucket":
                    # Of a histogram each bucket has all below it, too.
                    counts[sample.labels["le"]] = sample.value - sum(counts.values())
        return {size.removesuffix(".0"): count for size, count in counts.items()}
