"""Digest + tiles -> the text of the page: plots, lists, numbers as people read them. Reads and writes no output."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

import raycap
from raycap.bulk.report.digest import CONFIDENCE_STEPS, LONGEST_CAPTION, Digest, TopCounter, confidence
from raycap.bulk.report.tiles import Tile
from raycap.bulk.report.timeline import plot_rates
from raycap.html import page_template

_NUM_TOP_CAPTIONS: Final = 10
_NUM_TOP_WORDS: Final = 24
_CONFIDENCE_BARS: Final = 20
_NUM_EXAMPLES: Final = 6
"""Images of the gallery beside each frequent caption."""

_LITTLE_WORDS: Final = """
    a an the and or but of to in into on onto at by with without from for as over under up down off out through near
    next is are be being been was were has have having it its his her their he she they them him there this that these
    those while who which some two three one several other another each
"""
_STOPWORDS: Final = frozenset(_LITTLE_WORDS.split())
"""Words that say little of what a picture shows: left out of the list of frequent words, counted everywhere else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """How much of the output the page is made of."""

    num_files: int
    """Caption files there are."""
    num_read: int
    """Those that were read."""
    later_round: bool = False
    """Whether a round of --update or --retry-failed has not finished; its captions are left out."""


def render(
    output: str,
    summary: dict[str, Any],
    settings: dict[str, Any],
    coverage: Coverage,
    digest: Digest,
    tiles: list[Tile],
) -> str:
    """The page. `summary` and `settings` are the run's summary.json and configuration, {} where there is none yet."""
    filters: dict[str, Callable[..., str]] = {
        "bytes": _bytes_text,
        "count": lambda value: f"{value:,}",
        "clock": lambda value: value.strftime("%H:%M:%S"),
        "duration": _duration_text,
        "rate": lambda value: f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}",
        "share": _share_text,
        "time": _time_text,
    }
    template = page_template("raycap.bulk.report", filters)
    failures = sorted(digest.failures.values(), key=lambda each: (-each.count, each.code))
    views = [_tile_view(number, tile) for number, tile in enumerate(tiles)]
    return template.render(
        summary=summary,
        output=output,
        source=summary.get("source") or settings.get("source") or output,
        models=[name for name, _ in digest.models.counts.most_common(3)],
        started_at=summary.get("started_at") or digest.first_at,
        finished_at=summary.get("finished_at") or digest.last_at,
        digest=digest,
        num_failed=digest.num_rows - digest.num_ok - digest.count("skipped"),
        num_skipped=digest.count("skipped"),
        failures={
            "Failed": [each for each in failures if each.status != "skipped"],
            "Skipped": [each for each in failures if each.status == "skipped"],
        },
        coverage=coverage,
        tiles=views,
        rates=plot_rates(digest.timeline, coverage.num_files / coverage.num_read),
        lengths=_length_plot(digest.lengths),
        confidences=_confidence_plot(digest.confidences),
        top_captions=_top_captions(digest.captions, views),
        top_words=_top_words(digest.words),
        stages=_stages(summary.get("stage_s")),
        settings=json.dumps(settings, indent=2, ensure_ascii=False) if settings else "",
        version=raycap.__version__,
        now=datetime.now(UTC),
    )


def _tile_view(number: int, tile: Tile) -> dict[str, Any]:
    row = tile.row
    others = row["alternatives"] or []
    return {
        "number": number,
        "tile": tile,
        "row": row,
        "confidence": confidence(row["caption"], row["log_prob"]),
        "alternatives": [(each["caption"], confidence(each["caption"], each["log_prob"])) for each in others],
    }


