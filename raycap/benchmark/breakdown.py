"""Where the time of one image goes, stage by stage, in milliseconds of one core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

STAGES: Final = {
    "fetch": "fetch",
    "decode": "decode and resize",
    "encode": "encoder",
    "search": "search",
    "write": "write",
    "ray": "Ray and the rest",
}
"""And what they are called."""


def of_path(decode_ms: float, encode_ms: float, path_ms: float) -> dict[str, float]:
    """Of the tight loop, the floor for any pipeline: two stages alone, and what the whole costs more is the search."""
    return {"decode": decode_ms, "encode": encode_ms, "search": max(0.0, path_ms - decode_ms - encode_ms)}


def of_bulk(worker_ms: Sequence[Mapping[str, float]], floor: Mapping[str, float]) -> dict[str, float]:
    """Of the bulk job: medians over its runs.

    `worker_ms` has the CPU time of the workers that fetch and decode ("fetch"), that caption ("caption"), that write
    ("write") and of all other processes ("ray"). Inside a process, times are shared out as in the tight loop: of the
    first, decoding takes what it takes there; the second is encoder and search in proportion. Where there is no CPU
    time, it has the seconds of the stages: "fetch", "decode" and "caption".
    """
    mid = {name: median(run[name] for run in worker_ms) for name in worker_ms[0]}
    result = dict(mid)
    caption_ms = result.pop("caption")
    if "decode" not in mid:
        result["decode"] = min(floor["decode"], mid["fetch"])
        result["fetch"] = mid["fetch"] - result["decode"]
    share = floor["encode"] / (floor["encode"] + floor["search"])
    result |= {"encode": share * caption_ms, "search": (1 - share) * caption_ms}
    return {name: result[name] for name in STAGES if name in result}
