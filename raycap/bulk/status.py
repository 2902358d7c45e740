"""`raycap status`: how far a run is, by what it left in its output. Reads a bounded number of files, writes nothing."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from raycap.bulk import commit
from raycap.bulk.config import StatusConfig
from raycap.bulk.layout import LOCK, RUN, SUMMARY, Round, chunk_rows, num_chunks
from raycap.bulk.manifest import Manifest, load_manifest, parquet_table
from raycap.bulk.progress import duration_text
from raycap.errors import ConfigurationError, NotFoundError, ObjectError
from raycap.storage import Store, open_store
from raycap.storage.lock import is_alive, read_lock

NUM_CHUNKS_READ: Final = 64
"""Chunk files that are opened to see what fails: more would not change the picture, and there may be 10^5 of them."""


def status(config: StatusConfig) -> dict[str, Any]:
    """What is known of the output, also printed. Raises ConfigurationError if it is no output of `raycap caption`."""
    output = open_store(config.output, config.s3)
    result = _status(output)
    if config.json:
        Console(soft_wrap=True).print_json(data=result)
    else:
        Console().print(_table(result))
    return result


def _status(output: Store) -> dict[str, Any]:
    try:
        has_run, has_summary = output.exists(RUN), output.exists(SUMMARY)
    except NotFoundError as error:
        raise ConfigurationError(f"{output.location} is not an output of raycap caption: {error}") from error
    if not has_run and not has_summary:
        raise ConfigurationError(
            f"{output.location} is not an output of raycap caption: no {RUN} and no {SUMMARY} here"
        )
    run = commit.read_json(output, RUN) if has_run else {}
    summary = commit.read_json(output, SUMMARY) if has_summary else {}
    number = int(run.get("round", summary.get("round", 0)))
    result: dict[str, Any] = {"output": output.location, "source": run.get("source") or summary.get("source")}
    lock, alive = read_lock(output, LOCK), is_alive(output, LOCK)
    if summary and summary.get("round", 0) >= number and not alive:
        return result | {"state": "complete", **_of_summary(summary)}
    result |= {"state": str((lock or {}).get("state", "running")) if alive else "stopped", "round": number}
    if lock:
        result |= {"host": lock.get("host"), "process": lock.get("pid"), "last_seen": lock.get("updated_at")}
    manifest = load_manifest(output, Round(number))
    if manifest is None:
        return result | {"num_listed": (lock or {}).get("num_listed")}
    return result | _of_chunks(output, manifest, (lock or {}).get("images_per_s"), alive)


def _of_summary(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "round": summary.get("round", 0),
        "num_rows": summary["num_objects"],
        "num_done": summary["num_objects"],
        "images_per_s": summary["images_per_s"],
        "finished_at": summary["finished_at"],
        "counts": summary["counts"],
        "errors": {error["code"]: error["count"] for error in summary["errors"]},
    }


def _of_chunks(output: Store, manifest: Manifest, rate: float | None, alive: bool) -> dict[str, Any]:
    missing = set(commit.missing_chunks(output, manifest).tolist())
    done = [chunk for chunk in range(num_chunks(manifest.num_rows)) if chunk not in missing]
    num_done = sum(len(chunk_rows(chunk, manifest.num_rows)) for chunk in done)
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    every = np.linspace(0, len(done) - 1, min(len(done), NUM_CHUNKS_READ)).astype(int)
    for chunk in (done[place] for place in np.unique(every)):
        try:
            data = output.read(Round(manifest.round).chunk(chunk))
            rows = parquet_table(data, ["status", "error_code"])
        except (ObjectError, pa.ArrowException, OSError):
            continue  # the run itself will say so
        counts.update(rows["status"].to_pylist())
        errors.update(code for code in rows["error_code"].to_pylist() if code is not None)
    left_s = (manifest.num_rows - num_done) / rate if rate and alive else None
    return {
        "num_rows": manifest.num_rows,
        "num_done": num_done,
        "images_per_s": rate,
        "seconds_left": left_s and round(left_s),
        "num_rows_looked_at": counts.total(),
        "counts": dict(counts),
        "errors": dict(errors.most_common()),
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name in ("output", "source", "state"):
        table.add_row(name, str(result[name]))
    if result["state"] == "stopped":
        table.add_row("", "the same raycap caption command goes on from here")
    if "last_seen" in result:
        table.add_row("last seen", f"{_ago(result['last_seen'])}, host {result['host']}, process {result['process']}")
    if result.get("num_listed"):
        table.add_row("listed", f"{result['num_listed']:,} objects so far")
    if "num_rows" in result:
        share = 100 * result["num_done"] / max(1, result["num_rows"])
        table.add_row("done", f"{result['num_done']:,} of {result['num_rows']:,} objects ({share:.1f}%)")
    if result.get("images_per_s"):
        table.add_row("rate", f"{result['images_per_s']:.1f} images/s")
    if result.get("seconds_left"):
        table.add_row("left", duration_text(result["seconds_left"]))
    looked_at = result.get("num_rows_looked_at")
    of_sample = f" of {looked_at:,} looked at" if looked_at and looked_at < result["num_done"] else ""
    for status_, count in result.get("counts", {}).items():
        table.add_row(status_, f"{count:,}{of_sample}")
    for code, count in result.get("errors", {}).items():
        table.add_row(f"  {code}", f"{count:,}{of_sample}")
    return table


def _ago(time: Any) -> str:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(str(time))).total_seconds()
    except ValueError:
        return str(time)
    return f"{duration_text(max(0, seconds))} ago"
