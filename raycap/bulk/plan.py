"""`raycap plan`: what captioning a source would take. Lists it, captions a small sample in this process, multiplies.

Writes nothing, starts no Ray.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from raycap.bulk import commit, sizing
from raycap.bulk.config import CaptionConfig, PlanConfig
from raycap.bulk.layout import CHUNK_ROWS, SHARD_ROWS
from raycap.bulk.manifest import WORK_SCHEMA
from raycap.bulk.progress import duration_text
from raycap.bulk.rows import OK, Fetcher, caption_rows
from raycap.bulk.sources import Source, SourceRow, open_source
from raycap.bulk.sources.base import Reader
from raycap.errors import ConfigurationError, NotFoundError
from raycap.images import ImageLimits
from raycap.model.captioner import Captioner

_BATCH_SIZE: Final = 32
_REQUESTS_IN_FLIGHT: Final = CaptionConfig(source="", output="").requests_in_flight
_KEYS_PER_LIST_REQUEST: Final = 1000


@dataclass(kw_only=True)
class _Listing:
    """Counts over the listing, and a random sample of the objects that would be tried."""

    num_objects: int = 0
    num_bytes: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    sample: list[SourceRow] = field(default_factory=list)
    is_whole: bool = True


def plan(config: PlanConfig) -> dict[str, Any]:
    """The numbers, also printed. Raises ConfigurationError or StorageError for a source that cannot be read."""
    source = open_source(config.source, config.selection, config.s3)
    source.check()
    with _one_thread():  # before the captioner is made: its engine takes its threads then
        captioner = Captioner.load(config.model, s3=config.s3)
        listing = _list(source, config)
        measured = _measured(source, captioner, listing.sample)
    result = _multiplied(config, listing, measured)
    result = {"source": source.location, "model_id": captioner.model_id, **result}
    if config.json:
        Console(soft_wrap=True).print_json(data=result)
    else:
        Console().print(_table(result))
    return result


def _list(source: Source, config: PlanConfig) -> _Listing:
    """Streams the listing; the sample is drawn as it goes by (reservoir sampling)."""
    listing, draw, num_tried = _Listing(), random.Random(0), 0
    for span in source.spans(1):
        for row in source.rows(span):
            if listing.num_objects == config.max_list:
                listing.is_whole = False
                return listing
            listing.num_objects += 1
            listing.num_bytes += row.size or 0
            if row.skip is not None:
                listing.skips[row.skip] += 1
                continue
            num_tried += 1
            if len(listing.sample) < config.num_samples:
                listing.sample.append(row)
            elif (place := draw.randrange(num_tried)) < config.num_samples:
                listing.sample[place] = row
    if not listing.num_objects:
        raise NotFoundError(f"{source.location}: there are no objects here; check the path, prefix and selection")
    return listing


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class _TimedReader:
    """Writes down how long each read takes."""

    reader: Reader
    seconds: list[float]

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        started = time.perf_counter()
        try:
            return self.reader.read(key, max_bytes=max_bytes)
        finally:
            self.seconds.append(time.perf_counter() - started)


def _measured(source: Source, captioner: Captioner, sample: list[SourceRow]) -> dict[str, Any]:
    """Seconds an image for each stage, and how the sample fared."""
    if not sample:
        raise ConfigurationError(f"{source.location}: every listed object would be skipped; see --all-files")
    reader = _TimedReader(source.reader, [])
    fetcher = Fetcher(
        reader=reader,
        reads_by=source.reads_by,
        preprocessing=captioner.preprocessing,
        limits=ImageLimits(),
        requests_in_flight=_REQUESTS_IN_FLIGHT,
    )
    fetcher(_work(sample[:1]))  # the first calls set things up
    reader.seconds.clear()
    cpu_started = time.process_time()
    fetched = fetcher(_work(sample))
    feed_core_s = time.process_time() - cpu_started
    # Once for nothing: above all on a GPU, the first batch of each size takes much longer than those after it.
    caption_rows(fetched, captioner, batch_size=_BATCH_SIZE)
    tally = commit.tally(caption_rows(fetched, captioner, batch_size=_BATCH_SIZE))
    num_ok = tally.counts[OK]
    if not num_ok:
        failures = ", ".join(f"{count} {code}" for code, count in tally.errors.items())
        raise ConfigurationError(
            f"{source.location}: none of {len(sample)} sampled objects could be captioned: {failures}"
        )
    num_of = {"caption_s": num_ok}  # an object without an image costs no captioning
    return {
        "num_sampled": len(sample),
        "sample_bytes": tally.num_bytes,
        "sample_counts": dict(tally.counts),
        "sample_errors": dict(tally.errors),
        "seconds_per_image": {
            name.removesuffix("_s"): max(1e-7, seconds / num_of.get(name, len(sample)))
            for name, seconds in tally.stage_s.items()
        },
        "feed_core_seconds_per_image": max(1e-7, feed_core_s / len(sample)),
        "pixel_bytes": 3 * captioner.preprocessing.size_px**2,
        "read_seconds": sum(reader.seconds) / len(reader.seconds),
        "device": str(captioner.device),
    }


def _work(sample: list[SourceRow]) -> pa.Table:
    columns: dict[str, Any] = {name: [getattr(row, name) for row in sample] for name in WORK_SCHEMA.names[2:]}
    return pa.table({"position": range(len(sample)), "row_id": range(len(sample)), **columns}, schema=WORK_SCHEMA)


def _multiplied(config: PlanConfig, listing: _Listing, measured: dict[str, Any]) -> dict[str, Any]:
    scale = (config.num_objects or listing.num_objects) / listing.num_objects
    num_objects = round(listing.num_objects * scale)
    num_skipped = round(listing.skips.total() * scale)
    num_tried = num_objects - num_skipped
    known_bytes = listing.num_bytes or measured["sample_bytes"] / measured["num_sampled"] * listing.num_objects
    num_cpus = config.num_cpus or os.cpu_count() or 1
    rate, bottleneck = sizing.images_per_s(_rates(config, measured, config.num_gpus), num_cpus, config.num_gpus)
    hours = num_tried / rate / 3600
    num_gets = num_tried + 2 * num_tried / CHUNK_ROWS
    num_puts = num_objects / _KEYS_PER_LIST_REQUEST + num_objects / CHUNK_ROWS + num_objects / SHARD_ROWS
    requests_price = num_gets / 1000 * config.price_per_1000_gets + num_puts / 1000 * config.price_per_1000_puts
    return {
        "listing_is_whole": listing.is_whole,
        "num_listed": listing.num_objects,
        "num_objects": num_objects,
        "num_bytes": round(known_bytes * scale),
        "num_skipped": num_skipped,
        "skips": dict(listing.skips),
        **measured,
        "num_cpus": num_cpus,
        "num_gpus": config.num_gpus,
        "images_per_s": round(rate, 1),
        "bottleneck": bottleneck,
        "hours": round(hours, 3),
        "cpu_hours": round(hours * num_cpus, 3),
        "gpu_hours": round(hours * config.num_gpus, 3),
        "cost": None if config.price_per_hour is None else round(hours * config.price_per_hour, 2),
        "num_get_requests": round(num_gets),
        "num_put_and_list_requests": round(num_puts),
        "requests_cost": round(requests_price, 2),
        **_sized(config, measured, num_tried),
    }


def _rates(config: PlanConfig, measured: dict[str, Any], num_gpus: int) -> sizing.Rates:
    """As measured, but for the rate of GPUs where that was given."""
    per_actor = 1 / measured["seconds_per_image"]["caption"]
    if num_gpus:
        if config.gpu_images_per_s is not None:
            per_actor = config.gpu_images_per_s
        elif not measured["device"].startswith("cuda"):
            raise ConfigurationError(
                "this machine has no GPU to measure: give --gpu-images-per-s, for instance from raycap benchmark there"
            )
    return sizing.Rates(
        captions_per_s=per_actor,
        feed_core_s=measured["feed_core_seconds_per_image"],
        read_s=measured["read_seconds"],
        image_bytes=measured["sample_bytes"] / measured["num_sampled"],
        pixel_bytes=measured["pixel_bytes"],
    )


def _sized(config: PlanConfig, measured: dict[str, Any], num_tried: int) -> dict[str, Any]:
    """What goes beside one actor; how many nodes are done in time, if that was asked for."""
    num_gpus = config.num_gpus or config.gpus_per_node
    rates = _rates(config, measured, num_gpus)
    result: dict[str, Any] = {
        "actor": "GPU" if num_gpus else "CPU core",
        "actor_images_per_s": rates.captions_per_s,
        "actor_images_per_s_is": "given" if num_gpus and config.gpu_images_per_s else "measured",
        "actor_needs": asdict(sizing.needs(rates)),
        "nodes": None,
    }
    if config.within_hours is not None:
        num_cpus = config.cpus_per_node or os.cpu_count() or 1
        rates = _rates(config, measured, config.gpus_per_node)
        rate, bottleneck = sizing.images_per_s(rates, num_cpus, config.gpus_per_node)
        result["nodes"] = {
            "num_nodes": sizing.num_nodes(num_tried, config.within_hours, rate),
            "within_hours": config.within_hours,
            "num_cpus": num_cpus,
            "num_gpus": config.gpus_per_node,
            "images_per_s": rate,
            "bottleneck": bottleneck,
        }
    return result


def _table(result: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    at_least = "" if result["listing_is_whole"] or result["num_objects"] > result["num_listed"] else "at least "
    table.add_row("source", result["source"])
    table.add_row("objects", f"{at_least}{result['num_objects']:,}, {result['num_bytes'] / 1e9:,.2f} GB")
    if not result["listing_is_whole"]:
        table.add_row("", f"the listing stopped after {result['num_listed']:,}; --max-list and --num-objects say more")
    for code, count in result["skips"].items():
        table.add_row("not tried", f"{count:,} of the listed: {code}")
    failed = ", ".join(f"{count} {code}" for code, count in result["sample_errors"].items())
    table.add_row("sample", f"{result['num_sampled']} captioned on {result['device']}; failed: {failed or 'none'}")
    stages = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in result["seconds_per_image"].items())
    table.add_row(
        "ms an image",
        f"{stages} (one thread); {1000 * result['feed_core_seconds_per_image']:.1f} of CPU time to fetch and decode, "
        f"{1000 * result['read_seconds']:.1f} for a read to arrive",
    )
    table.add_row("cluster", f"{result['num_cpus']} CPU cores, {result['num_gpus']} GPUs")
    table.add_row("rate", f"{result['images_per_s']:,.1f} images/s, limited by {result['bottleneck']}")
    hours = f"{duration_text(3600 * result['hours'])}; {result['cpu_hours']:,.1f} CPU-hours"
    table.add_row("time", hours + (f", {result['gpu_hours']:,.1f} GPU-hours" if result["num_gpus"] else ""))
    if result["cost"] is not None:
        table.add_row("cost", f"{result['cost']:,.2f} for the cluster")
    table.add_row(
        "S3 requests",
        f"{result['num_get_requests']:,} GET, {result['num_put_and_list_requests']:,} PUT and LIST: "
        f"{result['requests_cost']:,.2f}",
    )
    need, actor = result["actor_needs"], result["actor"]
    table.add_row(
        f"beside a {actor}",
        f"of {result['actor_images_per_s']:,.1f} images/s ({result['actor_images_per_s_is']}; the rest is measured): "
        f"{need['cores']:,.2f} cores to fetch and decode, {need['requests_in_flight']:,.1f} requests in flight, "
        f"{need['mb_per_s']:,.2f} MB/s of files, {need['pixel_mb_per_s']:,.2f} MB/s of pixels from other nodes",
    )
    if (nodes := result["nodes"]) is not None:
        table.add_row(
            "nodes",
            f"{nodes['num_nodes']:,} of {nodes['num_cpus']} CPU cores and {nodes['num_gpus']} GPUs caption in "
            f"{duration_text(3600 * nodes['within_hours'])}, {nodes['images_per_s']:,.1f} images/s each, limited by "
            f"{nodes['bottleneck']}; listing and joining come on top",
        )
    return table
