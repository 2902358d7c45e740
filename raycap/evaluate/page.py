"""Scores and tiles -> the text of the page. Reads and writes no files, and knows no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

import raycap
from raycap.evaluate.rows import ScoredImage
from raycap.evaluate.scores import Scores
from raycap.evaluate.table import TITLES
from raycap.evaluate.tiles import Tile
from raycap.html import page_template

__all__ = ["render"]

_BIN_WIDTHS = (5, 10, 20, 50)
"""Of the histogram, in CIDEr-D x100, which is at most 1000."""
_MAX_BINS = 30


def render(
    facts: Mapping[str, str],
    scores: Scores,
    images: Sequence[ScoredImage],
    best: Sequence[Tile],
    worst: Sequence[Tile],
) -> str:
    """The page. `facts`: what was scored, by the names under which the page shows it; the first is its title."""
    template = page_template("raycap.evaluate", {"x100": lambda value: f"{100 * value:.1f}"})
    cider_d = np.array([100 * image.scores["cider_d"] for image in images])
    return template.render(
        title=next(iter(facts.values())),
        facts=facts,
        scores=scores,
        titles=TITLES,
        histogram=_histogram(cider_d),
        median=float(np.median(cider_d)),
        sections={"Best": best, "Worst": worst},
        errors=[image for image in images if image.error],
        version=raycap.__version__,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _histogram(values: np.ndarray) -> list[tuple[int, int, int]]:
    """Where each bin starts and ends, and how many of the values are in it; from 0 to the highest of them."""
    width = next((width for width in _BIN_WIDTHS if values.max() < width * _MAX_BINS), _BIN_WIDTHS[-1])
    counts = np.bincount((values // width).astype(int))
    return [(width * number, width * (number + 1), int(count)) for number, count in enumerate(counts)]
