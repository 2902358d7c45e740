"""What the captions say: counts, histograms and a random sample, in bounded memory. Knows no files, images or HTML."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raycap.bulk.report.timeline import Timeline

LONGEST_CAPTION: Final = 40
"""Words; the last bin of the lengths holds the longer ones too."""
CONFIDENCE_STEPS: Final = 1000
"""Bins of the confidences, from 0 to 1."""

_NUM_FAILED_KEYS: Final = 20
_COUNTER_CAPACITY: Final = 100_000
_DISTINCT_CAPACITY: Final = 40_000


class TopCounter:
    """The most frequent of any number of values, in bounded memory (Misra and Gries 1982, merged in batches).

    Counts are exact until there are more than twice `capacity` distinct values. From then on each may be too low by up
    to `error`, which is at most the number of values divided by `capacity`.
    """

    def __init__(self, capacity: int = _COUNTER_CAPACITY) -> None:
        self.capacity = capacity
        self.counts: Counter[str] = Counter()
        self.error = 0

    def add(self, values: pa.ChunkedArray) -> None:
        """Count every value of a string column; nulls are no values."""
        tally = values.drop_null().value_counts()
        for value, count in zip(tally.field("values").to_pylist(), tally.field("counts").to_pylist(), strict=True):
            self.counts[value] += count
        if len(self.counts) > 2 * self.capacity:
            floor = sorted(self.counts.values(), reverse=True)[self.capacity]
            self.counts = Counter({value: count - floor for value, count in self.counts.items() if count > floor})
            self.error += floor


class Distinct:
    """How many different values there are, and how many occur once, in bounded memory (Gibbons 2001).

    Values are kept by a digest of themselves, so all occurrences of one are kept and counted, or none. When more than
    `capacity` are, those with the larger digests go: the others are a fair sample of the different values.
    """

    def __init__(self, capacity: int = _DISTINCT_CAPACITY) -> None:
        self.capacity = capacity
        self._share = 1.0
        self._counts: Counter[float] = Counter()

    def add(self, values: pa.ChunkedArray) -> None:
        """Take in every value of a string column; nulls are no values."""
        tally = values.drop_null().value_counts()
        for value, count in zip(tally.field("values").to_pylist(), tally.field("counts").to_pylist(), strict=True):
            place = int.from_bytes(blake2b(value.encode(), digest_size=8).digest()) / 2**64
            if place < self._share:
                self._counts[place] += count
        while len(self._counts) > self.capacity:
            self._share /= 2
            self._counts = Counter({place: count for place, count in self._counts.items() if place < self._share})

    @property
    def is_estimate(self) -> bool:
        """Whether the numbers are estimates: with the default capacity, within about 1% of the different values."""
        return self._share < 1

    @property
    def num_values(self) -> int:
        """Different values."""
        return round(len(self._counts) / self._share)

    @property
    def num_unique(self) -> int:
        """Values that occur once."""
        return round(sum(count == 1 for count in self._counts.values()) / self._share)


class Sample:
    """A uniform random sample of a stream: every row gets a random number, the rows with the lowest are kept."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = np.random.default_rng(seed)
        self._kept: list[tuple[float, dict[str, Any]]] = []

    def add(self, rows: pa.Table) -> None:
        """Offer the next rows."""
        draws = self._random.random(rows.num_rows)
        full = len(self._kept) == self._size
        bound = (self._kept[-1][0] if self._kept else 0.0) if full else 1.0
        chosen = np.flatnonzero(draws < bound)
        chosen = chosen[np.argsort(draws[chosen])[: self._size]]
        if len(chosen):
            self._kept += zip(draws[chosen].tolist(), rows.take(pa.array(chosen)).to_pylist(), strict=True)
            self._kept.sort(key=lambda each: each[0])
            del self._kept[self._size :]

    def rows(self) -> list[dict[str, Any]]:
        """The sample, in key order."""
        return sorted((row for _, row in self._kept), key=lambda row: (row["key"] or "", row["uri"] or ""))


