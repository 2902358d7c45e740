"""What a killed Ray Data job loses and doubles: Ray's own checkpointing against chunk files.

    PYTHONPATH=. python tests/benchmarks/ray_checkpoint.py [SET-UP ...]

The pipeline is the bulk job's in small: source -> map -> pool of 2 actors (1 ms a row) -> files. In each set-up it is
killed three times, run to its end, and run once more. A kill is a SIGKILL to the driver and every process under it at
once. Starts Ray with 4 CPUs 5 times for each set-up: about 2 minutes. docs/exactly-once.md has the numbers.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import Datasource, ReadTask

from raycap.bulk.layout import CHUNK_ROWS
from raycap.storage import open_store

NUM_ROWS = 16_384
SHARD_ROWS = 4096
SET_UPS = ("shards", "split-shards", "items", "datasource", "chunk-files")


class Chunks(Datasource):
    """One read task for each chunk, as the bulk job's source; what was read is logged."""

    def __init__(self, folder: Path, chunks: list[int]) -> None:
        super().__init__()
        self.folder, self.chunks = folder, chunks

    def estimate_inmemory_data_size(self) -> int:
        return len(self.chunks) * CHUNK_ROWS * 8

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=CHUNK_ROWS, size_bytes=CHUNK_ROWS * 8, input_files=None, exec_stats=None)
        return [ReadTask(partial(self.read, chunk), metadata) for chunk in self.chunks]

    def read(self, chunk: int) -> list[pa.Table]:
        ids = np.arange(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS)
        note(self.folder / "read", ids)
        return [pa.table({"id": ids})]


class Caption:
    """Stands for the model: 1 ms for each row. Logs what it did, so that work done twice can be counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        for ids in np.array_split(rows["id"].to_numpy(), max(1, rows.num_rows // 32)):
            time.sleep(len(ids) / 1000)
            note(self.folder / "captioned", ids)
        return rows


def note(log: Path, ids: np.ndarray) -> None:
    with log.open("ab") as file:
        file.write(ids.astype(np.int64).tobytes())


def noted(log: Path) -> np.ndarray:
    return np.fromfile(log, np.int64) if log.exists() else np.zeros(0, np.int64)


def write_chunk(rows: pa.Table, folder: Path) -> pa.Table:
    """The commit of the bulk job: a file under a name that follows from the row ids, there whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    open_store(str(folder / "out")).write(f"{rows['id'][0].as_py() // CHUNK_ROWS:08d}.parquet", bytes(sink.getvalue()))
    return rows.slice(0, 0)


def run(set_up: str, folder: Path) -> None:
    """The job itself, in a process of its own."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    checkpoint = CheckpointConfig(id_column="id", checkpoint_path=str(folder / "checkpoint"))
    checkpoint.delete_checkpoint_on_success = False
    if set_up != "chunk-files":
        context.checkpoint_config = checkpoint
    num_chunks = NUM_ROWS // CHUNK_ROWS
    if set_up in ("shards", "split-shards"):
        num_blocks = num_chunks if set_up == "split-shards" else None
        source = ray.data.read_parquet(str(folder / "manifest"), override_num_blocks=num_blocks)
    elif set_up == "items":
        source = ray.data.from_items([{"id": row} for row in range(NUM_ROWS)], override_num_blocks=num_chunks)
    else:
        files = open_store(str(folder / "out")).list() if set_up == "chunk-files" else []
        done = {int(info.key.removesuffix(".parquet")) for info in files}
        todo = [chunk for chunk in range(num_chunks) if chunk not in done]
        source = ray.data.read_datasource(Chunks(folder, todo), override_num_blocks=len(todo))
    shape: dict[str, Any] = {"batch_format": "pyarrow"}
    mapped = source.map_batches(lambda rows: rows, batch_size=CHUNK_ROWS, **shape)
    actors = ray.data.ActorPoolStrategy(size=2)
    captioned = mapped.map_batches(
        Caption, fn_constructor_args=(folder,), batch_size=CHUNK_ROWS, compute=actors, **shape
    )
    if set_up == "chunk-files":
        for _ in captioned.map_batches(partial(write_chunk, folder=folder), batch_size=None, **shape).iter_batches():
            pass
    else:
        captioned.write_parquet(str(folder / "out"))


def processes_under(pid: int) -> list[int]:
    """This process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def start(set_up: str, folder: Path) -> subprocess.Popen[bytes]:
    log = (folder / "log").open("ab")
    return subprocess.Popen([sys.executable, __file__, "run", set_up, str(folder)], stdout=log, stderr=log)


