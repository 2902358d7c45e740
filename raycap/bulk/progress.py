"""Progress of a bulk run: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LOG_EVERY_S = 15.0
SHORTEST_S = 2.0
"""A rate over less time says little."""


class RunProgress:
    """Counts finished rows; a context manager. `add` may be called from any thread, one at a time."""

    def __init__(self, *, total: int, done: int) -> None:
        """`total` rows of the manifest, of which `done` were finished by an earlier run."""
        self.total = total
        self.done = done
        self.done_before = done
        self.failed = 0
        self.first_at: float | None = None
        self.last_at: float | None = None
        self._first_rows = 0
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> RunProgress:
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("captioning"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} images/s  {task.fields[failed]} failed"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("captioning", total=self.total, completed=self.done, rate="-", failed=0)
            self._bar.start()
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > self.done_before:
            self._line()

    def add(self, rows: int, *, failed: int = 0, at_s: float | None = None) -> None:
        """`rows` more are captioned (or failed, `failed` of them), at `at_s` (as time.time(); by default now)."""
        at_s = time.time() if at_s is None else at_s
        if self.first_at is None:
            self.first_at, self._first_rows = at_s, rows
        self.last_at = at_s if self.last_at is None else max(at_s, self.last_at)
        now = time.monotonic()
        self.done += rows
        self.failed += failed
        if self._bar is not None:
            rate = "-" if self.images_per_s is None else f"{self.images_per_s:.1f}"
            self._bar.update(self._task, completed=min(self.done, self.total), rate=rate, failed=self.failed)
        elif now - self._last_line >= LOG_EVERY_S:
            self._last_line = now
            self._line()

    @property
    def images_per_s(self) -> float | None:
        """Rows a second from the first finished batch to the last; None while they are less than 2 s apart."""
        if self.first_at is None or self.last_at is None or self.last_at - self.first_at < SHORTEST_S:
            return None
        return (self.done - self.done_before - self._first_rows) / (self.last_at - self.first_at)

    def _line(self) -> None:
        rate = self.images_per_s
        done = min(self.done, self.total)  # rows are counted again where a worker died and another did them again
        left = f", {_duration((self.total - done) / rate)} left" if rate and done < self.total else ""
        speed = f", {rate:.1f} images/s" if rate else ""
        share = 100 * done / self.total
        log.info("captioned %d of %d (%.0f%%), %d failed%s%s", done, self.total, share, self.failed, speed, left)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
