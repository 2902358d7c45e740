"""What each chunk costs the head of a cluster, whatever the model: CPU time of the driver and of Ray's own processes.

    python -m tests.benchmarks.driver [--num-objects 200000]

Captions a list of objects that are all skipped, so that nothing is left of the bulk job but Ray Data, messages and
commits. Counts from a tenth of the chunks on, so that starting up and listing do not. tests/benchmarks/simulate.py
builds on the numbers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray

from raycap.benchmark.cpu import CpuClock
from raycap.bulk.config import CaptionConfig
from raycap.bulk.layout import CAPTIONS_PREFIX, CHUNK_ROWS, num_chunks
from raycap.bulk.run import caption
from tests.bundles import random_bundle

KINDS = {
    "tests.benchmarks.driver": "driver",
    "raylet": "raylet",
    "gcs_server": "control server",
    "Read_Chunks": "fetch",
    "_CaptionActor": "caption",
    "_Committer": "commit",
}


def measure(num_objects: int) -> dict[str, float]:
    """Core-milliseconds for each chunk, by kind of process."""
    with tempfile.TemporaryDirectory() as folder:
        source, output, model = Path(folder) / "keys.txt", f"{folder}/out", f"{folder}/tiny"
        source.write_text("".join(f"{number:09d}.txt\n" for number in range(num_objects)))
        random_bundle().save(model)
        with CpuClock(KINDS, other="other") as clock:
            caption(CaptionConfig(source=str(source), output=output, model=model, ray_address="local", report=False))
            ray.shutdown()
        rows = pq.read_table(Path(output) / CAPTIONS_PREFIX, columns=["captioned_at"])
        times_s = np.sort(rows["captioned_at"].to_numpy().astype("datetime64[us]").astype(np.int64) / 1e6)
    start = len(times_s) // 10 // CHUNK_ROWS * CHUNK_ROWS
    chunks = num_chunks(num_objects - start)
    seconds = clock.between(float(times_s[start]), float(times_s[-1]))
    return {"elapsed": 1000 * float(times_s[-1] - times_s[start]) / chunks} | {
        kind: 1000 * spent_s / chunks for kind, spent_s in seconds.items()
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="CPU time of the driver for each chunk.")
    parser.add_argument("--num-objects", type=int, default=200_000)
    for kind, milliseconds in measure(parser.parse_args().num_objects).items():
        sys.stdout.write(f"{kind:15} {milliseconds:8.2f} ms a chunk\n")


if __name__ == "__main__":
    main()
