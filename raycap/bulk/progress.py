"""Progress of a bulk run: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LOG_EVERY_S = 15.0
SHORTEST_S = 2.0
"""A rate over less time says little."""


class RunProgress:
    """Counts finished rows; a context manager. `add` may be called from any thread, one at a time."""

    def __init__(self) -> None:
        self.state = "starting"
        self.num_listed = self.total = self.done = self.done_before = 0
        self.errors: Counter[str] = Counter()
        self.first_at: float | None = None
        self.last_at: float | None = None
        self._first_rows = 0
        self._last_line = time.monotonic()
        self._told = 0
        """How many were done at the last line."""
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, *, total: int, done: int) -> None:
        """`total` rows are to be captioned, of which `done` were finished by an earlier run."""
        self.state = "captioning"
        self.total, self.done, self.done_before, self._told = total, done, done, done

    def list(self, num_listed: int) -> None:
        """So many objects are listed by now."""
        self.num_listed = num_listed

    def status(self) -> dict[str, Any]:
        """How far it is, for `raycap status`."""
        rate = self.images_per_s
        return {
            "state": self.state,
            "num_listed": self.num_listed,
            "num_rows": self.total,
            "num_done": min(self.done, self.total),
            "images_per_s": rate and round(rate, 2),
            "errors": dict(self.errors),
        }

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
        elif self.done > self._told:
            self._line()

    def add(self, rows: int, *, errors: dict[str, int] | None = None, at_s: float | None = None) -> None:
        """`rows` more are done, some of them with these error codes, at `at_s` (as time.time(); by default now)."""
        at_s = time.time() if at_s is None else at_s
        if self.first_at is None:
            self.first_at, self._first_rows = at_s, rows
        self.last_at = at_s if self.last_at is None else max(at_s, self.last_at)
        now = time.monotonic()
        self.done += rows
        self.errors.update(errors or {})
        if self._bar is not None:
            rate = "-" if self.images_per_s is None else f"{self.images_per_s:.1f}"
            self._bar.update(self._task, completed=min(self.done, self.total), rate=rate, failed=self.errors.total())
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
        self._told = self.done
        rate = self.images_per_s
        done = min(self.done, self.total)  # rows are counted again where a worker died and another did them again
        left = f", {duration_text((self.total - done) / rate)} left" if rate and done < self.total else ""
        speed = f", {rate:.1f} images/s" if rate else ""
        share = 100 * done / self.total
        log.info("finished %d of %d (%.0f%%), %d failed%s%s", done, self.total, share, self.errors.total(), speed, left)


def duration_text(seconds: float) -> str:
    """12m05s, 3h07m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
