"""raycap against what else one would write: the same images, weights, batch size and machine, in one run.

    python -m tests.benchmarks.peers --images DIR [--s3] [--num-images N] [--rounds R] [--daft-python PYTHON]

    plain   PyTorch: a DataLoader whose workers decode, the model in the main process, one Parquet file at the end
    ray     Ray Data as its guide has it: read_binary_files, map, map_batches with a class, write_parquet
    daft    Daft as its guide has it: from_glob_path, download, a class with a batch method, write_parquet
    raycap  raycap caption

Each is a process of its own, from its start to its last row; the rate is that after the first batch of captions. Rounds
take turns in who begins. The peers caption with engine torch, or as `--engine` says. Daft 0.7 wants an older pyarrow
than raycap is pinned to: `--daft-python` names the interpreter of an environment that has both Daft and raycap.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.commands import ROOT, clean_environment

BATCH_SIZE = 32
CORES = os.cpu_count() or 1
"""Each way uses all: Ray, which two of them run on, knows no other number."""
PEERS = ("plain", "ray", "daft", "raycap")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a peer is to do."""

    images: str
    output: Path
    batch_size: int
    engine: Any
    cores: int


def captioner_of(task: Task, *, threads: int) -> Any:
    """The shipped model."""
    import torch

    from raycap.model.captioner import Captioner

    torch.set_num_threads(threads)
    return Captioner.load(engine=task.engine)


def plain(task: Task) -> None:
    """The script that needs nothing but PyTorch."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from raycap.images import decode_image
    from raycap.storage import open_store

    captioner = captioner_of(task, threads=task.cores)
    keys = [info.key for info in open_store(task.images).list()]

    class Images(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(keys)

        def __getitem__(self, index: int) -> Any:
            if not hasattr(self, "store"):  # S3 clients do not survive a fork, so each worker has its own
                self.store = open_store(task.images)
            data = self.store.read(keys[index])
            return keys[index], torch.from_numpy(decode_image(data, captioner.preprocessing).pixels_HWC)

    rows: list[dict[str, Any]] = []
    loader = torch.utils.data.DataLoader(Images(), batch_size=task.batch_size, num_workers=task.cores)
    for names, pixels in loader:
        captions = captioner.caption(pixels)
        rows += [row(name, caption.text) for name, caption in zip(names, captions, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), task.output / "captions.parquet")


def ray(task: Task) -> None:
    """The pipeline of Ray Data's guide to batch inference."""
    import numpy as np
    import ray

    from raycap.images import decode_image
    from raycap.model.bundle import Bundle

    preprocessing = Bundle.load().preprocessing

    def decode(item: dict[str, Any]) -> dict[str, Any]:
        return {"path": item["path"], "pixels": decode_image(item["bytes"], preprocessing).pixels_HWC}

    class Model:
        def __init__(self) -> None:
            self.captioner = captioner_of(task, threads=1)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            rows = [row("", caption.text) for caption in self.captioner.caption_array(batch["pixels"])]
            return {"path": batch["path"]} | {
                name: np.array([each[name] for each in rows]) for name in ("caption", "captioned_at_s")
            }

    path, filesystem = task.images, None
    if path.startswith("s3://"):
        from pyarrow.fs import S3FileSystem

        path, filesystem = path.removeprefix("s3://"), S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL_S3"])
    ray.init(include_dashboard=False, log_to_driver=False)
    # An actor for each core, on half of its reservation: the other half is for reading and decoding.
    ray.data.read_binary_files(path, filesystem=filesystem, include_paths=True).map(decode, num_cpus=0.5).map_batches(
        Model, batch_size=task.batch_size, num_cpus=0.5, compute=ray.data.ActorPoolStrategy(size=task.cores)
    ).write_parquet(str(task.output))


def daft(task: Task) -> None:
    """The pipeline of Daft's guide to classes with batch methods."""
    import daft
    from daft.functions import download
    from daft.io import IOConfig, S3Config

    row_type = daft.DataType.struct({"caption": daft.DataType.string(), "captioned_at_s": daft.DataType.float64()})

    @daft.cls(max_concurrency=task.cores, use_process=True)
    class Model:
        def __init__(self) -> None:
            self.captioner = captioner_of(task, threads=1)

        @daft.method.batch(return_dtype=row_type, batch_size=task.batch_size)
        def caption(self, files: daft.Series) -> list[dict[str, Any]]:
            captions = self.captioner.caption([self.captioner.prepare(data) for data in files.to_pylist()])
            return [{"caption": caption.text, "captioned_at_s": time.time()} for caption in captions]

    config = None
    if task.images.startswith("s3://"):
        config = IOConfig(
            s3=S3Config(
                endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"],
                region_name=os.environ["AWS_REGION"],
                key_id=os.environ["AWS_ACCESS_KEY_ID"],
                access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            )
        )
    table = daft.from_glob_path(f"{task.images}/**/*.jpg", io_config=config)
    table = table.with_column("row", Model().caption(download(table["path"], io_config=config)))
    table.select(table["path"], table["row"].unnest()).write_parquet(str(task.output))


