"""Measurements in rounds: each round measures everything once, and a ratio is of two measurements of one round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measurement."""

    images_per_s: float
    core_ms: float | None
    """CPU time of one image, in milliseconds of one core; None where it is not known."""


@dataclass(kw_only=True)
class Measure:
    """Something to measure, and what came of it round by round."""

    name: str
    title: str
    run: Callable[[], Sample]
    samples: list[Sample] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Images/s of each round."""
        return [sample.images_per_s for sample in self.samples]

    @property
    def core_ms(self) -> float | None:
        """Median of the rounds where it is known."""
        known = [sample.core_ms for sample in self.samples if sample.core_ms is not None]
        return median(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON."""
        return {
            "title": self.title,
            "images_per_s": spread(self.rates),
            "core_ms_per_image": None if self.core_ms is None else round(self.core_ms, 3),
        }


def timed(work: Callable[[], object], num_images: int) -> Sample:
    """What `work` costs in this process, which does nothing else meanwhile."""
    started, cpu_started = time.perf_counter(), time.process_time()
    work()
    cpu_s, elapsed_s = time.process_time() - cpu_started, time.perf_counter() - started
    return Sample(images_per_s=num_images / elapsed_s, core_ms=1000 * cpu_s / num_images)


def measure(measures: Sequence[Measure], repeats: int) -> None:
    """All of them once, then all of them again, and so on."""
    for number in range(1, repeats + 1):
        for each in measures:
            sample = each.run()
            each.samples.append(sample)
            log.info("round %d of %d: %s: %.1f images/s", number, repeats, each.title, sample.images_per_s)


def quotients(above: Measure, below: Measure) -> list[float]:
    """Rate over rate, round by round: noise that lasts for a round falls out."""
    return [one / other for one, other in zip(above.rates, below.rates, strict=True)]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest of the rounds, and each of them."""
    return {
        "median": round(median(values), 3),
        "lowest": round(min(values), 3),
        "highest": round(max(values), 3),
        "rounds": [round(value, 3) for value in values],
    }
