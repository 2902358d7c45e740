"""The bulk job on Ray Data.

    chunks to do -> fetch and decode (CPU tasks) -> caption (pool of actors) -> commit (CPU tasks) -> join into files

A chunk stays one block from end to end, so the commit sees it whole.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

import raycap
from raycap.bulk import commit
from raycap.bulk.config import CaptionConfig
from raycap.bulk.layout import CHUNK_ROWS, MANIFEST, RUN, SUMMARY, chunk_rows
from raycap.bulk.manifest import Manifest, open_manifest, read_chunk, root_of
from raycap.bulk.progress import RunProgress
from raycap.bulk.report import REPORT, write_report
from raycap.bulk.resources import plan_resources
from raycap.bulk.rows import FAILED, Fetcher, caption_rows
from raycap.errors import ConfigurationError, RaycapError
from raycap.model.bundle import Bundle
from raycap.model.captioner import Captioner
from raycap.on_ray import connect, mailbox, raycap_cause
from raycap.storage import Store, open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    summary: dict[str, Any]
    within_limits: bool
    """Whether no more than the allowed share of rows failed."""
    steady_images_per_s: float | None
    """From the first captioned batch to the last, without starting up; None if this call captioned nothing much."""


def caption(config: CaptionConfig) -> Outcome:
    """Caption the whole source. Resumes a run that was stopped; does nothing if it is complete.

    Raises ConfigurationError or StorageError for what stops a whole run; what is wrong with one object is in its row.
    """
    source, output = open_store(config.source, config.s3), open_store(config.output, config.s3)
    if root_of(source) == root_of(output):
        raise ConfigurationError(
            f"{output.location} is the source; the output would mix with the images. Choose another directory or "
            "prefix, such as one inside it"
        )
    source.check_readable()
    output.check_writable()
    bundle = Bundle.load(config.model, s3=config.s3)
    _start_or_resume(config, source, output, bundle)
    if output.exists(SUMMARY):
        summary = _finished_summary(source, output, bundle)
        log.info("%s is complete: %d rows; nothing to do", output.location, summary["num_objects"])
        if config.report and not output.exists(REPORT):  # it is written after the summary
            _report(config, output)
        return Outcome(summary=summary, within_limits=_within_limits(summary, config), steady_images_per_s=None)
    started = datetime.now(UTC)
    log.info("%s %s", "going on with the listing of" if output.exists(MANIFEST) else "listing", source.location)
    manifest = open_manifest(source, output)
    todo = commit.missing_chunks(output, manifest.num_rows)
    num_todo = sum(len(chunk_rows(chunk, manifest.num_rows)) for chunk in todo)
    resumed = f", {manifest.num_rows - num_todo} of them done already" if num_todo < manifest.num_rows else ""
    log.info("%d objects, %.1f MB%s", manifest.num_rows, manifest.num_bytes / 1e6, resumed)
    connect(config.ray_address)
    progress = RunProgress(total=manifest.num_rows, done=manifest.num_rows - num_todo)
    try:
        with progress:
            _run(config, source, output, bundle, manifest, todo, progress)
        total = _finish(config, output, manifest)
    except Exception as error:
        cause = raycap_cause(error)
        if cause is None or cause is error:
            raise
        raise cause from None
    elapsed_s = (datetime.now(UTC) - started).total_seconds()
    summary = {
        "status": "complete",
        "source": source.location,
        "output": output.location,
        "model_id": bundle.model_id,
        "fingerprint": manifest.fingerprint,
        **total.to_dict(),
        "started_at": started.isoformat(),
        "finished_at": datetime.now(UTC).isoformat(),
        "elapsed_s": round(elapsed_s, 1),
        "images_per_s": round(num_todo / elapsed_s, 2),
        "num_files": len(commit.chunks_of_parts(manifest.num_rows, config.rows_per_file)),
        "raycap_version": raycap.__version__,
    }
    commit.write_json(output, SUMMARY, summary)
    if config.report:
        _report(config, output)
    return Outcome(
        summary=summary, within_limits=_within_limits(summary, config), steady_images_per_s=progress.images_per_s
    )


def _report(config: CaptionConfig, output: Store) -> None:
    """Write the report. The captions are complete, so that it cannot be written is no failure of the run."""
    try:
        log.info("writing %s", write_report(output.location, s3=config.s3))
    except RaycapError as error:
        log.warning("the captions are complete, but not the report: %s; raycap report tries again", error)


def _finished_summary(source: Store, output: Store, bundle: Bundle) -> dict[str, Any]:
    """The summary of a complete output, if it is of this source and model. `_raycap/` need not be there any more."""
    summary = commit.read_json(output, SUMMARY)
    for name, wanted in (("source", source.location), ("model_id", bundle.model_id)):
        if summary.get(name) != wanted:
            raise ConfigurationError(
                f"{output.location} is complete for another {name} ({summary.get(name)}, not {wanted}); "
                "choose another output"
            )
    return summary


def _within_limits(summary: dict[str, Any], config: CaptionConfig) -> bool:
    counts = summary["counts"]
    tried = counts["ok"] + counts["failed"]
    return not tried or counts["failed"] / tried <= config.max_failed


def _start_or_resume(config: CaptionConfig, source: Store, output: Store, bundle: Bundle) -> None:
    """Write down what this output is of; refuse to mix it with a run of another source, model or setting."""
    run = {
        "source": source.location,
        "model_id": bundle.model_id,
        "decoding": asdict(bundle.decoding.updated(**config.decoding_overrides)),
        "limits": asdict(config.limits),
        "all_files": config.all_files,
        "chunk_rows": CHUNK_ROWS,
    }
    if not output.exists(MANIFEST) or not output.exists(RUN):  # nothing is captioned before the manifest is complete
        if not output.exists(SUMMARY):
            commit.write_json(output, RUN, run)
        return
    before = commit.read_json(output, RUN)
    differing = [name for name in run if before.get(name) != run[name]]
    if differing:
        changes = "; ".join(f"{name} was {before.get(name)}, is now {run[name]}" for name in differing)
        raise ConfigurationError(
            f"{output.location} holds a run with other settings: {changes}. "
            "Repeat that run's command, or choose another output"
        )


def _run(
    config: CaptionConfig,
    source: Store,
    output: Store,
    bundle: Bundle,
    manifest: Manifest,
    todo: np.ndarray,
    progress: RunProgress,
) -> None:
    """Fetch, caption and commit the chunks `todo`."""
    if len(todo) == 0:
        return
    resources = plan_resources(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    num_actors = min(resources.num_actors, len(todo))
    log.info("captioning with %d actor%s", num_actors, "s" if num_actors > 1 else "")
    fetcher = Fetcher(
        source=source,
        preprocessing=bundle.preprocessing,
        limits=config.limits,
        requests_in_flight=config.requests_in_flight,
        all_files=config.all_files,
    )
    _quiet_ray_data()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # a chunk must stay one block
    bundle_ref, num_rows = ray.put(bundle), manifest.num_rows
    # The plan's word on GPUs holds: Ray hides no GPU from an actor that asked for none.
    device = config.device if resources.gpus_per_actor else "cpu"
    with mailbox(lambda message: progress.add(message[0], failed=message[1], at_s=message[2])) as box:
        stream = (
            ray.data.read_datasource(
                _Chunks(todo.tolist(), fetcher, output, num_rows),
                num_cpus=resources.cpus_per_fetch,
                override_num_blocks=len(todo),
            )
            .map_batches(
                _CaptionActor,
                fn_constructor_args=(bundle_ref, config, device, resources.threads_per_actor, box),
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=num_actors),
                num_cpus=resources.cpus_per_actor,
                num_gpus=resources.gpus_per_actor or None,
            )
            .map_batches(
                _commit_chunk,
                fn_kwargs={"output": output, "num_rows": num_rows},
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=0,
            )
        )
        for _ in stream.iter_batches(batch_size=None):
            pass


def _quiet_ray_data() -> None:
    """Keep Ray Data's warnings on the screen; its other lines go to its log file alone."""
    said_by_us = ("Progress bars disabled", "Exception occurred in user code")

    def is_worth_it(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not record.getMessage().startswith(said_by_us)

    for handler in logging.getLogger("ray.data").handlers:
        # Ray's own alone: it also hangs the root logger's handlers here, which are not ours to change.
        if type(handler).__module__.startswith("ray.") and isinstance(handler, logging.StreamHandler):
            handler.addFilter(is_worth_it)


class _Chunks(Datasource):
    """Chunks of the manifest as blocks of pixels. Fetching is the read itself: a map after a read would not run at its
    own share of a CPU (a read reserves a whole one)."""

    def __init__(self, chunks: list[int], fetcher: Fetcher, output: Store, num_rows: int) -> None:
        super().__init__()
        self._chunks = chunks
        self._size = CHUNK_ROWS * (3 * fetcher.preprocessing.size_px**2)
        self._shared = ray.put((fetcher, output, num_rows))
        self._num_rows = num_rows

    def estimate_inmemory_data_size(self) -> int:
        return len(self._chunks) * self._size

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_fetch_chunk, self._shared, chunk),
                BlockMetadata(
                    num_rows=len(chunk_rows(chunk, self._num_rows)),
                    size_bytes=self._size,
                    input_files=None,
                    exec_stats=None,
                ),
            )
            for chunk in self._chunks
        ]


