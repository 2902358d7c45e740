"""Measurements -> the result: what is written as JSON, printed and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from raycap.benchmark.breakdown import of_bulk, of_path
from raycap.benchmark.timing import Measure, quotients, spread

_RATIOS = {
    "engine": ("chosen engine over engine torch, tight loop", "path_chosen", "path_torch"),
    "plain": ("chosen engine over plain PyTorch, tight loop", "path_chosen", "path_plain"),
    "engine_encoder": ("chosen engine over engine torch, encoder alone", "encode_chosen", "encode_torch"),
    "encoder_share": ("tight loop over the encoder alone, chosen engine", "path_chosen", "encode_chosen"),
    "greedy": ("greedy over 3 beams, tight loop, batches of 64", "path_1_batch_64", "path_3_batch_64"),
    "batched": ("batches of 64 over image by image, tight loop", "path_3_batch_64", "path_3_batch_1"),
    "serve": ("endpoint at saturation over the tight loop beside it", "serve", "serve_loop"),
    "serve_several": ("endpoint with several images a request over the tight loop", "serve_several", "serve_loop"),
    "serve_latency": ("latency of one request over a direct call", "serve_direct", "serve_single"),
    "batched_search": ("batches of 64 over image by image, search alone", "search_3_batch_64", "search_3_batch_1"),
}
"""Name: what is told, and whose rate is divided by whose."""


def ratios(measures: Sequence[Measure]) -> dict[str, dict[str, Any]]:
    """Those of which both sides were measured; each source's bulk job over the tight loop, too."""
    by_name = {each.name: each for each in measures}
    wanted = _RATIOS | {
        each.name: (f"{each.title} over the tight loop", each.name, "path_chosen")
        for each in measures
        if each.name.startswith("bulk_")
    }
    return {
        name: {
            "title": title,
            "above": above,
            "below": below,
            "ratio": spread(quotients(by_name[above], by_name[below])),
        }
        for name, (title, above, below) in wanted.items()
        if {above, below} <= by_name.keys()
    }


def core_ms(
    measures: Sequence[Measure], worker_ms: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, dict[str, float]]:
    """Core-milliseconds of an image by stage: of the tight loop, and of each bulk job. Empty unless the stages and the
    loop were measured."""
    cost = {each.name: each.core_ms for each in measures}
    decode, encode, path = (cost.get(name) for name in ("decode", "encode_chosen", "path_chosen"))
    if decode is None or encode is None or path is None:
        return {}
    floor = of_path(decode, encode, path)
    titles = {each.name: each.title for each in measures}
    all_costs = {"tight loop": floor} | {titles[name]: of_bulk(runs, floor) for name, runs in worker_ms.items()}
    return {title: {stage: round(value, 3) for stage, value in costs.items()} for title, costs in all_costs.items()}


def load_medians(loads: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Of each load, the median of its rounds."""
    return [
        {
            name: {size: round(median(each[name].get(size, 0.0) for each in rounds), 4) for size in value}
            if isinstance(value, Mapping)
            else round(median(each[name] for each in rounds), 4)
            for name, value in rounds[-1].items()
        }
        for rounds in zip(*loads, strict=True)
    ]