def _top_captions(
    captions: TopCounter, views: list[dict[str, Any]]
) -> list[tuple[str, int, list[dict[str, Any]], int]]:
    """Caption, how many images have it, some of them in the gallery, and how many there are in it."""
    same: dict[str, list[dict[str, Any]]] = {}
    for view in views:
        same.setdefault(view["tile"].row["caption"], []).append(view)
    top = [(text, count) for text, count in captions.counts.most_common(_NUM_TOP_CAPTIONS) if count > 1]
    return [(text, count, same.get(text, [])[:_NUM_EXAMPLES], len(same.get(text, []))) for text, count in top]


def _top_words(words: TopCounter) -> list[tuple[str, int, float]]:
    """Word, count and the count's share of the first one's."""
    content = Counter({word: count for word, count in words.counts.items() if word not in _STOPWORDS})
    top = content.most_common(_NUM_TOP_WORDS)
    return [(word, count, count / top[0][1]) for word, count in top]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a plot. Positions are shares of the plot's width, from 0 to 1."""

    left: float
    width: float
    height: float
    """Share of the tallest bar."""
    label: str
    """What it counts and how many, for the pointer and for screen readers."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A histogram, ready to draw."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    median: str


def _length_plot(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> Plot | None:
    """Captions by their number of words, from the shortest to the longest that occur."""
    if not lengths.any():
        return None
    present = np.flatnonzero(lengths)
    low, high = max(0, int(present[0]) - 1), int(present[-1]) + 1
    names = {n: f"{n}+" if n == LONGEST_CAPTION else str(n) for n in range(low, high + 1)}
    counts = [int(lengths[n]) if n < len(lengths) else 0 for n in names]
    bars = _bars(counts, [f"{name} word{'' if name == '1' else 's'}" for name in names.values()])
    every = math.ceil(len(names) / 12)
    ticks = [((n - low + 0.5) / len(names), name) for n, name in names.items() if (n - low) % every == 0]
    return Plot(bars, ticks, f"{_median(lengths)} words")


def _confidence_plot(fine: np.ndarray[Any, np.dtype[np.int64]]) -> Plot | None:
    """Captions by their confidence, from 0 to 1."""
    if not fine.any():
        return None
    counts = fine.reshape(_CONFIDENCE_BARS, -1).sum(axis=1).tolist()
    names = [f"confidence {i / _CONFIDENCE_BARS:.2f} to {(i + 1) / _CONFIDENCE_BARS:.2f}" for i in range(len(counts))]
    ticks = [(i / 5, f"{i / 5:.1f}") for i in range(6)]
    return Plot(_bars(counts, names), ticks, f"{(_median(fine) + 0.5) / CONFIDENCE_STEPS:.2f}")


def _bars(counts: list[int], names: list[str]) -> list[Bar]:
    total, tallest, width = sum(counts), max(counts), 1 / len(counts)
    return [
        Bar(i * width, width, count / tallest, f"{name}: {count:,} ({_share_text(count, total)})")
        for i, (count, name) in enumerate(zip(counts, names, strict=True))
    ]


def _median(histogram: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """The bin that holds the median."""
    return int(np.searchsorted(np.cumsum(histogram), histogram.sum() / 2))


def _stages(stage_s: Any) -> list[tuple[str, float, float, float]]:
    """Name, seconds, where its part of the bar starts, and its share."""
    if not isinstance(stage_s, dict):
        return []
    times = {
        str(name): float(value) for name, value in stage_s.items() if isinstance(value, (int, float)) and value >= 0
    }
    total = sum(times.values())
    stages, left = [], 0.0
    for name, seconds in times.items() if total else ():
        stages.append((name, seconds, left, seconds / total))
        left += seconds / total
    return stages


def _bytes_text(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} PB"


def _duration_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def _share_text(part: float, whole: float) -> str:
    """A percentage that is 0 only for nothing and 100 only for everything."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "< 0.1%"
    if 99.9 < percent < 100:
        return "> 99.9%"
    return f"{percent:.0f}%" if percent >= 10 or percent == 0 else f"{percent:.1f}%"


def _time_text(value: datetime | str) -> str:
    """To the minute, in UTC. What is no time is shown as it is."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        return str(value)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
