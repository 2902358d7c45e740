"""When the captions were made: a histogram over time in bounded memory, and its plot. Knows no files and no HTML."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa

_CAPACITY: Final = 1024
_NUM_BARS: Final = 96
_NUM_TICKS: Final = 5
_SHORTEST_PAUSE_S: Final = 60
_SMALLEST_PAUSE: Final = 0.05
"""Of the whole time. Shorter pauses are drawn, as holes; longer ones are cut out."""
_PAUSE_WIDTH: Final = 0.02
"""Of the plot, for each pause that is cut out."""
_TICK_STEPS_S: Final = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800),
    *(hours * 3600 for hours in (1, 2, 3, 6, 12, 24, 48, 168, 336, 720, 2160, 8760)),
)
_UNITS: Final = ((1, "second"), (60, "minute"), (3600, "hour"), (86400, "day"))


class Timeline:
    """Captions by the second they were made. When more than `capacity` bins hold something, all become twice as wide.

    Bins begin at multiples of their width and empty ones take no memory, so neither the order of the rows nor the
    time between a killed run and its resumption changes the result.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self.capacity = capacity
        self.width_s = 1
        self.counts: Counter[int] = Counter()
        """Captions by the number of their bin: time since 1970 divided by `width_s`, rounded down."""

    def add(self, times: pa.ChunkedArray) -> None:
        """Count every time of a timestamp column; nulls are no times."""
        seconds = np.asarray(times.drop_null().cast(pa.timestamp("s", "UTC"), safe=False).cast(pa.int64()), np.int64)
        bins, counts = np.unique(seconds // self.width_s, return_counts=True)
        self.counts.update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))
        while len(self.counts) > self.capacity:
            wider: Counter[int] = Counter()
            for number, count in self.counts.items():
                wider[number // 2] += count
            self.counts, self.width_s = wider, 2 * self.width_s


@dataclass(frozen=True, slots=True)
class Pause:
    """A time without captions that the plot leaves out."""

    left: float
    width: float
    """Of its mark, as shares of the plot's width."""
    seconds: int
    after: datetime


@dataclass(frozen=True, slots=True)
class RateBar:
    """Captions per unit of time over one stretch. Positions are shares of the plot's width and height."""

    left: float
    width: float
    height: float
    rate: float
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class RatePlot:
    """Throughput over time, ready to draw."""

    bars: list[RateBar]
    pauses: list[Pause]
    ticks: list[tuple[float, str]]
    unit: str
    """What the rates are per: second, minute, hour or day."""
    highest: float
    median: float
    """Of the bars, weighted by their duration."""
    start: datetime
    end: datetime


def plot_rates(timeline: Timeline, scale: float = 1.0) -> RatePlot | None:
    """The plot of a timeline; None for less than three bins, in which there is nothing to see.

    `scale`: captions for each one that was counted, where only a sample of them was.
    """
    if len(timeline.counts) < 3:
        return None
    stretches = _stretches(timeline)
    active = sum(len(stretch) for stretch in stretches)
    per_bar = math.ceil(active / _NUM_BARS)
    bins = [stretch[i : i + per_bar] for stretch in stretches for i in range(0, len(stretch), per_bar)]
    per_s = [
        scale * sum(timeline.counts.get(number, 0) for number in bar) / (len(bar) * timeline.width_s) for bar in bins
    ]
    highest = max(per_s)
    unit_s, unit = next((each for each in _UNITS if highest * each[0] >= 1), _UNITS[-1])
    bin_width = (1 - _PAUSE_WIDTH * (len(stretches) - 1)) / active
    starts = {stretch.start for stretch in stretches[1:]}
    bars: list[RateBar] = []
    pauses: list[Pause] = []
    left = 0.0
    for bar, rate in zip(bins, per_s, strict=True):
        if bar.start in starts:
            end = bars[-1].end
            idle_s = bar.start * timeline.width_s - int(end.timestamp())
            pauses.append(Pause(left, _PAUSE_WIDTH, idle_s, end))
            left += _PAUSE_WIDTH
        width = len(bar) * bin_width
        span = (_time(number * timeline.width_s) for number in (bar.start, bar.stop))
        bars.append(RateBar(left, width, rate / highest, rate * unit_s, *span))
        left += width
    return RatePlot(
        bars=bars,
        pauses=pauses,
        ticks=_ticks(bars, active * timeline.width_s),
        unit=unit,
        highest=highest * unit_s,
        median=_median(bars),
        start=bars[0].start,
        end=bars[-1].end,
    )


def _stretches(timeline: Timeline) -> list[range]:
    """The bins from the first to the last, in pieces: between them are the pauses to be cut out."""
    numbers = sorted(timeline.counts)
    longest = max(_SHORTEST_PAUSE_S / timeline.width_s, _SMALLEST_PAUSE * (numbers[-1] + 1 - numbers[0]))
    stretches, first = [], numbers[0]
    for before, number in pairwise(numbers):
        if number - before - 1 > longest:
            stretches.append(range(first, before + 1))
            first = number
    return [*stretches, range(first, numbers[-1] + 1)]


def _ticks(bars: list[RateBar], active_s: int) -> list[tuple[float, str]]:
    """Times of day at round values, and where each stretch begins if there is room."""
    step_s = next((step for step in _TICK_STEPS_S if active_s / step <= _NUM_TICKS), _TICK_STEPS_S[-1])
    form = "%b %-d" if step_s >= 86400 else "%H:%M" if step_s >= 60 else "%H:%M:%S"
    ticks: list[tuple[float, str]] = []
    for bar in bars:
        start_s, end_s = bar.start.timestamp(), bar.end.timestamp()
        at_s = math.ceil(start_s / step_s) * step_s
        at = bar.left + bar.width * (at_s - start_s) / (end_s - start_s)
        if at_s < end_s and 0.04 <= at <= 0.96 and (not ticks or at - ticks[-1][0] >= 0.8 / _NUM_TICKS):
            ticks.append((at, _time(at_s).strftime(form)))
    return ticks


def _median(bars: list[RateBar]) -> float:
    """The rate that half of the time was above."""
    ordered = sorted(bars, key=lambda bar: bar.rate)
    widths: Any = np.cumsum([bar.width for bar in ordered])
    return ordered[int(np.searchsorted(widths, widths[-1] / 2))].rate


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
