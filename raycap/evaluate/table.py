"""Scores as a small table for people, times 100 as papers print them."""

from __future__ import annotations

from rich import box
from rich.table import Table

from raycap.evaluate.scores import ALL_METRICS, Scores

__all__ = ["TITLES", "scores_table"]

TITLES = dict(zip(ALL_METRICS, ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D"), strict=True))
"""What people call each metric."""


def scores_table(scores: Scores) -> Table:
    """One row: every metric that was asked for, times 100; "-" for one that could not be computed.

    `rich.print` it, or `rich.console.Console(file=...).print` it for plain text.
    """
    caption = f"x100, {scores.num_images} images, tokenizer {scores.tokenizer}"
    if scores.tokenizer != "ptb":
        caption += " (published scores use ptb, which needs Java)"
    table = Table(box=box.SIMPLE, caption=caption, caption_justify="left")
    row = []
    for name, title in TITLES.items():
        if name in scores.values or name in scores.unavailable:
            table.add_column(title, justify="right", no_wrap=True)
            row.append(f"{100 * scores.values[name]:.1f}" if name in scores.values else "-")
    table.add_row(*row)
    return table