@dataclass(slots=True)
class Failures:
    """The rows that share a status and an error code."""

    status: str
    code: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    """`key` and `error` of the first few."""


class Digest:
    """All that the page says about the captions, gathered batch by batch."""

    def __init__(self, *, max_images: int, seed: int) -> None:
        self.sample = Sample(max_images, seed)
        self.captions, self.words, self.models = TopCounter(), TopCounter(), TopCounter()
        self.distinct = Distinct()
        self.timeline = Timeline()
        self.failures: dict[tuple[str, str], Failures] = {}
        self.num_ok = self.num_rows = self.num_bytes = self.num_sized = 0
        self.lengths = np.zeros(LONGEST_CAPTION + 1, np.int64)
        self.confidences = np.zeros(CONFIDENCE_STEPS, np.int64)
        self.first_at: datetime | None = None
        self.last_at: datetime | None = None

    def add(self, rows: pa.Table) -> None:
        """Take in the next rows."""
        self.num_rows += rows.num_rows
        self.num_bytes += pc.sum(rows["size"]).as_py() or 0
        self.num_sized += rows.num_rows - rows["size"].null_count
        self.models.add(rows["model_id"])
        times = pc.min_max(rows["captioned_at"]).as_py()
        self.first_at = min(filter(None, (self.first_at, times["min"])), default=None)
        self.last_at = max(filter(None, (self.last_at, times["max"])), default=None)
        is_ok = pc.fill_null(pc.equal(rows["status"], "ok"), False)
        self._add_ok(rows.filter(is_ok))
        self._add_failed(rows.filter(pc.invert(is_ok)))

    def count(self, status: str) -> int:
        """Rows of one status other than ok."""
        return sum(each.count for each in self.failures.values() if each.status == status)

    def _add_ok(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        self.num_ok += rows.num_rows
        self.sample.add(rows)
        self.timeline.add(rows["captioned_at"])
        self.captions.add(rows["caption"])
        self.distinct.add(rows["caption"])
        words = pc.utf8_split_whitespace(pc.utf8_lower(pc.fill_null(rows["caption"], "")))
        plain = pc.utf8_trim(pc.list_flatten(words), characters="‘’“”\"'.,;:!?()")
        self.words.add(plain.filter(pc.not_equal(plain, "")))
        lengths = np.asarray(pc.list_value_length(words), np.int64)
        self.lengths += np.bincount(lengths.clip(max=LONGEST_CAPTION), minlength=len(self.lengths))
        log_probs = np.asarray(rows["log_prob"].cast(pa.float64()).to_numpy())
        confidences = np.exp(log_probs / (lengths + 1))
        steps = (confidences[np.isfinite(confidences)] * CONFIDENCE_STEPS).astype(np.int64)
        self.confidences += np.bincount(steps.clip(0, CONFIDENCE_STEPS - 1), minlength=CONFIDENCE_STEPS)

    def _add_failed(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        rows = pa.table(
            {
                "status": pc.fill_null(rows["status"], "unknown"),
                "code": pc.fill_null(rows["error_code"], ""),
                "key": rows["key"],
                "error": rows["error"],
            }
        )
        for group in rows.group_by(["status", "code"]).aggregate([([], "count_all")]).to_pylist():
            status, code = group["status"], group["code"]
            failures = self.failures.setdefault((status, code), Failures(status, code))
            failures.count += group["count_all"]
            if wanted := _NUM_FAILED_KEYS - len(failures.examples):
                same = rows.filter((pc.field("status") == status) & (pc.field("code") == code))
                failures.examples += same.slice(0, wanted).select(["key", "error"]).to_pylist()


def confidence(caption: str | None, log_prob: float | None) -> float | None:
    """Geometric mean of the model's probabilities of the caption's words and its end: exp(log_prob / tokens)."""
    if log_prob is None or not math.isfinite(log_prob):
        return None
    return min(1.0, math.exp(log_prob / (len((caption or "").split()) + 1)))
