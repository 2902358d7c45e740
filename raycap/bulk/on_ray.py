"""The bulk job's work on Ray Data.

    chunks to do -> fetch and decode (CPU tasks) -> caption (pool of actors) -> commit (actors) -> join into files

A chunk stays one block from end to end, so the commit sees it whole. torch is imported by the actors alone: in every
process that fetches it would take 300 MB.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.metrics import Counter as MetricCounter

from raycap.bulk import commit
from raycap.bulk.config import CaptionConfig
from raycap.bulk.layout import CHUNK_ROWS, Round, chunk_rows
from raycap.bulk.manifest import Manifest, ManifestReader
from raycap.bulk.previous import deleted_ids
from raycap.bulk.resources import plan_resources, plan_tasks
from raycap.bulk.rows import FAILED, STAGES, Fetcher, caption_rows
from raycap.bulk.stall import ended_if_stalled
from raycap.errors import RaycapError
from raycap.on_ray import connect, mailbox, raycap_cause
from raycap.storage import Store

if TYPE_CHECKING:
    from raycap.bulk.run import Job
    from raycap.model.bundle import Bundle

log = logging.getLogger(__name__)

ACTORS_PER_COMMITTER = 4
"""Captioning actors whose chunks one actor writes, as many at a time: at 1,000 images/s each, it has 256 ms a chunk."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to Ray. An error of ours that a worker raised comes out as it is, not as what Ray wraps it in."""
    connect(address)
    try:
        yield
    except Exception as error:
        cause = raycap_cause(error)
        if cause is None or cause is error:
            raise
        cause.args = (str(cause).partition("\nFailed to ")[0],)  # Ray Data adds to it how it can be made to try again
        raise cause from None


def caption_chunks(job: Job, manifest: Manifest, todo: np.ndarray) -> None:
    """Fetch, caption and commit the chunks `todo`."""
    if len(todo) == 0:
        return
    config, bundle = job.config, job.bundle
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = plan_resources(config, [node["Resources"] for node in nodes])
    num_actors, max_actors = (min(each, len(todo)) for each in (resources.num_actors, resources.max_actors))
    log.info("captioning with %d actor%s", num_actors, "s" if num_actors > 1 else "")
    num_cores = sum(int(node["Resources"].get("CPU", 0)) for node in nodes)
    chunks = _Chunks(todo, _fetcher(job), job.output, manifest, num_tasks=8 * num_cores)
    _set_up_ray_data(chunks.block_bytes)
    bundle_ref, manifest_ref = ray.put(bundle), ray.put(manifest)
    engines: set[str] = set()

    def receive(message: tuple[int, dict[str, int], float, str]) -> None:
        done, errors, at_s, engine = message
        if engine not in engines:
            engines.add(engine)
            log.info("the encoder runs on %s", engine)
        job.progress.add(done, errors=errors, at_s=at_s)

    num_committed = 0

    def progress() -> tuple[int, int]:
        return job.progress.done, num_committed

    with mailbox(receive) as box, ended_if_stalled(progress, after_s=config.max_stall_s):
        stream = (
            ray.data.read_datasource(chunks, num_cpus=resources.cpus_per_fetch, override_num_blocks=len(chunks.groups))
            # As Ray's own map_groups: map_batches refuses whole blocks on GPUs, and a batch size would mix chunks.
            .map_batches_internal(
                _CaptionActor,
                fn_constructor_args=(bundle_ref, config, resources.device, resources.threads_per_actor, box),
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=num_actors, max_size=max_actors),
                num_cpus=resources.cpus_per_actor,
                num_gpus=resources.gpus_per_actor or None,
            )
            .map_batches(
                _Committer,
                fn_constructor_args=(job.output, manifest_ref),
                batch_size=None,
                batch_format="pyarrow",
                # Actors, since Ray starts a new process for most tasks that come now and then.
                compute=ray.data.ActorPoolStrategy(
                    size=-(-max_actors // ACTORS_PER_COMMITTER),
                    max_concurrent_calls_per_actor=ACTORS_PER_COMMITTER,
                    enable_true_multi_threading=True,
                ),
                num_cpus=0,
                label_selector=_with_cpus(nodes),
            )
        )
        for _ in stream.iter_batches(batch_size=None):
            num_committed += 1
            job.lock.check()


def _fetcher(job: Job) -> Fetcher:
    return Fetcher(
        reader=job.source.reader,
        reads_by=job.source.reads_by,
        preprocessing=job.bundle.preprocessing,
        limits=job.config.limits,
        requests_in_flight=job.config.requests_in_flight,
    )


def _with_cpus(nodes: list[dict[str, Any]]) -> dict[str, str] | None:
    """Where actors go that reserve nothing: not to a head without CPUs, which is for drivers."""
    without = [node["NodeID"] for node in nodes if not node["Resources"].get("CPU")]
    return {"ray.io/node-id": f"!in({','.join(without)})"} if without else None


def _set_up_ray_data(block_bytes: int) -> None:
    _quiet_ray_data()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # what Ray wraps it in loses its cause between processes
    # A chunk must stay one block: what a read task yields is cut where it passes this size, and it always does.
    context.target_max_block_size = block_bytes