def _fetch_chunk(shared: ray.ObjectRef[Any], chunk: int) -> list[pa.Table]:
    fetcher, output, num_rows = ray.get(shared)
    return [fetcher(read_chunk(output, chunk, num_rows))]


class _CaptionActor:
    """A model that captions chunk after chunk."""

    def __init__(self, bundle: ray.ObjectRef[Any], config: CaptionConfig, device: str, threads: int, box: Any) -> None:
        torch.set_num_threads(threads)
        loaded: Bundle = ray.get(bundle)
        decoding = loaded.decoding.updated(**config.decoding_overrides)
        self.batch_size = config.batch_size
        self.box = box
        self.error: RaycapError | None = None
        try:
            self.captioner = Captioner(loaded, device=device, precision=config.precision, decoding=decoding)
        except RaycapError as error:  # Ray keeps the cause of what a call raises, but not of what a constructor does
            self.error = error

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self.error is not None:
            raise self.error
        failed = rows["status"].to_pylist().count(FAILED)
        posted = False

        def on_batch(done: int) -> None:
            nonlocal posted
            self.box.post.remote((done, 0 if posted else failed, time.time()))
            posted = True

        return caption_rows(rows, self.captioner, batch_size=self.batch_size, on_batch=on_batch)


def _commit_chunk(rows: pa.Table, *, output: Store, num_rows: int) -> pa.Table:
    return pa.table({"chunk": [commit.commit_chunk(rows, output, num_rows)]})


def _finish(config: CaptionConfig, output: Store, manifest: Manifest) -> commit.Tally:
    """Check that every row is there and join the chunks into the final files, in parallel."""
    missing = commit.missing_chunks(output, manifest.num_rows)
    if len(missing):
        raise RaycapError(f"{len(missing)} chunks were not written; run the same command again")
    join = ray.remote(num_cpus=1)(commit.finish_part)
    parts = commit.chunks_of_parts(manifest.num_rows, config.rows_per_file)
    commit.delete_parts(output, len(parts))
    total = commit.Tally()
    for tally in ray.get([join.remote(output, part, chunks, manifest.num_rows) for part, chunks in enumerate(parts)]):
        total.add(tally)
    assert total.num_rows == manifest.num_rows
    return total