def make(folder: Path) -> None:
    (folder / "manifest").mkdir(parents=True)
    (folder / "out").mkdir()
    for shard, first in enumerate(range(0, NUM_ROWS, SHARD_ROWS)):
        ids = pa.table({"id": np.arange(first, min(first + SHARD_ROWS, NUM_ROWS))})
        pq.write_table(ids, folder / f"manifest/{shard:05d}.parquet", row_group_size=CHUNK_ROWS)


def rows_in(folder: Path) -> tuple[Counter[int], int]:
    """Row ids in the Parquet files of a folder, and the number of files that are none: half written."""
    rows, broken = Counter[int](), 0
    for path in folder.glob("*.parquet"):
        try:
            rows.update(pq.read_table(path)["id"].to_pylist())
        except (pa.ArrowInvalid, OSError):
            broken += 1
    return rows, broken


def committed(set_up: str, folder: Path) -> set[int]:
    if set_up == "chunk-files":
        return set(rows_in(folder / "out")[0])
    files = [path for path in (folder / "checkpoint").glob("*.parquet") if ".pending" not in path.name]
    return {row for path in files for row in pq.read_table(path)["id"].to_pylist()}


def start_captioning(set_up: str, folder: Path) -> subprocess.Popen[bytes]:
    """A job that has begun to caption. Tries again where Ray does not start in time on a busy machine."""
    logged, job = len(noted(folder / "captioned")), start(set_up, folder)
    while len(noted(folder / "captioned")) == logged:
        if job.poll() is not None:
            job = start(set_up, folder)
        time.sleep(0.05)
    return job


def finish(set_up: str, folder: Path) -> None:
    while start(set_up, folder).wait():
        pass


def kills(set_up: str, base: Path, chance: random.Random) -> dict[str, Any]:
    """Kill a run three times, let the fourth finish, run once more: what came of the rows."""
    folder = base / set_up
    make(folder)
    lost: list[int] = []
    uncommitted: list[int] = []
    broken = 0
    for _ in range(3):
        before, logged = committed(set_up, folder), len(noted(folder / "captioned"))
        job = start_captioning(set_up, folder)
        time.sleep(chance.uniform(0.2, 5))
        for pid in reversed(processes_under(job.pid)):
            os.kill(pid, signal.SIGKILL)
        job.wait()
        after = committed(set_up, folder)
        lost.append(len(noted(folder / "captioned")) - logged - len(after - before))
        visible, half = rows_in(folder / "out")
        broken += half
        uncommitted.append(len(set(visible) - after))
    finish(set_up, folder)
    rows, _ = rows_in(folder / "out")
    finish(set_up, folder)
    again, _ = rows_in(folder / "out")
    return {
        "captioned_but_not_committed_at_each_kill": lost,
        "visible_rows_not_committed_at_each_kill": uncommitted,
        "half_written_files": broken,
        "rows_missing": NUM_ROWS - len(rows),
        "rows_doubled": sum(rows.values()) - len(rows),
        "rows_doubled_after_another_run": sum(again.values()) - len(again),
        "rows_read_by_the_source": len(noted(folder / "read")) or None,
        "rows_captioned": len(noted(folder / "captioned")),
    }


def say(title: str, result: dict[str, Any]) -> None:
    sys.stdout.write(f"{title} {json.dumps(result, indent=1)}\n")
    sys.stdout.flush()


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2], Path(sys.argv[3]))
        return
    base = Path(tempfile.mkdtemp(prefix="ray-checkpoint-"))
    for set_up in sys.argv[1:] or SET_UPS:
        say(set_up, kills(set_up, base, random.Random(set_up)))
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
