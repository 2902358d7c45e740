"""`raycap caption` from start to end: which round is to be done, its manifest, the stream, the files, the summary.

What runs on Ray is in on_ray.py, which is imported when there is something to do.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import raycap
from raycap.bulk import commit
from raycap.bulk.config import CaptionConfig, ExportConfig
from raycap.bulk.export import export
from raycap.bulk.export.files import MARKER
from raycap.bulk.layout import CHUNK_ROWS, LOCK, RUN, SUMMARY, Round, chunk_rows
from raycap.bulk.listing import list_again, make_manifest
from raycap.bulk.manifest import Manifest, load_manifest
from raycap.bulk.previous import Previous
from raycap.bulk.progress import RunProgress
from raycap.bulk.report import REPORT, write_report
from raycap.bulk.sources import Source, open_source
from raycap.bulk.sources.store import root_of
from raycap.errors import ConfigurationError, RaycapError
from raycap.model.bundle import Bundle
from raycap.storage import Store, open_store
from raycap.storage.lock import OutputLock

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    summary: dict[str, Any]
    within_limits: bool
    """Whether no more than the allowed share of rows failed."""
    steady_images_per_s: float | None
    """From the first captioned batch to the last, without starting up; None if this call captioned nothing much."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every step of a round needs."""

    config: CaptionConfig
    source: Source
    output: Store
    bundle: Bundle
    lock: OutputLock
    progress: RunProgress


def caption(config: CaptionConfig) -> Outcome:
    """Caption the whole source. Resumes a run that was stopped; does nothing if it is complete, unless `update` or
    `retry_failed` ask for another round.

    Raises ConfigurationError or StorageError for what stops a whole run; what is wrong with one object is in its row.
    """
    output = open_store(config.output, config.s3)
    source = open_source(config.source, config.selection, config.s3, output=output.location)
    if root_of(source.location) == root_of(output.location):
        raise ConfigurationError(
            f"{output.location} is the source; the output would mix with the images. Choose another directory or "
            "prefix, such as one inside it"
        )
    output.check_writable()
    if config.update or not _is_listed(output):
        source.check()
    bundle = Bundle.load(config.model, s3=config.s3)
    progress = RunProgress()
    with OutputLock(output, LOCK, status=progress.status) as lock:
        job = Job(config=config, source=source, output=output, bundle=bundle, lock=lock, progress=progress)
        summary, worked = _rounds(job)
        if config.format != "parquet" and not _is_exported(output, config.format, summary):
            progress.state = "exporting"
            export(
                ExportConfig(output=config.output, format=config.format, file_size_mb=config.file_size_mb, s3=config.s3)
            )
        if config.report and (worked or not output.exists(REPORT)):  # it is written after the summary
            _report(config, output)
    return Outcome(
        summary=summary, within_limits=_within_limits(summary, config), steady_images_per_s=progress.images_per_s
    )


def _is_listed(output: Store) -> bool:
    """Whether the current round has its manifest, so that the source need not be listed."""
    if output.exists(RUN):
        return output.exists(Round(int(commit.read_json(output, RUN).get("round", 0))).manifest)
    return output.exists(SUMMARY)


def _rounds(job: Job) -> tuple[dict[str, Any], bool]:
    """Do what is to be done; gives the summary, and whether anything was."""
    run = _open_run(job)
    number = int(run["round"])
    asked = {"update": job.config.update, "retry_failed": _plain(job.config.retry_failed)}
    summary = commit.read_json(job.output, SUMMARY) if job.output.exists(SUMMARY) else None
    worked = False
    if summary is None or summary.get("round", 0) < number:  # stopped in the middle, or new
        is_new = number == 0 and not job.output.exists(Round(0).listing)
        summary, worked = _do_round(job, run), True
        if is_new or all(run[name] == value or value in (False, None) for name, value in asked.items()):
            return summary, worked
    if asked["update"] or asked["retry_failed"] is not None:
        run = run | asked | {"round": number + 1}
        commit.write_json(job.output, RUN, run)
        return _do_round(job, run), True
    if not worked:
        log.info("%s is complete: %d rows; nothing to do", job.output.location, summary["num_objects"])
    return summary, worked


def _open_run(job: Job) -> dict[str, Any]:
    """What this output is of, and its round. Refuses to mix it with a run of another source, model or setting."""
    config, output = job.config, job.output
    run = {
        "source": job.source.location,
        "model_id": job.bundle.model_id,
        "decoding": asdict(job.bundle.decoding.updated(**config.decoding_overrides)),
        "limits": asdict(config.limits),
        "selection": {name: _plain(value) for name, value in asdict(config.selection).items()},
        "chunk_rows": CHUNK_ROWS,
    }
    new = {**run, "round": 0, "update": False, "retry_failed": None}
    if output.exists(RUN):
        before = commit.read_json(output, RUN)
        if before.get("round") == 0 and not output.exists(Round(0).manifest) and not output.exists(SUMMARY):
            # Nothing was captioned before the manifest is complete; but a listing of something else is none of ours.
            if any(before.get(name) != run[name] for name in ("source", "selection")):
                output.delete(Round(0).listing)  # without it, `make_manifest` starts again
        else:
            _refuse_others(output, before, run)
            return new | {name: before.get(name) for name in ("round", "update", "retry_failed")}
    elif output.exists(SUMMARY):  # `_raycap/` need not be there any more
        summary = commit.read_json(output, SUMMARY)
        wanted = {name: run[name] for name in ("source", "model_id")}
        _refuse_others(output, summary, wanted)
        return new | {"round": int(summary.get("round", 0))}
    commit.write_json(output, RUN, new)
    return new


