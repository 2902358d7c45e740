"""The CPU time of this process and of all that it started, by what each process was doing. Linux alone: reads /proc."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

import numpy as np

PROC: Final = Path("/proc")
EVERY_S: Final = 0.25


class Process(NamedTuple):
    """What /proc says of one process."""

    parent: int
    cpu_s: float
    title: str
    """Its command line, or what it calls itself: Ray's workers name what they run."""


class CpuClock:
    """Looks at the processes now and then, as a context manager. Time between two looks counts for what the process
    called itself at the second."""

    def __init__(self, kinds: Mapping[str, str], other: str, *, every_s: float = EVERY_S) -> None:
        """`kinds`: texts that titles may hold, and what such processes are counted as; all others are `other`.
        `every_s`: seconds between two looks; there is one at the start and one at the end, too."""
        self.kinds, self.other, self.every_s = kinds, other, every_s
        self._times: list[float] = []
        self._seconds: list[dict[str, float]] = []
        self._total: defaultdict[str, float] = defaultdict(float)
        self._seen: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raycap-cpu-clock", daemon=True)

    @staticmethod
    def is_available() -> bool:
        """Whether this system says what its processes do."""
        return (PROC / "self/stat").exists()

    def __enter__(self) -> CpuClock:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def between(self, start_s: float, end_s: float) -> dict[str, float]:
        """CPU seconds by kind between two times, as time.time() gives them."""
        kinds = {*self.kinds.values(), self.other}
        return {
            kind: float(
                np.diff(np.interp([start_s, end_s], self._times, [each.get(kind, 0.0) for each in self._seconds]))[0]
            )
            for kind in sorted(kinds)
        }

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self._look()

    def _look(self) -> None:
        for pid, process in processes_under(os.getpid()).items():
            used_s = process.cpu_s - self._seen.get(pid, 0.0)
            kind = next((kind for text, kind in self.kinds.items() if text in process.title), self.other)
            self._total[kind] += max(0.0, used_s)  # a number may have been given to a new process
            self._seen[pid] = process.cpu_s
        self._times.append(time.time())
        self._seconds.append(dict(self._total))


def processes_under(root: int) -> dict[int, Process]:
    """This process and all its descendants, by process id."""
    everyone = {int(folder.name): process for folder in PROC.glob("[0-9]*") if (process := _process(folder))}
    found, todo = {}, [root]
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid, process in everyone.items():
        children[process.parent].append(pid)
    while todo:
        pid = todo.pop()
        if pid in everyone:
            found[pid] = everyone[pid]
            todo += children[pid]
    return found


def _process(folder: Path) -> Process | None:
    """None if it has ended."""
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()  # the name before it may hold spaces
        title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    ticks = int(fields[11]) + int(fields[12])  # utime and stime, see proc_pid_stat(5)
    return Process(parent=int(fields[1]), cpu_s=ticks / os.sysconf("SC_CLK_TCK"), title=title)
