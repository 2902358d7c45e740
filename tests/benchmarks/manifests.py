"""What manifests of many keys cost. Run by hand; takes minutes, and 2 GB of disk for 10^6.

    python -m tests.benchmarks.manifests list --num-keys 10000 100000 1000000 [--latency-s 0.05]
    python -m tests.benchmarks.manifests resume --num-keys 1000000 --share-done 0.99

`list` lists a synthetic bucket into a manifest in a process of its own: keys/s, and the most memory that it had.
`resume` makes such a manifest and the chunk files of a run that did this share of it, then gives the command again:
seconds until it captions, until it ends, and the driver's memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from raycap import cli
from raycap.bulk import commit
from raycap.bulk.config import CaptionConfig, Selection
from raycap.bulk.layout import RUN, Round, num_chunks
from raycap.bulk.listing import make_manifest
from raycap.bulk.manifest import Manifest, ManifestReader
from raycap.bulk.sources import open_source
from raycap.storage import LocalStore, S3Options
from tests.commands import starting_commands, wait_until
from tests.outputs import captioned
from tests.synthetic_s3 import SyntheticS3, running_synthetic_s3


def make(endpoint: SyntheticS3, output: str) -> Manifest:
    """The manifest of the synthetic bucket."""
    options = S3Options(endpoint_url=endpoint.endpoint_url, byte_ordered=True)
    return make_manifest(open_source(endpoint.source, Selection(), options), LocalStore(output), Round(0))


def list_keys(num_keys: int, latency_s: float) -> None:
    """One line: how fast, in how much memory."""
    with (
        running_synthetic_s3(num_keys=num_keys, latency_s=latency_s) as endpoint,
        tempfile.TemporaryDirectory() as folder,
    ):
        os.environ.update(endpoint.env())
        started, cpu_started = time.perf_counter(), time.process_time()
        manifest = make(endpoint, folder)
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        assert manifest.num_rows == num_keys
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sys.stdout.write(
            f"{num_keys} keys: {seconds:.1f} s, {num_keys / seconds:.0f} keys/s ({num_keys / cpu_s:.0f} a second of "
            f"CPU), at most {peak_mb:.0f} MB\n"
        )


def resume(num_keys: int, share_done: float) -> None:
    """A few lines: how long a run takes to go on, in how much memory."""
    from raycap.model.bundle import Bundle  # torch: not while memory is measured
    from tests.bundles import random_bundle

    with running_synthetic_s3(num_keys=num_keys) as endpoint, tempfile.TemporaryDirectory() as folder:
        os.environ.update(endpoint.env())
        output, model = Path(folder) / "out", f"{folder}/tiny"
        random_bundle().save(model)
        bundle = Bundle.load(model)
        manifest = make(endpoint, str(output))
        config = CaptionConfig(source=endpoint.source, output=str(output))
        run = {
            **{"source": endpoint.source, "model_id": bundle.model_id, "decoding": asdict(bundle.decoding)},
            **{"limits": asdict(config.limits), "chunk_rows": 256, "round": 0, "update": False, "retry_failed": None},
            "selection": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(config.selection).items()
            },
        }
        commit.write_json(LocalStore(str(output)), RUN, run)
        num_done = int(share_done * num_chunks(num_keys))
        with ThreadPoolExecutor(2) as pool:
            list(
                pool.map(
                    lambda start: _commit(str(output), manifest, range(start, min(start + 16, num_done))),
                    range(0, num_done, 16),
                )
            )
        sys.stdout.write(f"{num_keys} keys, {num_done} of {num_chunks(num_keys)} chunks done\n")
        options = ("--byte-ordered", "True", "--endpoint-url", endpoint.endpoint_url, "--no-report")
        with starting_commands() as start:
            started = time.perf_counter()
            command = start("caption", endpoint.source, str(output), "--model", model, *options, env=endpoint.env())
            wait_until(lambda: endpoint.counts()["get"] > 0 or command.has_ended(), "the first object")
            first_s = time.perf_counter() - started
            chunks, peak_mb = output / Round(0).chunks, 0.0
            wait_until(lambda: len(os.listdir(chunks)) > num_done or command.has_ended(), "the first chunk")  # noqa: PTH208
            chunk_s = time.perf_counter() - started
            while not command.has_ended():
                peak_mb = max(peak_mb, _peak_mb(command.process.pid))
                time.sleep(0.2)
            code, _, err = command.finish()
        assert code == cli.EXIT_OK, err
        sys.stdout.write(
            f"first object fetched after {first_s:.1f} s, first chunk after {chunk_s:.1f} s, all after "
            f"{time.perf_counter() - started:.1f} s; driver at most {peak_mb:.0f} MB\n"
        )


def _commit(output: str, manifest: Manifest, chunks: range) -> None:
    store = LocalStore(output)
    reader = ManifestReader(store, manifest)
    for chunk in chunks:
        commit.commit_chunk(captioned(reader.chunk(chunk)), store, manifest)


def _peak_mb(pid: int) -> float:
    try:
        status = (Path("/proc") / str(pid) / "status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="What manifests of many keys cost.")
    parser.add_argument("what", choices=("list", "resume"))
    parser.add_argument("--num-keys", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--share-done", type=float, default=0.99)
    arguments = parser.parse_args()
    for num_keys in arguments.num_keys:
        if arguments.what == "resume":
            resume(num_keys, arguments.share_done)
            continue
        process = multiprocessing.get_context("spawn").Process(target=list_keys, args=(num_keys, arguments.latency_s))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
