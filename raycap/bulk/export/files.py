"""The files of one export: each whole or absent; stale ones go, the marker comes last."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from raycap.bulk.progress import LOG_EVERY_S
from raycap.storage import Store

log = logging.getLogger(__name__)

MARKER: Final = "_SUCCESS"
"""Says that an export is complete, and what it holds (JSON). Hadoop's name for it, so Spark, DuckDB, pyarrow and
`datasets` read past it; `datasets` would take a name that ends in .json for data."""

_NAMES: Final = {
    "jsonl": re.compile(r"part-\d{5,}\.jsonl"),
    "coco": re.compile(r"(results|images)\.json"),
    "webdataset": re.compile(r"shard-\d{6,}\.tar"),
    "parquet": re.compile(r"((status|model_id|folder)=[^/]+/)?part-\d{5,}\.parquet"),
}
"""What exports may have written. Anything else in their folders is the user's."""


class Files:
    """The files of one export, in the folder of its format."""

    def __init__(self, output: Store, format_: str) -> None:
        self.location = output.uri(f"{format_}/")
        self.written: set[str] = set()
        """Keys."""
        self.num_bytes = 0
        self._output = output
        self._folder = f"{format_}/"
        self._names = _NAMES[format_]

    def begin(self) -> None:
        """Say that the export is not complete."""
        self._output.delete(self._folder + MARKER)

    def write(self, name: str, data: bytes) -> None:
        """One file, in place of an earlier one of this name."""
        assert self._names.fullmatch(name), name
        self._output.write(self._folder + name, data)
        self.written.add(self._folder + name)
        self.num_bytes += len(data)

    def finish(self, outcome: dict[str, Any]) -> None:
        """Delete what an earlier export left over, then say that this one is complete."""
        stale = [
            info.key
            for info in self._output.list(self._folder)
            if info.key not in self.written and self._names.fullmatch(info.key.removeprefix(self._folder))
        ]
        for key in stale:
            self._output.delete(key)
        self._output.write(self._folder + MARKER, (json.dumps(outcome, indent=1) + "\n").encode())


@dataclass(kw_only=True)
class Count:
    """Rows done so far, with a log line now and then."""

    total: int
    """Rows of captions/."""
    rows: int = 0
    """Rows written."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows by why they are not written."""
    _started: float = field(default_factory=time.monotonic)
    _last_line: float = field(default_factory=time.monotonic)

    def add(self, rows: int = 1) -> None:
        """`rows` more are written."""
        self.rows += rows
        self._line()

    def leave_out(self, reason: str, rows: int = 1) -> None:
        """`rows` more are not."""
        self.left_out[reason] += rows
        self._line()

    def _line(self) -> None:
        now = time.monotonic()
        if now - self._last_line >= LOG_EVERY_S:
            self._last_line = now
            left_out = self.left_out.total()
            done = self.rows + left_out
            share, speed = 100 * done / max(1, self.total), done / (now - self._started)
            log.info("exported %d of %d (%.0f%%), %d left out, %.0f rows/s", done, self.total, share, left_out, speed)