def raycap(task: Task) -> None:
    """raycap caption, with the engine that it chooses."""
    from raycap.cli import run

    assert run(["caption", task.images, str(task.output), "--batch-size", str(task.batch_size), "--no-report"]) == 0


def row(path: str, caption: str) -> dict[str, Any]:
    return {"path": path, "caption": caption, "captioned_at_s": time.time()}


def finished(name: str, output: Path) -> tuple[list[str], list[float]]:
    """The captions in the order of their images' names, and when each was made."""
    import pyarrow.parquet as pq

    folder = output / "captions" if name == "raycap" else output
    rows = [each for path in sorted(folder.glob("*.parquet")) for each in pq.read_table(path).to_pylist()]
    if name == "raycap":
        rows = [row | {"path": row["key"], "captioned_at_s": row["captioned_at"].timestamp()} for row in rows]
    rows.sort(key=lambda row: Path(row["path"]).name)
    return [row["caption"] for row in rows], sorted(row["captioned_at_s"] for row in rows)


def measured(name: str, task: Task, python: str, env: dict[str, str]) -> dict[str, Any]:
    """One run of one peer."""
    task.output.mkdir()
    log = task.output.with_suffix(".log")
    arguments = ["--peer", name, "--images", task.images, "--output", str(task.output), "--engine", task.engine]
    arguments += ["--batch-size", str(task.batch_size)]
    started = time.time()
    with log.open("wb") as file:
        command = [python, "-m", "tests.benchmarks.peers", *arguments]
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file).returncode
    if code:
        raise RuntimeError(f"{name} ended with {code}:\n{log.read_text()[-3000:]}")
    captions, times = finished(name, task.output)
    ended = float((task.output / "ended").read_text())
    num_images = len(times) - task.batch_size
    return {
        "captions": captions,
        "images_per_s": len(times) / (ended - started),
        "steady_images_per_s": num_images / (times[-1] - times[task.batch_size - 1]) if num_images > 0 else None,
        "wall_s": ended - started,
    }


@contextmanager
def location_of(images: Path, folder: Path, *, on_s3: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """Where the peers find the images, and what their environment must say."""
    env = clean_environment() | {"RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0"}
    if not on_s3:
        yield str(images), env
        return
    from tests.s3 import running_s3_server

    with running_s3_server(folder / "s3") as server:
        bucket, client = server.make_bucket(), server.client()
        for path in images.iterdir():
            client.upload_file(str(path), bucket, f"images/{path.name}")
        yield f"s3://{bucket}/images", env | server.env()


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all peers; medians, and how far raycap is ahead."""
    runs: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="raycap-peers-") as directory:
        folder = Path(directory)
        images = folder / "images"
        images.mkdir()
        for path in sorted(options.images.glob("*.jpg"))[: options.num_images]:
            shutil.copy(path, images)
        with location_of(images, folder, on_s3=options.s3) as (location, env):
            for number in range(options.rounds):
                begin = number % len(options.peers)
                for name in (*options.peers[begin:], *options.peers[:begin]):
                    task = Task(
                        images=location,
                        output=folder / f"{name}-{number}",
                        batch_size=options.batch_size,
                        engine=options.engine,
                        cores=CORES,
                    )
                    python = options.daft_python if name == "daft" else sys.executable
                    runs[name].append(measured(name, task, python, env))
                    sys.stderr.write(f"round {number + 1}: {name}: {runs[name][-1]['wall_s']:.1f} s\n")
    return table_of(runs)


def table_of(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By peer: medians of its rounds; raycap's over its own, round by round; share of captions that are raycap's."""
    result: dict[str, Any] = {}
    for name, rounds in runs.items():
        result[name] = {"num_images": len(rounds[0]["captions"])}
        for what in ("wall_s", "images_per_s", "steady_images_per_s"):
            values = [each[what] for each in rounds if each[what]]
            result[name][what] = round(median(values), 2) if values else None
            if "raycap" in runs and what != "wall_s":
                pairs = [
                    (ours[what], each[what])
                    for ours, each in zip(runs["raycap"], rounds, strict=True)
                    if ours[what] and each[what]
                ]
                ratio = median(ours / theirs for ours, theirs in pairs) if pairs else None
                result[name][f"raycap_over_it_{what}"] = ratio and round(ratio, 2)
        if "raycap" in runs:
            pairs_of_captions = zip(runs["raycap"][0]["captions"], rounds[0]["captions"], strict=True)
            same = [ours == theirs for ours, theirs in pairs_of_captions]
            result[name]["share_of_raycaps_captions"] = round(sum(same) / len(same), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--s3", action="store_true", help="put them onto an S3 server on this machine first")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--engine", default="torch", help="of the peers; raycap chooses its own")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--daft-python", default=sys.executable)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        task = Task(
            images=options.images,
            output=options.output,
            batch_size=options.batch_size,
            engine=options.engine,
            cores=CORES,
        )
        peers: dict[str, Callable[[Task], None]] = {"plain": plain, "ray": ray, "daft": daft, "raycap": raycap}
        peers[options.peer](task)
        (options.output / "ended").write_text(repr(time.time()))
        return
    options.images = Path(options.images)
    text = json.dumps(compare(options), indent=1) + "\n"
    if options.output:
        options.output.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
