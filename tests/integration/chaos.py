"""Runs of `raycap caption` that lose a process at a random moment, and what comes of them.

    python -m tests.integration.chaos --runs 20 --objects 3000

Each run captions a synthetic bucket. Once a random share of the work is done, something is killed with SIGKILL:

    driver        the process that the user started; also while it starts or joins files. The cluster lives on
    driver-local  the same, and its own Ray on this machine with it
    actor         a captioning actor
    fetcher       a worker that is fetching
    committer     an actor that writes chunks
    node          the raylet of a second node; another node comes at once
    node-gone     the same, but none comes

Then the same command is given again, and the output is compared with that of a run that nothing happened to. Prints
a table; the exit code is 1 if any run lost, doubled or changed a row.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from raycap import cli
from raycap.bulk.rows import OUTPUT_SCHEMA
from tests.commands import Command, process_title, starting_commands, wait_until
from tests.ray_cluster import Node, RayCluster
from tests.synthetic_s3 import ANY_KEYS, SyntheticS3, running_synthetic_s3

KINDS = ("driver", "driver-local", "actor", "fetcher", "committer", "node", "node-gone")
DEADLINE_S = 1200
TITLES = {
    "actor": "ray::MapWorker(MapBatches(_CaptionActor))",
    "fetcher": "ray::Read",
    "committer": "ray::MapWorker(MapBatches(_Committer))",
}
"""How the processes call themselves: actors also while they have nothing to do, workers only while they work."""
_STARTING_S = 10.0
_LOOK_EVERY_S = 0.1
"""Looking costs time on a small machine: requests, and reading the number of rows of every chunk."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What every run has to give."""

    rows: pa.Table
    """All rows, in order, without what differs from run to run."""
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run."""

    kind: str
    moment: str
    rows_before: int
    """Rows that were committed when the process was killed."""
    first_exit: int
    """Of the command that lost a process."""
    num_gets: int
    """Requests for objects, both commands together."""
    most_gets: int
    """For any one object."""
    faults: list[str]
    """What is wrong with the output; nothing, if the promise holds."""


def rows_done(output: Path) -> int:
    """Rows in finished chunk files. The one thing here that knows what the output looks like inside."""
    chunks = (path for path in output.glob("_raycap/**/*.parquet") if "chunks" in path.parent.name)
    return sum(pq.ParquetFile(path).metadata.num_rows for path in chunks)


def read_output(output: Path) -> tuple[pa.Table, list[str]]:
    """All rows in the order of the files, and the files."""
    files = sorted(path for path in (output / "captions").rglob("*") if path.is_file())
    return pa.concat_tables([pq.read_table(path) for path in files]), [path.name for path in files]


def expected_of(output: Path) -> Expected:
    """The output of a run that nothing happened to. Its own rows must differ enough for a mix-up to show."""
    rows, files = read_output(output)
    assert pc.count_distinct(rows["log_prob"]).as_py() > 0.95 * len(rows)
    assert pc.count_distinct(rows["row_id"]).as_py() == pc.count_distinct(rows["key"]).as_py() == len(rows)
    return Expected(rows=rows.drop_columns(["captioned_at"]), files=files)


def faults_of(output: Path, expected: Expected, started: datetime) -> list[str]:
    """How an output differs from what it should be: in any row, any column but the time, or any file."""
    rows, files = read_output(output)
    faults = []
    if not rows.schema.equals(OUTPUT_SCHEMA):
        faults.append("other columns")
    if files != expected.files:
        faults.append(f"files {files}")
    for name in ("row_id", "key"):
        found, wanted = Counter(rows[name].to_pylist()), Counter(expected.rows[name].to_pylist())
        if lost := wanted - found:
            faults.append(f"{lost.total()} rows lost, by {name}")
        if added := found - wanted:
            faults.append(f"{added.total()} rows doubled or not of the source, by {name}")
    if not faults and not rows.drop_columns(["captioned_at"]).equals(expected.rows):
        differing = [name for name in expected.rows.schema.names if not rows[name].equals(expected.rows[name])]
        faults.append(f"other values in {', '.join(differing)}")
    times = rows["captioned_at"]
    if times.null_count or pc.min(times).as_py() < started or pc.max(times).as_py() > datetime.now(UTC):
        faults.append("captioned_at is not a time of this run")
    if [path for path in output.rglob("*") if path.name.startswith(".raycap-tmp-")]:
        faults.append("half-written files")
    return faults


class Chaos:
    """Runs of one number of objects, beside one cluster of two nodes."""

    def __init__(self, folder: Path, model: str, num_objects: int) -> None:
        self.folder = folder
        self.model = model
        self.num_objects = num_objects
        self.cluster: RayCluster | None = None
        self.expected: Expected | None = None

    @contextmanager
    def on_cluster(self) -> Iterator[None]:
        """With the cluster running."""
        with RayCluster(head_cpus=1, env=ANY_KEYS) as self.cluster:
            self.cluster.add_node(num_cpus=1)
            yield

    def undisturbed(self) -> None:
        """The run that the others are compared with. It asks for every object once."""
        assert self.cluster
        output = self.folder / "undisturbed"
        with self._endpoint() as endpoint, starting_commands() as start:
            code, _, err = self._start(start, endpoint, output, self.cluster).finish(DEADLINE_S)
            assert code == cli.EXIT_OK, err
            assert endpoint.counts()["get"] == endpoint.counts()["objects"] == self.num_objects
        self.expected = expected_of(output)

    def run(self, kind: str, seed: int) -> Outcome:
        """One command that loses a process, and the same one again."""
        assert self.expected and self.cluster
        dice = random.Random(f"{kind} {seed}")
        output, started = self.folder / f"{kind}-{seed}", datetime.now(UTC)
        cluster = None if kind == "driver-local" else self.cluster
        with self._endpoint() as endpoint, starting_commands() as start:
            command = self._start(start, endpoint, output, cluster)
            moment = self._wait_for_moment(kind, dice, command, endpoint, output)
            rows_before = rows_done(output)
            self._kill(kind, dice, command)
            first_exit, _, _ = command.finish(DEADLINE_S)
            last_code, _, last_err = self._start(start, endpoint, output, cluster).finish(DEADLINE_S)
            counts = endpoint.counts()
        if kind == "node-gone":
            self.cluster.add_node(num_cpus=1)
        faults = [f"exit code {last_code}: {last_err}"] if last_code else faults_of(output, self.expected, started)
        return Outcome(
            kind=kind,
            moment=moment,
            rows_before=rows_before,
            first_exit=first_exit,
            num_gets=counts["get"],
            most_gets=counts["most"],
            faults=faults,
        )

    def _endpoint(self) -> AbstractContextManager[SyntheticS3]:
        return running_synthetic_s3(num_keys=self.num_objects, shape="dates")

    def _start(
        self, start: Callable[..., Command], endpoint: SyntheticS3, output: Path, cluster: RayCluster | None
    ) -> Command:
        arguments = ["caption", endpoint.source, str(output), "--model", self.model, "--no-report"]
        if cluster is None:
            return start(*arguments, env=endpoint.env())
        return start(*arguments, "--ray-address", cluster.address, env=endpoint.env() | cluster.env)

    def _wait_for_moment(
        self, kind: str, dice: random.Random, command: Command, endpoint: SyntheticS3, output: Path
    ) -> str:
        """Return at a random moment. The work is fetching and committing; a fetcher can only die while there is
        something to fetch."""

        def share() -> float:
            gets = endpoint.counts()["get"] / self.num_objects
            return gets if kind == "fetcher" else (gets + rows_done(output) / self.num_objects) / 2

        drawn = dice.uniform(-0.1, 1.1) if kind.startswith("driver") else dice.uniform(0.02, 0.9)
        if drawn < 0:
            delay_s = -drawn * 10 * _STARTING_S
            time.sleep(delay_s)
            return f"after {delay_s:.1f} s"
        if drawn < 1:
            wait_until(
                lambda: share() >= drawn or command.has_ended(), f"{drawn:.0%}", DEADLINE_S, every_s=_LOOK_EVERY_S
            )
            assert not command.has_ended(), f"it ended before {drawn:.0%}: {command.finish()}"
            return f"at {drawn:.0%}"
        wait_until(
            lambda: rows_done(output) == self.num_objects or command.has_ended(),
            "all chunks",
            DEADLINE_S,
            every_s=_LOOK_EVERY_S,
        )
        return "after its end" if command.has_ended() else "while joining"

    def _kill(self, kind: str, dice: random.Random, command: Command) -> None:
        assert self.cluster
        if kind.startswith("driver"):
            command.process.kill()
        elif kind.startswith("node"):
            node = self.cluster.nodes.pop()
            self._kill_node(node)
            if kind == "node":
                self.cluster.add_node(num_cpus=1)
        else:
            pid = dice.choice(self._workers(TITLES[kind], command, self.cluster))
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not process_title(pid), "the end of what was killed")

    def _workers(self, title: str, command: Command, cluster: RayCluster) -> list[int]:
        """Processes that call themselves so; waits for the first."""
        while not command.has_ended():
            if found := sorted(pid for pid, each in cluster.processes().items() if each.startswith(title)):
                return found
        raise AssertionError(f"the run ended, and nothing called itself {title}")

    def _kill_node(self, node: Node) -> None:
        raylet = node.raylet()
        assert raylet is not None
        os.kill(raylet, signal.SIGKILL)
        wait_until(lambda: not any(title.startswith("ray::") for title in node.processes().values()), "its workers")
        node.end()


def table_of(outcomes: list[Outcome], num_objects: int) -> Table:
    """What happened."""
    table = Table("run", "killed", "moment", "rows before", "exit code", "GETs an object", "most", "output")
    for number, each in enumerate(outcomes, 1):
        table.add_row(
            str(number),
            each.kind,
            each.moment,
            str(each.rows_before),
            str(each.first_exit),
            f"{each.num_gets / num_objects:.3f}",
            str(each.most_gets),
            "; ".join(each.faults) or "as undisturbed",
        )
    return table


def main() -> None:
    """Parse, run, print; exit with 1 if a run broke the promise."""
    parser = argparse.ArgumentParser(description="Kill something at a random moment of a run, again and again.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--objects", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    from tests.bundles import random_bundle

    console = Console(width=140)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        random_bundle().save(f"{folder}/tiny")
        chaos = Chaos(Path(folder), f"{folder}/tiny", arguments.objects)
        with chaos.on_cluster():
            chaos.undisturbed()
            for number in range(arguments.runs):
                kind = arguments.kinds[number % len(arguments.kinds)]
                outcomes.append(chaos.run(kind, arguments.seed + number))
                console.print(outcomes[-1])
    console.print(table_of(outcomes, arguments.objects))
    gets = sum(each.num_gets for each in outcomes)
    console.print(f"{gets} GETs for {len(outcomes) * arguments.objects} objects")
    sys.exit(any(each.faults for each in outcomes))


if __name__ == "__main__":
    main()
