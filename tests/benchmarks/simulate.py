"""`raycap caption` of a billion images on 10 to 1,000 nodes: time, cost, lost work, and what is the bottleneck.

    python -m tests.benchmarks.simulate [--nodes 10 100 1000] [--world.gpu-images-per-s 300] [--csv FILE]
    python -m tests.benchmarks.simulate --check --images DIR [--num-check 2000]      predicted beside measured, here

A simulation of events: nodes take fetching tasks as they have room, in the order of the manifest; tasks pass the
driver, S3, cores, GPUs and committers; nodes are lost and come back. All that is assumed is in world.py. It is no
command of raycap's: what a user needs for one bucket, `raycap plan` works out from a sample of that bucket, without
assuming anything of S3 or of losses. docs/sizing.md has the numbers.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks.simulation import simulate
from tests.benchmarks.world import World


@dataclass(frozen=True, kw_only=True)
class Options:
    """What captioning very many images takes, by simulation."""

    nodes: tuple[int, ...] = (10, 30, 100, 300, 1000)
    world: World = field(default_factory=World)
    csv: Path | None = None
    """File for the numbers."""
    check: bool = False
    """Caption --images on one and on two nodes of one core on this machine instead, beside what is predicted."""
    images: str | None = None
    num_check: int = 2000
    """Images of --check."""
    model: str | None = None
    """Bundle of --check; by default the shipped one."""


def main() -> None:
    """Parse, simulate, print."""
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=160)
    if options.check:
        from tests.benchmarks.simulate_check import check

        console.print(check(options))
        return
    results = [simulate(options.world, num_nodes) for num_nodes in options.nodes]
    table = Table(box=box.SIMPLE)
    for title in ("nodes", "list h", "caption h", "join h", "images/s", "GPUs busy", "of all", "cost", "losses",
                  "captions lost", "reads lost", "bottleneck", "next"):  # fmt: skip
        table.add_column(title, justify="right")
    for each in results:
        table.add_row(
            *(f"{each.num_nodes:,}", f"{each.listing_h:.1f}", f"{each.captioning_h:.1f}", f"{each.joining_h:.2f}"),
            *(f"{each.images_per_s:,.0f}", f"{each.gpu_share:.0%}", f"{each.gpu_share_of_all:.0%}"),
            *(f"{each.cost:,.0f}", f"{each.num_losses:,}", f"{each.captions_lost:,.0f}", f"{each.reads_lost:,.0f}"),
            *(f"{each.bottleneck}", f"{each.next_bottleneck} ({each.busy[each.next_bottleneck]:.0%})"),
        )
    console.print(table)
    if options.csv is not None:
        rows = [{name: value for name, value in vars(each).items() if name != "committed"} for each in results]
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