def _refuse_others(output: Store, before: dict[str, Any], run: dict[str, Any]) -> None:
    differing = [name for name in run if before.get(name) != run[name]]
    if differing:
        changes = "; ".join(f"{name} was {before.get(name)}, is now {run[name]}" for name in differing)
        raise ConfigurationError(
            f"{output.location} holds a run with other settings: {changes}. "
            "Repeat that run's command, or choose another output"
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _do_round(job: Job, run: dict[str, Any]) -> dict[str, Any]:
    """One pass over a manifest, from its listing to the summary."""
    started = datetime.now(UTC)
    output, progress = job.output, job.progress
    manifest = _manifest(job, run)
    todo = commit.missing_chunks(output, manifest)
    num_todo = sum(len(chunk_rows(chunk, manifest.num_rows)) for chunk in todo)
    resumed = f", {manifest.num_rows - num_todo} of them done already" if num_todo < manifest.num_rows else ""
    what = " to do" if manifest.round else ""
    log.info("%d objects%s, %.1f MB%s", manifest.num_rows, what, manifest.num_bytes / 1e6, resumed)
    if manifest.round and not manifest.num_rows and not manifest.num_deleted:
        summary = commit.read_json(output, SUMMARY) | _round_counts(manifest)
        commit.write_json(output, SUMMARY, summary)
        return summary
    from raycap.bulk import on_ray

    progress.start(total=manifest.num_rows, done=manifest.num_rows - num_todo)
    with on_ray.connected(job.config.ray_address):
        with progress:
            on_ray.caption_chunks(job, manifest, todo)
        job.lock.check()
        output.delete(SUMMARY)  # until the new one is there, captions/ is not complete
        progress.state = "joining"
        total, num_files = on_ray.join_chunks(job, manifest)
    job.lock.check()
    elapsed_s = (datetime.now(UTC) - started).total_seconds()
    summary = {
        "status": "complete",
        "source": job.source.location,
        "output": output.location,
        "model_id": job.bundle.model_id,
        "fingerprint": manifest.fingerprint,
        **total.to_dict(),
        "num_filtered": manifest.num_filtered,
        **_round_counts(manifest),
        "started_at": started.isoformat(),
        "finished_at": datetime.now(UTC).isoformat(),
        "elapsed_s": round(elapsed_s, 1),
        "images_per_s": round(num_todo / elapsed_s, 2),
        "num_files": num_files,
        "next_row_id": manifest.first_row_id + manifest.num_rows,
        "raycap_version": raycap.__version__,
    }
    commit.write_json(output, SUMMARY, summary)
    return summary


def _manifest(job: Job, run: dict[str, Any]) -> Manifest:
    """The manifest of this round: as it was frozen, else made now."""
    round_ = Round(int(run["round"]))
    manifest = load_manifest(job.output, round_)
    if manifest is None:
        job.progress.state = "listing"
        retry = run["retry_failed"]
        previous = None
        if round_.number:
            next_row_id = commit.read_json(job.output, SUMMARY).get("next_row_id", 0)
            previous = Previous(job.output, retry, next_row_id=next_row_id)
        if run["update"] or previous is None:
            resumed = "going on with the listing of" if job.output.exists(round_.listing) else "listing"
            log.info("%s %s", resumed, job.source.location)
            manifest = make_manifest(job.source, job.output, round_, previous, on_listed=job.progress.list)
        else:
            manifest = list_again(job.output, round_, previous)
    return manifest


def _round_counts(manifest: Manifest) -> dict[str, Any]:
    """What this round did to the rows of earlier ones."""
    if not manifest.round:
        return {"round": 0}
    return {
        "round": manifest.round,
        "round_counts": {
            "new": manifest.num_new,
            "done_again": manifest.num_replaced,
            "deleted": manifest.num_deleted,
            "unchanged": manifest.num_before - manifest.num_replaced - manifest.num_deleted,
        },
    }


def _is_exported(output: Store, format_: str, summary: dict[str, Any]) -> bool:
    """Whether the captions, as they are now, are there in this format."""
    marker = f"{format_}/{MARKER}"
    if not output.exists(marker):
        return False
    return bool(commit.read_json(output, marker).get("captions_finished_at") == summary["finished_at"])


def _report(config: CaptionConfig, output: Store) -> None:
    """Write the report. The captions are complete, so that it cannot be written is no failure of the run."""
    try:
        log.info("writing %s", write_report(output.location, s3=config.s3))
    except RaycapError as error:
        log.warning("the captions are complete, but not the report: %s; raycap report tries again", error)


def _within_limits(summary: dict[str, Any], config: CaptionConfig) -> bool:
    counts = summary["counts"]
    tried = counts["ok"] + counts["failed"]
    return not tried or counts["failed"] / tried <= config.max_failed
