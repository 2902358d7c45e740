"""Captions over time: the histogram in bounded memory, pauses, and the plot."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raycap.bulk.report.timeline import Timeline, plot_rates
from tests.report_outputs import report, row, summary_of, write_output

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def at(seconds: list[float] | np.ndarray) -> pa.ChunkedArray:
    """Times so many seconds after START."""
    microseconds = (np.asarray(seconds) * 1e6).astype(np.int64) + int(START.timestamp() * 1e6)
    return pa.chunked_array([pa.array(microseconds, pa.timestamp("us", "UTC"))])


def timeline_of(seconds: list[float] | np.ndarray, **options: int) -> Timeline:
    timeline = Timeline(**options)
    timeline.add(at(seconds))
    return timeline


def test_bins_become_wider_and_the_order_of_the_rows_does_not_matter() -> None:
    random = np.random.default_rng(0)
    seconds = random.uniform(0, 50_000, 20_000)
    whole, parts = timeline_of(np.sort(seconds), capacity=100), Timeline(capacity=100)
    for start in range(0, len(seconds), 333):
        parts.add(at(seconds[start : start + 333]))
        assert len(parts.counts) <= 100
    assert parts.width_s == whole.width_s == 512  # 50,000 s in at most 100 bins
    naive = Counter(int(START.timestamp() + each) // 512 for each in seconds.tolist())
    assert parts.counts == whole.counts == naive


def test_empty_time_takes_no_bins_and_nulls_are_no_times() -> None:
    week = 7 * 24 * 3600
    timeline = timeline_of([0, 1, 2, week, week + 1], capacity=8)
    timeline.add(pa.chunked_array([pa.nulls(3, pa.timestamp("us", "UTC"))]))
    assert timeline.width_s == 1 and timeline.counts.total() == len(timeline.counts) == 5


def test_rates_of_a_steady_run() -> None:
    plot = plot_rates(timeline_of(np.arange(0, 1000, 0.05)))
    assert plot is not None and not plot.pauses
    assert plot.unit == "second" and plot.highest == pytest.approx(20) and plot.median == pytest.approx(20)
    assert (plot.start, plot.end) == (START, START + timedelta(seconds=1000))
    assert len(plot.bars) == 91 and {round(bar.rate, 6) for bar in plot.bars} == {20}
    assert plot.bars[0].left == 0 and plot.bars[-1].left + plot.bars[-1].width == pytest.approx(1)
    assert plot.ticks == [
        (pytest.approx(share), text) for share, text in ((0.3, "12:05"), (0.6, "12:10"), (0.9, "12:15"))
    ]


def test_rates_add_up_to_the_captions() -> None:
    random = np.random.default_rng(1)
    seconds = np.concatenate([random.uniform(0, 700, 900), random.uniform(5000, 5100, 300)])
    timeline = timeline_of(seconds)
    plot, scaled = plot_rates(timeline), plot_rates(timeline, 2.5)
    assert plot is not None and scaled is not None and plot.unit == scaled.unit == "second"
    total = sum(bar.rate * (bar.end - bar.start).total_seconds() for bar in plot.bars)
    assert total == pytest.approx(1200)
    assert scaled.highest == pytest.approx(2.5 * plot.highest)


def test_long_pause_is_cut_out_and_short_one_is_a_hole() -> None:
    seconds = np.concatenate([np.arange(0, 300, 0.5), np.arange(350, 600, 0.5), np.arange(12_000, 12_300, 0.5)])
    plot = plot_rates(timeline_of(seconds))
    assert plot is not None
    (pause,) = plot.pauses
    assert pause.seconds == 11_400 and pause.after == START + timedelta(seconds=600)
    holes = [bar for bar in plot.bars if bar.height == 0]
    assert holes and all(300 <= (bar.start - START).total_seconds() <= 350 for bar in holes)
    before = next(bar for bar in plot.bars if bar.end == pause.after)
    after = next(bar for bar in plot.bars if bar.start == START + timedelta(seconds=12_000))
    assert before.left + before.width == pytest.approx(pause.left)
    assert pause.left + pause.width == pytest.approx(after.left)
    assert plot.median == pytest.approx(2)


def test_slow_runs_have_a_rate_per_minute_or_hour() -> None:
    minutes, hours = plot_rates(timeline_of(np.arange(0, 3000, 10.0))), plot_rates(timeline_of(np.arange(0, 3e6, 1800)))
    assert minutes is not None and minutes.unit == "minute" and minutes.median == pytest.approx(6, rel=0.2)
    assert hours is not None and hours.unit == "hour" and hours.median == pytest.approx(2, rel=0.2)


def test_nothing_to_see_is_no_plot() -> None:
    assert plot_rates(Timeline()) is None
    assert plot_rates(timeline_of([0, 0.2, 0.4, 1.5])) is None


@pytest.mark.parametrize("length_s", [10, 100, 3000, 40_000, 1e6, 1e8])
def test_ticks_are_few_and_apart(length_s: float) -> None:
    plot = plot_rates(timeline_of(np.linspace(0, length_s, 5000)))
    assert plot is not None
    places = [place for place, _ in plot.ticks]
    assert 1 <= len(places) <= 6 and all(np.diff(places) >= 0.15)


def test_page_shows_throughput_and_its_pauses(tmp_path: Path) -> None:
    times = [START + timedelta(seconds=s) for s in [*range(0, 120), *range(7320, 7400)]]
    rows = [row(f"{i}.jpg", captioned_at=time) for i, time in enumerate(times)]
    rows.append(row("bad.jpg", None, captioned_at=START - timedelta(days=9)))
    text = report(write_output(tmp_path / "out", rows, summary=summary_of(rows))).text
    assert (
        "Throughput over time Captions per second by the time they were made, 2026-03-01 12:00 UTC to "
        "2026-03-01 14:03 UTC. Median: 1. Cut out, since nothing was captioned: 2 h 0 min after 2026-03-01 12:02 UTC."
    ) in text
    assert "12:00:03 to 12:00:06: 1 captions per second" in text
    assert "nothing captioned for 2 h 0 min" in text


def test_page_of_a_very_short_run_has_no_throughput(tmp_path: Path) -> None:
    assert "Throughput" not in report(write_output(tmp_path / "out", [row("1.jpg"), row("2.jpg")])).text
