"""What is measured of the endpoint: `raycap serve` on a free port, asked by another process over HTTP."""

from __future__ import annotations

import logging
import math
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from statistics import mean, median
from typing import Any, Final

import httpx2 as httpx
import numpy as np

from raycap.benchmark.bulk import steady
from raycap.benchmark.config import BenchmarkConfig
from raycap.benchmark.cpu import CpuClock
from raycap.benchmark.load import Answers, closed_loop, open_loop
from raycap.benchmark.timing import Measure, Sample
from raycap.errors import ConfigurationError, RaycapError
from raycap.model.captioner import Captioner
from raycap.serve.config import DEFAULT_MODEL, ServeConfig

log = logging.getLogger(__name__)

SHARES: Final = (0.5, 0.8, 1.5)
"""Of what the endpoint does at most, what is asked of it."""
NUM_SEVERAL: Final = 8
"""Images of a request, where there are several."""
NUM_SINGLE: Final = 50
"""Requests one after another, and direct calls, of which the median counts."""
WARM_UP_S: Final = 2.0
START_S: Final = 300.0
DEADLINE_S: Final = 60.0
EXPECTED_RATIO: Final = 0.8
"""What the endpoint should do of the tight loop: at that rate, a full queue takes the latency that it is told to
keep."""
_MULTIPROCESSING = multiprocessing.get_context("spawn")


def serve_measures(
    config: BenchmarkConfig, captioner: Captioner, files: Sequence[bytes], loads: list[list[dict[str, Any]]]
) -> list[Measure]:
    """The endpoint at saturation against a tight loop, and one request against one direct call, by turns, since a
    machine's speed changes within minutes; each round adds to `loads` what came of each of `SHARES`."""
    round_ = _Round(config, captioner, files, loads)
    return [
        Measure(name="serve", title="endpoint at saturation", run=round_.run),
        *(
            Measure(name=f"serve_{name}", title=title, run=partial(round_.found.__getitem__, name))
            for name, title in (
                ("loop", "tight loop beside the endpoint, before and after"),
                ("several", f"endpoint at saturation, {NUM_SEVERAL} images a request"),
                ("single", "endpoint, one request after another (median)"),
                ("direct", "direct calls, one after another, before and after (median)"),
            )
        ),
    ]


