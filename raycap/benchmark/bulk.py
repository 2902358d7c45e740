"""What is measured of the bulk job: images/s and CPU time between its first captioned batch and its last, so that
starting up does not count."""

from __future__ import annotations

import logging
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq

from raycap.benchmark.config import BenchmarkConfig
from raycap.benchmark.cpu import CpuClock
from raycap.benchmark.on_ray import caption_alone
from raycap.benchmark.timing import Measure, Sample
from raycap.bulk.config import CaptionConfig, Selection
from raycap.bulk.layout import CAPTIONS_PREFIX
from raycap.bulk.progress import SHORTEST_S
from raycap.bulk.rows import OK
from raycap.errors import ConfigurationError

log = logging.getLogger(__name__)

WORKERS: Final = {"Read_Chunks": "fetch", "_CaptionActor": "caption", "_Committer": "write"}
"""What the processes of bulk/on_ray.py do, by parts of the names that Ray gives them. All others are Ray's own."""


def bulk_measure(config: BenchmarkConfig, source: str, name: str, found: list[dict[str, float]]) -> Measure:
    """The bulk job from one source; each run adds to `found` the milliseconds that each kind of worker spent on an
    image, as `breakdown.of_bulk` takes them."""

    def run() -> Sample:
        sample, worker_ms = _run(config, source)
        found.append(worker_ms)
        return sample

    return Measure(name=name, title=f"bulk job from {source}", run=run)


def steady(times_s: np.ndarray, batch_size: int) -> tuple[int, float, float]:
    """How many images were captioned after the first batch; when that was done; when the last one was.

    Raises ConfigurationError if there is nothing after the first batch.
    """
    times_s = np.sort(times_s)
    if len(times_s) <= batch_size or not times_s[-1] > times_s[batch_size - 1]:
        raise ConfigurationError(
            f"expected more images for bulk than one batch of {batch_size}, got {len(times_s)}; "
            "1,000 and more are useful. Give another SOURCE or a smaller --batch-size, or leave bulk out of --parts"
        )
    return len(times_s) - batch_size, float(times_s[batch_size - 1]), float(times_s[-1])


def _run(config: BenchmarkConfig, source: str) -> tuple[Sample, dict[str, float]]:
    clock = CpuClock(WORKERS, other="ray") if CpuClock.is_available() else None
    with tempfile.TemporaryDirectory(prefix="raycap-benchmark-") as output:
        with clock or nullcontext():
            outcome = caption_alone(
                CaptionConfig(
                    source=source,
                    output=output,
                    selection=Selection(limit=config.num_bulk_images),
                    model=config.model,
                    batch_size=config.batch_size,
                    device=config.device,
                    precision=config.precision,
                    engine=config.engine,
                    ray_address="local",
                    report=False,
                    s3=config.s3,
                )
            )
        rows = pq.read_table(Path(output) / CAPTIONS_PREFIX, columns=["captioned_at"], filters=[("status", "=", OK)])
    times_s = rows["captioned_at"].to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6
    num_images, start_s, end_s = steady(times_s, config.batch_size)
    if end_s - start_s < SHORTEST_S:
        log.warning("%s: %d images in %.1f s; a rate over so little says little", source, num_images, end_s - start_s)
    rate = num_images / (end_s - start_s)
    if clock is None:  # the seconds that the stages took, over all images
        seconds, num_images = outcome.summary["stage_s"], len(times_s)
    else:
        seconds = clock.between(start_s, end_s)
    worker_ms = {name: 1000 * spent_s / num_images for name, spent_s in seconds.items()}
    return Sample(images_per_s=rate, core_ms=sum(worker_ms.values()) if clock else None), worker_ms
