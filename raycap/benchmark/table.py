"""The result as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raycap.benchmark.breakdown import STAGES


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Rates, ratios, and where the time goes."""
    machine = result["machine"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB{gpu}; {result['num_images']} images; "
        f"engine {result['engine']}",
        highlight=False,
    )
    rates = _table("", "images/s", "lowest", "highest", "core-ms an image")
    for each in result["measurements"].values():
        rates.add_row(escape(each["title"]), *_cells(each["images_per_s"], 1), _number(each["core_ms_per_image"], 1))
    console.print(rates)
    if result["ratios"]:
        quotients = _table("", "ratio", "lowest", "highest")
        for each in result["ratios"].values():
            quotients.add_row(escape(each["title"]), *_cells(each["ratio"], 2))
        console.print(quotients)
    share = 100 * result["share_of_equal_captions"]
    console.print(f"the same caption as plain PyTorch: {share:.1f}% of the images", highlight=False)
    if result["loads"]:
        loads = _table("load on the endpoint", "asked/s", "p50, ms", "p99, ms", "bound, ms", "503", "failed", "batches")
        for each in result["loads"]:
            times = [_number(each[name], 1) for name in ("asked_per_s", "p50_ms", "p99_ms", "bound_ms")]
            shares = [f"{each[name]:.1%}" for name in ("refused", "failed")]
            loads.add_row(f"{each['share']:.0%} of saturation", *times, *shares, batch_sizes(each["batch_sizes"]))
        console.print(loads)
    if result["core_ms_per_image"]:
        costs = _table("core-ms an image", *STAGES.values(), "all")
        for title, by_stage in result["core_ms_per_image"].items():
            cells = [_number(by_stage.get(stage), 1) for stage in STAGES]
            costs.add_row(escape(title), *cells, _number(sum(by_stage.values()), 1))
        console.print(costs)


def batch_sizes(shares: Mapping[str, float]) -> str:
    """Of the images, those in batches of up to 1, up to 2, up to 4 and so on."""
    return ", ".join(f"{size}: {share:.0%}" for size, share in shares.items() if share >= 0.005)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right")
    return table


def _cells(spread: Mapping[str, Any], digits: int) -> list[str]:
    return [_number(spread[name], digits) for name in ("median", "lowest", "highest")]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