def _quiet_ray_data() -> None:
    """Keep Ray Data's warnings on the screen; its other lines go to its log file alone."""
    said_by_us = (
        "Progress bars disabled",
        "Exception occurred in user code",
        "An exception was raised from a task",
        "Exception occurred in Ray Data",
        "Full stack trace",
    )

    def is_worth_it(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not record.getMessage().startswith(said_by_us)

    for handler in logging.getLogger("ray.data").handlers:
        # Ray's own alone: it also hangs the root logger's handlers here, which are not ours to change.
        if type(handler).__module__.startswith("ray.") and isinstance(handler, logging.StreamHandler):
            handler.addFilter(is_worth_it)


class _Chunks(Datasource):
    """Chunks of the manifest as blocks of pixels. Fetching is the read itself: a map after a read would not run at its
    own share of a CPU (a read reserves a whole one)."""

    def __init__(
        self, todo: np.ndarray, fetcher: Fetcher, output: Store, manifest: Manifest, *, num_tasks: int
    ) -> None:
        super().__init__()
        self.groups = plan_tasks(todo, num_tasks)
        self.block_bytes = CHUNK_ROWS * 3 * fetcher.preprocessing.size_px**2
        self._num_rows = manifest.num_rows
        self._shared = ray.put((fetcher, output, manifest))

    def estimate_inmemory_data_size(self) -> int:
        return sum(map(len, self.groups)) * self.block_bytes

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_fetch_chunks, self._shared, group),
                BlockMetadata(
                    num_rows=sum(len(chunk_rows(chunk, self._num_rows)) for chunk in group),
                    size_bytes=len(group) * self.block_bytes,
                    input_files=None,
                    exec_stats=None,
                ),
            )
            for group in self.groups
        ]


def _fetch_chunks(shared: ray.ObjectRef[Any], chunks: list[int]) -> Iterator[pa.Table]:
    fetcher, output, manifest = ray.get(shared)
    reader = ManifestReader(output, manifest)
    for chunk in chunks:
        yield fetcher(reader.chunk(chunk))


class _CaptionActor:
    """A model that captions chunk after chunk."""

    def __init__(self, bundle: ray.ObjectRef[Any], config: CaptionConfig, device: str, threads: int, box: Any) -> None:
        import torch

        from raycap.model.captioner import Captioner

        torch.set_num_threads(threads)
        loaded: Bundle = ray.get(bundle)
        decoding = loaded.decoding.updated(**config.decoding_overrides)
        self.batch_size = config.batch_size
        self.box = box
        self.metrics = _Metrics()
        self.error: RaycapError | None = None
        try:
            self.captioner = Captioner(
                loaded, device=device, precision=config.precision, engine=config.engine, decoding=decoding
            )
        except RaycapError as error:  # Ray keeps the cause of what a call raises, but not of what a constructor does
            self.error = error

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self.error is not None:
            raise self.error
        failed = rows.filter(pc.equal(rows["status"], FAILED))["error_code"]
        errors = dict(Counter(failed.to_pylist()))

        def on_batch(done: int) -> None:
            nonlocal errors
            engine = f"{self.captioner.device} with engine {self.captioner.engine}"
            self.box.post.remote((done, errors, time.time(), engine))
            errors = {}

        rows = caption_rows(rows, self.captioner, batch_size=self.batch_size, on_batch=on_batch)
        self.metrics.count(rows)
        return rows


class _Metrics:
    """What Prometheus sees of a captioning actor, by way of Ray's metrics; Ray puts `ray_` before the names."""

    def __init__(self) -> None:
        self.images = MetricCounter("raycap_images_total", "Objects done.", ("status",))
        self.failures = MetricCounter("raycap_failures_total", "Objects without a caption.", ("code",))
        self.bytes = MetricCounter("raycap_bytes_total", "Bytes of the objects done.")
        self.seconds = MetricCounter("raycap_stage_seconds_total", "Time spent, summed over workers.", ("stage",))

    def count(self, rows: pa.Table) -> None:
        """Add the rows of one chunk."""
        total = commit.tally(rows)
        for status, count in total.counts.items():
            self.images.inc(count, {"status": status})
        for code, count in total.errors.items():
            self.failures.inc(count, {"code": code})
        if total.num_bytes:
            self.bytes.inc(total.num_bytes)
        for name in STAGES:
            if total.stage_s[name] > 0:
                self.seconds.inc(total.stage_s[name], {"stage": name.removesuffix("_s")})


class _Committer:
    """Writes chunk after chunk."""

    def __init__(self, output: Store, manifest: ray.ObjectRef[Any]) -> None:
        self.output = output
        self.manifest: Manifest = ray.get(manifest)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.table({"chunk": [commit.commit_chunk(rows, self.output, self.manifest)]})


def join_chunks(job: Job, manifest: Manifest) -> tuple[commit.Tally, int]:
    """Check that every row is there and join the chunks into the final files, in parallel; gives the counts of all rows
    and the number of files."""
    output = job.output
    missing = commit.missing_chunks(output, manifest)
    if len(missing):
        raise RaycapError(f"{len(missing)} chunks were not written; run the same command again")
    bytes_per_file = int(job.config.file_size_mb * 1e6)
    new_parts = commit.plan_parts(output, manifest, bytes_per_file)
    num_parts = len(manifest.parts) + len(new_parts)
    commit.delete_parts(output, num_parts)
    write = ray.remote(num_cpus=1, max_retries=-1)(commit.write_part)
    renew = ray.remote(num_cpus=1, max_retries=-1)(commit.renew_part)
    manifest_ref = ray.put(manifest)
    tasks = [
        write.remote(output, part, chunks, manifest_ref) for part, chunks in enumerate(new_parts, len(manifest.parts))
    ]
    if manifest.parts:
        deleted_ref = ray.put(deleted_ids(output, Round(manifest.round)))
        for part, chunks in enumerate(commit.chunks_of_old_parts(output, manifest)):
            tasks.append(renew.remote(output, part, chunks, deleted_ref, manifest_ref))
    total = commit.Tally()
    for tally in ray.get(tasks):
        total.add(tally)
    if total.num_rows != manifest.num_total:
        raise RaycapError(
            f"{output.location} has {total.num_rows} rows, not one for each of {manifest.num_total} objects; "
            "its files were changed while raycap worked. Run the same command again"
        )
    return total, num_parts