class _Round:
    """One endpoint, all loads on it, and what they are compared with."""

    def __init__(
        self,
        config: BenchmarkConfig,
        captioner: Captioner,
        files: Sequence[bytes],
        loads: list[list[dict[str, Any]]],
    ) -> None:
        self.config, self.captioner, self.files, self.loads = config, captioner, files, loads
        self.found: dict[str, Sample] = {}
        """What else than saturation was measured last."""

    def run(self) -> Sample:
        """Saturation."""
        config = self.config
        latency_s = min(DEADLINE_S, _max_queue(config) / (EXPECTED_RATIO * self._loop().images_per_s))
        with _endpoint(config, latency_s) as address, ProcessPoolExecutor(1, _MULTIPROCESSING) as pool:

            def ask(load: Callable[..., Answers], **how: Any) -> Answers:
                return pool.submit(load, address, self.files, **how).result()

            saturate = partial(ask, closed_loop, seconds=config.serve_s)
            senders = 2 * config.batch_size  # a batch in work, and the next one waiting
            ask(closed_loop, num_senders=senders, seconds=WARM_UP_S)
            self._compare_singles(ask)
            most = self._compare_saturation(partial(saturate, num_senders=senders))
            several = saturate(num_senders=max(1, senders // NUM_SEVERAL), num_images=NUM_SEVERAL)
            self.found["several"] = Sample(images_per_s=saturation(several.done_s, config), core_ms=None)
            rate = most.images_per_s
            answers = [(share, ask(open_loop, rate=share * rate, seconds=config.serve_s)) for share in SHARES]
            self.loads.append([summary(each, share=share, rate=rate, bound_s=latency_s) for share, each in answers])
        return most

    def _compare_singles(self, ask: Callable[..., Answers]) -> None:
        calls_s = self._direct()
        one = ask(closed_loop, num_senders=1, seconds=START_S, max_requests=NUM_SINGLE)
        if not one.latencies_s:
            raise ConfigurationError(f"the endpoint gave no captions; its last answer: {one.last_refusal}")
        calls_s += self._direct()
        self.found["single"] = Sample(images_per_s=1 / median(one.latencies_s), core_ms=None)
        self.found["direct"] = Sample(images_per_s=1 / median(calls_s), core_ms=None)

    def _compare_saturation(self, saturate: Callable[[], Answers]) -> Sample:
        before = self._loop()
        # Of this process, which waits, and all that it started; looked at before and after alone, for it costs time.
        clock = CpuClock({}, other="all", every_s=START_S) if CpuClock.is_available() else None
        with clock or nullcontext():
            most = saturate()
        after = self._loop()
        core_ms = 1000 * clock.between(0.0, math.inf)["all"] / max(1, len(most.done_s)) if clock else None
        self.found["loop"] = Sample(
            images_per_s=(before.images_per_s + after.images_per_s) / 2,
            core_ms=mean(each.core_ms for each in (before, after) if each.core_ms is not None),
        )
        return Sample(images_per_s=saturation(most.done_s, self.config), core_ms=core_ms)

    def _loop(self) -> Sample:
        """The tight loop, for half as long as the load that it stands beside."""
        num_images, batch_size = 0, self.config.batch_size
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        while time.perf_counter() - start_s < self.config.serve_s / 2:
            batch = [self.files[number % len(self.files)] for number in range(num_images, num_images + batch_size)]
            self.captioner.caption([self.captioner.prepare(data) for data in batch])
            num_images += batch_size
        cpu_s, elapsed_s = time.process_time() - cpu_start_s, time.perf_counter() - start_s
        return Sample(images_per_s=num_images / elapsed_s, core_ms=1000 * cpu_s / num_images)

    def _direct(self) -> list[float]:
        """Seconds of calls one after another."""
        seconds = []
        for number in range(NUM_SINGLE // 2):
            start_s = time.perf_counter()
            self.captioner.caption([self.captioner.prepare(self.files[number % len(self.files)])])
            seconds.append(time.perf_counter() - start_s)
        return seconds


def saturation(done_s: Sequence[float], config: BenchmarkConfig) -> float:
    """Images/s between the first batch and the end of the load; what came after that were its last, smaller batches.

    Raises ConfigurationError if there were too few.
    """
    times_s = np.array([each for each in done_s if each <= config.serve_s])
    if len(times_s) < 3 * config.batch_size:
        raise ConfigurationError(
            f"expected at least 3 batches of {config.batch_size} from the endpoint in {config.serve_s:g} s, got "
            f"{len(times_s)} images; raise --serve-s"
        )
    num_images, start_s, end_s = steady(times_s, config.batch_size)
    return num_images / (end_s - start_s)


def summary(answers: Answers, *, share: float, rate: float, bound_s: float) -> dict[str, Any]:
    """What came of one load. `bound_s` is what no accepted request should take longer than."""
    num_sent = len(answers.latencies_s) + answers.num_refused + answers.num_failed or 1
    num_images = sum(answers.batch_sizes.values()) or 1
    p50_ms, p99_ms = 1000 * np.percentile(answers.latencies_s or [0.0], (50, 99))
    return {
        "share": share,
        "asked_per_s": share * rate,
        "answered": len(answers.latencies_s) / num_sent,
        "refused": answers.num_refused / num_sent,
        "failed": answers.num_failed / num_sent,
        "p50_ms": float(p50_ms),
        "p99_ms": float(p99_ms),
        "bound_ms": 1000 * bound_s,
        "batch_sizes": {size: count / num_images for size, count in answers.batch_sizes.items()},
    }


def _max_queue(config: BenchmarkConfig) -> int:
    return 4 * config.batch_size


@contextmanager
def _endpoint(config: BenchmarkConfig, max_latency_s: float) -> Iterator[str]:
    """The address of an endpoint with a Ray of its own, which ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = ServeConfig(
        model=() if config.model is None else (f"{DEFAULT_MODEL}={config.model}",),
        port=port,
        device=config.device,
        precision=config.precision,
        engine=config.engine,
        batch_size=config.batch_size,
        max_queue=_max_queue(config),
        max_latency_s=max_latency_s,
        max_images=NUM_SEVERAL,
        max_body_mb=64.0,
        deadline_s=DEADLINE_S,
        ray_address="local",
        s3=config.s3,
    )
    told, tells = _MULTIPROCESSING.Pipe(duplex=False)
    # A daemon: it ends with this process, however that ends.
    process = _MULTIPROCESSING.Process(target=_serve, args=(settings, tells), daemon=True)
    process.start()
    tells.close()
    try:
        address = f"http://127.0.0.1:{port}"
        deadline_s = time.monotonic() + START_S
        while not _is_ready(address):
            if not process.is_alive() or time.monotonic() > deadline_s:
                reason = told.recv() if told.poll() else f"it was not ready within {START_S:g} s"
                raise ConfigurationError(f"the endpoint did not start: {reason}")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.join()


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/v2/health/ready", timeout=30).is_success
    except httpx.TransportError:
        return False


def _serve(settings: ServeConfig, tells: Connection) -> None:
    """In a process of its own: answer until SIGTERM."""
    from raycap.serve.on_ray import serve

    try:
        serve(settings)
    except RaycapError as error:
        tells.send(str(error))
