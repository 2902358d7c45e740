"""`raycap benchmark` from start to end: images into memory, rounds of measurements, the table, the files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from raycap.benchmark.config import BenchmarkConfig
from raycap.benchmark.machine import machine, versions
from raycap.benchmark.page import render
from raycap.benchmark.parts import engines_of, part_measures, read_images, share_of_equal_captions
from raycap.benchmark.result import core_ms, load_medians, ratios
from raycap.benchmark.table import print_result
from raycap.benchmark.timing import Measure, measure
from raycap.errors import ConfigurationError
from raycap.model.bundle import Bundle
from raycap.storage import open_store, write_bytes

log = logging.getLogger(__name__)


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure, print the tables, and write the files that were asked for; gives what is in the JSON.

    Raises ConfigurationError or StorageError.
    """
    serve_measures = _serve_measures() if "serve" in config.parts else None
    stores = [open_store(source, config.s3) for source in config.sources]
    for store in stores:
        store.check_readable()
    bundle = Bundle.load(config.model, s3=config.s3)
    engines = engines_of(bundle, config)
    captioner = engines["chosen"]
    files = read_images(stores[0], captioner, config.num_images)
    log.info("%d images in memory; engine %s", len(files), captioner.engine)
    measures = part_measures(config, engines, files)
    worker_ms: dict[str, list[dict[str, float]]] = {}
    if "bulk" in config.parts:
        from raycap.benchmark.bulk import bulk_measure  # Ray: only where it is needed

        for number, source in enumerate(config.sources, 1):
            runs = worker_ms.setdefault(f"bulk_{number}", [])
            measures.append(bulk_measure(config, source, f"bulk_{number}", runs))
    loads: list[list[dict[str, Any]]] = []
    if serve_measures:
        measures += serve_measures(config, captioner, files, loads)
    measure(measures, config.repeats)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_id": captioner.model_id,
        "engine": captioner.engine,
        "device": str(captioner.device),
        "num_images": len(files),
        "measurements": {each.name: each.to_dict() for each in measures},
        "ratios": ratios(measures),
        "share_of_equal_captions": round(
            share_of_equal_captions(captioner, engines["plain"], files, config.batch_size), 4
        ),
        "loads": load_medians(loads),
        "core_ms_per_image": core_ms(measures, worker_ms),
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(config),
    }
    print_result(result, Console())
    for location, text in ((config.output, json.dumps(result, indent=1) + "\n"), (config.report, render(result))):
        if location:
            write_bytes(location, text.encode(), config.s3)
            log.info("wrote %s", location)
    return result


def _serve_measures() -> Callable[..., list[Measure]]:
    """That of `benchmark.serve`. Raises ConfigurationError if its packages are not installed."""
    try:
        from raycap.benchmark.serve import serve_measures
    except ImportError as error:
        raise ConfigurationError(
            f"part serve needs packages that are not installed ({error.name}): pip install 'raycap[serve]', or leave "
            "serve out of --parts"
        ) from error
    return serve_measures
