"""What is measured of the endpoint: `raycap serve` on a free port, asked by another process over HTTP."""

from __future__ import annotations

import logging
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, Final

import httpx2 as httpx
import numpy as np

from raycap.benchmark.bulk import steady
from raycap.benchmark.config import BenchmarkConfig
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
_MULTIPROCESSING = multiprocessing.get_context("spawn")


def serve_measures(
    config: BenchmarkConfig, captioner: Captioner, files: Sequence[bytes], loads: list[list[dict[str, Any]]]
) -> list[Measure]:
    """The endpoint at saturation, and one request against one direct call; each round adds to `loads` what came of
    each of `SHARES`."""
    singles: list[Sample] = []
    severals: list[Sample] = []

    def direct() -> Sample:
        seconds = []
        for number in range(NUM_SINGLE):
            start_s = time.perf_counter()
            captioner.caption([captioner.prepare(files[number % len(files)])])
            seconds.append(time.perf_counter() - start_s)
        return Sample(images_per_s=1 / median(seconds), core_ms=None)

    def serve() -> Sample:
        with _endpoint(config) as address, ProcessPoolExecutor(1, _MULTIPROCESSING) as pool:

            def ask(load: Callable[..., Answers], **how: Any) -> Answers:
                return pool.submit(load, address, files, **how).result()

            senders = 2 * config.batch_size  # a batch in work, and the next one waiting
            ask(closed_loop, num_senders=senders, seconds=WARM_UP_S)
            one = ask(closed_loop, num_senders=1, seconds=START_S, max_requests=NUM_SINGLE)
            if not one.latencies_s:
                raise ConfigurationError(f"the endpoint gave no captions; its last answer: {one.last_refusal}")
            singles.append(Sample(images_per_s=1 / median(one.latencies_s), core_ms=None))
            most = ask(closed_loop, num_senders=senders, seconds=config.serve_s)
            rate = saturation(most.done_s, config)
            several = ask(
                closed_loop, num_senders=max(1, senders // NUM_SEVERAL), seconds=config.serve_s, num_images=NUM_SEVERAL
            )
            severals.append(Sample(images_per_s=saturation(several.done_s, config), core_ms=None))
            found = []
            for share in SHARES:
                answers = ask(open_loop, rate=share * rate, seconds=config.serve_s)
                found.append(summary(answers, share=share, rate=rate, max_queue=_max_queue(config)))
            loads.append(found)
        return Sample(images_per_s=rate, core_ms=None)

    return [
        Measure(name="serve", title="endpoint at saturation", run=serve),
        Measure(
            name="serve_several",
            title=f"endpoint at saturation, {NUM_SEVERAL} images a request",
            run=lambda: severals[-1],
        ),
        Measure(name="serve_single", title="endpoint, one request after another (median)", run=lambda: singles[-1]),
        Measure(name="serve_direct", title="direct calls, one after another (median)", run=direct),
    ]


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


def summary(answers: Answers, *, share: float, rate: float, max_queue: int) -> dict[str, Any]:
    """What came of one load."""
    num_sent = len(answers.latencies_s) + answers.num_refused + answers.num_failed
    num_images = sum(answers.batch_sizes.values()) or 1
    p50_ms, p99_ms = 1000 * np.percentile(answers.latencies_s or [np.nan], (50, 99))
    return {
        "share": share,
        "asked_per_s": share * rate,
        "answered": len(answers.latencies_s) / num_sent,
        "refused": answers.num_refused / num_sent,
        "failed": answers.num_failed / num_sent,
        "p50_ms": float(p50_ms),
        "p99_ms": float(p99_ms),
        # Whoever is accepted has fewer than so many before it.
        "bound_ms": 1000 * max_queue / rate,
        "batch_sizes": {size: count / num_images for size, count in answers.batch_sizes.items()},
    }


def _max_queue(config: BenchmarkConfig) -> int:
    return 4 * config.batch_size


@contextmanager
def _endpoint(config: BenchmarkConfig) -> Iterator[str]:
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
        max_images=NUM_SEVERAL,
        max_body_mb=64.0,
        deadline_s=60.0,
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
