"""Memory and rate of a long `raycap caption`, over time. Run by hand; takes minutes.

    python -m tests.memory --num-objects 50000 --csv memory.csv

Captions a synthetic bucket with a tiny model of random weights and samples every process of the run, each second:
RSS, PSS (shared pages divided among those that share them) and private memory (pages of this process alone, where a
leak shows), in MB. Prints medians over the first, a middle and the last tenth of the run by kind of process, and
images/s in each tenth.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests.bundles import random_bundle
from tests.commands import Command, process_title
from tests.synthetic_s3 import SyntheticS3, running_synthetic_s3

_SMAPS = re.compile(r"^(Rss|Pss|Private_Clean|Private_Dirty): +(\d+) kB$", re.MULTILINE)
_KINDS = (
    ("ray::MapWorker(MapBatches(_CaptionActor", "captioning actor"),
    ("ray::MapWorker", "committing actor"),
    ("ray::IDLE", "task worker"),
    ("ray::Read", "task worker"),
    ("ray::MapBatches", "task worker"),
    ("ray::finish_part", "task worker"),
    ("ray::Mailbox", "mailbox"),
    ("ray::_StatsActor", "Ray Data statistics"),
    ("ray::", "other actors of Ray's"),
    ("raylet", "raylet"),
    ("gcs_server", "gcs_server"),
)
"""How a process calls itself -> what it is. The first that fits counts."""


class Sample(NamedTuple):
    """One process at one moment."""

    at_s: float
    pid: int
    kind: str
    title: str
    rss_mb: float
    pss_mb: float
    private_mb: float
    fetched: int
    """Objects fetched by then, of the whole run."""


class Sampler:
    """Reads /proc for one run."""

    def __init__(self, command: Command, endpoint: SyntheticS3) -> None:
        self._command = command
        self._endpoint = endpoint
        self._started = time.monotonic()
        self.samples: list[Sample] = []

    def sample(self) -> None:
        """All processes of the run, now."""
        at_s = time.monotonic() - self._started
        fetched = self._endpoint.counts()["get"]
        for pid in (self._command.process.pid, *self._command.others()):
            title = process_title(pid)
            memory = _memory_mb(pid)
            if title and memory:
                kind = "driver" if pid == self._command.process.pid else _kind(title)
                self.samples.append(Sample(round(at_s, 2), pid, kind, title.split(" ")[0], *memory, fetched))

    def write(self, path: Path) -> None:
        """All samples as CSV."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Sample._fields)
            writer.writerows(self.samples)


def _kind(title: str) -> str:
    name = title if title.startswith("ray::") else title.split(" ")[0].rpartition("/")[2]
    return next((kind for start, kind in _KINDS if name.startswith(start)), "other processes of Ray's")


def _memory_mb(pid: int) -> tuple[float, float, float] | None:
    try:
        found = {name: int(kb) / 1000 for name, kb in _SMAPS.findall(Path(f"/proc/{pid}/smaps_rollup").read_text())}
    except OSError:  # ended meanwhile
        return None
    return (found["Rss"], found["Pss"], found["Private_Clean"] + found["Private_Dirty"]) if found else None


def by_kind(samples: list[Sample], num_objects: int) -> Table:
    """What each kind of process takes in the first, middle and last tenth of the fetching: medians over the moments."""
    moments: dict[str, dict[tuple[int, float], list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for each in samples:
        if 0 < each.fetched < num_objects:
            moments[each.kind][10 * each.fetched // num_objects, each.at_s].append(each)
    measures: dict[str, Callable[[list[Sample]], float]] = {
        "processes": len,
        "PSS of all": lambda moment: sum(each.pss_mb for each in moment),
        "largest RSS": lambda moment: max(each.rss_mb for each in moment),
        "largest private": lambda moment: max(each.private_mb for each in moment),
    }
    table = Table("process", "MB", "first tenth", "middle", "last tenth", "most")
    for kind, groups in sorted(moments.items()):
        for name, measure in measures.items():
            cells = []
            for tenth in (0, 5, 9):
                values = [measure(moment) for (at, _), moment in groups.items() if at == tenth]
                cells.append(f"{median(values):.0f}" if values else "-")
            most = max(map(measure, groups.values()))
            table.add_row(kind if name == "processes" else "", name, *cells, f"{most:.0f}")
    return table


def rates(samples: list[Sample], num_objects: int) -> list[float]:
    """Objects fetched a second, in each tenth of the run."""
    first_at = {fetched: at for at, fetched in sorted(((s.at_s, s.fetched) for s in samples), reverse=True)}
    marks = []
    for tenth in range(11):
        at = min((at for fetched, at in first_at.items() if fetched >= max(1, num_objects * tenth // 10)), default=None)
        if at is not None:
            marks.append((at, min(fetched for fetched, t in first_at.items() if t == at)))
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(marks) if b[0] > a[0]]


def measure(num_objects: int, csv_path: Path, every_s: float, options: list[str]) -> int:
    """One run; its exit code."""
    with tempfile.TemporaryDirectory() as folder, running_synthetic_s3(num_keys=num_objects) as endpoint:
        random_bundle().save(f"{folder}/tiny")
        arguments = ("caption", endpoint.source, f"{folder}/out", "--model", f"{folder}/tiny", "--no-report")
        command = Command(*arguments, *options, env=endpoint.env())
        sampler = Sampler(command, endpoint)
        try:
            ended: list[tuple[int, str, str]] = []
            waiting = threading.Thread(target=lambda: ended.append(command.finish(deadline_s=24 * 3600)))
            waiting.start()
            while waiting.is_alive():
                sampler.sample()
                waiting.join(every_s)
        finally:
            command.end()
            sampler.write(csv_path)
        code, _, err = ended[0]
        console = Console(width=120)
        console.print(err, highlight=False)
        console.print(by_kind(sampler.samples, num_objects))
        console.print("images/s by tenth:", *(f"{rate:.0f}" for rate in rates(sampler.samples, num_objects)))
        console.print("requests:", endpoint.counts())
        return code


def main() -> None:
    """Parse, measure, exit as raycap did."""
    parser = argparse.ArgumentParser(description="Memory and rate of a long run; further options go to raycap.")
    parser.add_argument("--num-objects", type=int, default=50_000)
    parser.add_argument("--csv", type=Path, default=Path("memory.csv"))
    parser.add_argument("--every-s", type=float, default=1.0)
    arguments, options = parser.parse_known_args()
    sys.exit(measure(arguments.num_objects, arguments.csv, arguments.every_s, options))


if __name__ == "__main__":
    main()
