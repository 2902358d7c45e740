"""`raycap benchmark`: what the pipeline costs on top of the model, as a ratio, in one run on one machine."""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import raycap
from raycap.bulk.config import BenchmarkConfig, CaptionConfig
from raycap.bulk.run import caption
from raycap.errors import ConfigurationError, ObjectError
from raycap.model.captioner import Captioner
from raycap.storage import Store, open_store, write_bytes

log = logging.getLogger(__name__)


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure, print a table, and write the JSON that was asked for.

    The tight loop decodes and captions files from memory in this process, with all cores as torch's threads. The
    pipeline is `raycap caption` on the whole source, counted from its first finished batch to its last, so that neither
    includes starting up. Raises ConfigurationError or StorageError.
    """
    store = open_store(config.source, config.s3)
    store.check_readable()
    captioner = Captioner.load(config.model, s3=config.s3)
    files = list(islice(_readable_images(store, captioner), config.num_images))
    if not files:
        raise ConfigurationError(f"{config.source}: no image to measure with")
    log.info("tight loop over %d images in memory", len(files))
    tight = _tight_loop(captioner, files, config.batch_size)
    with tempfile.TemporaryDirectory() as output:
        outcome = caption(
            CaptionConfig(
                source=config.source,
                output=output,
                model=config.model,
                batch_size=config.batch_size,
                ray_address="local",
                report=False,
                s3=config.s3,
            )
        )
    bulk = outcome.steady_images_per_s
    if bulk is None:
        raise ConfigurationError(f"{config.source}: too few images for a steady rate; 1,000 and more are useful")
    again = _tight_loop(captioner, files, config.batch_size)
    tight_mean = (tight + again) / 2
    result = {
        "tight_loop_images_per_s": [round(tight, 2), round(again, 2)],
        "bulk_images_per_s": round(bulk, 2),
        "bulk_over_tight_loop": round(bulk / tight_mean, 3),
        "num_objects": outcome.summary["num_objects"],
        "stage_s": outcome.summary["stage_s"],
        "batch_size": config.batch_size,
        "model_id": captioner.model_id,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "raycap": raycap.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ray": version("ray"),
        },
    }
    if config.output:
        write_bytes(config.output, (json.dumps(result, indent=1) + "\n").encode(), config.s3)
    table = Table("", "images/s", "ratio", title="raycap benchmark")
    table.add_row("tight loop, before and after", f"{tight:.1f}, {again:.1f}", "1.00")
    table.add_row("bulk job", f"{bulk:.1f}", f"{bulk / tight_mean:.2f}")
    Console().print(table)
    return result


def _readable_images(store: Store, captioner: Captioner) -> Iterator[bytes]:
    """The bytes of the objects that can be captioned, in the order of the listing."""
    for info in store.list():
        try:
            data = store.read(info.key)
            captioner.prepare(data)
        except ObjectError:
            continue
        yield data


def _tight_loop(captioner: Captioner, files: list[bytes], batch_size: int) -> float:
    """Images/s of decoding and captioning, after one batch to warm up."""
    captioner.caption([captioner.prepare(data) for data in files[:batch_size]])
    started = time.perf_counter()
    remaining = iter(files)
    while batch := list(islice(remaining, batch_size)):
        captioner.caption([captioner.prepare(data) for data in batch])
    return len(files) / (time.perf_counter() - started)
