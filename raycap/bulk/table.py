"""What `raycap caption` prints when it is done."""

from __future__ import annotations

import io
from typing import Any

import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raycap.bulk.config import CaptionConfig
from raycap.bulk.layout import part_key
from raycap.bulk.rows import OK
from raycap.storage import Store, open_store


def print_outcome(summary: dict[str, Any], config: CaptionConfig) -> None:
    """The first captions, the errors and where everything is."""
    console = Console()
    output = open_store(config.output, config.s3)
    if config.show:
        console.print(_captions(output, config.show))
    if summary["errors"]:
        errors = Table("no caption", "objects", box=box.SIMPLE)
        errors.add_column("for example", overflow="fold")
        for error in summary["errors"]:
            errors.add_row(error["code"], str(error["count"]), escape(error["example_uri"]))
        console.print(errors)
    counts = summary["counts"]
    console.print(
        f"{counts['ok']} captioned, {counts['failed']} failed, {counts['skipped']} skipped; "
        f"{summary['elapsed_s']:.0f} s\n{escape(output.location)}: captions/, summary.json"
        + (", report.html" if config.report else ""),
        highlight=False,
        soft_wrap=True,
    )


def _captions(output: Store, num_rows: int) -> Table:
    """The first rows that have a caption."""
    table = Table("image", "caption", "log-probability", box=box.SIMPLE)
    file = pq.ParquetFile(io.BytesIO(output.read(part_key(0))))
    shown = 0
    for batch in file.iter_batches(columns=["key", "status", "caption", "log_prob"]):
        for row in batch.to_pylist():
            if row["status"] == OK:
                table.add_row(escape(row["key"]), escape(row["caption"]), f"{row['log_prob']:.2f}")
                shown += 1
            if shown == num_rows:
                return table
    return table
