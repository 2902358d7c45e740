"""Rows -> JSON, one object a line.

Not compressed: every tool reads it as it is, Spark and DuckDB with several workers a file. captions/ is the compact
form.
"""

from __future__ import annotations

import io
import json
import math
from datetime import UTC, datetime
from typing import Any

from raycap.bulk.export.files import Count, Files
from raycap.bulk.export.source import Captions


def write_jsonl(captions: Captions, files: Files, count: Count, target_bytes: int) -> None:
    """All rows with all columns, in files of about `target_bytes`."""
    part, sink = 0, io.BytesIO()
    for row in captions.rows():
        sink.write(to_json(row).encode() + b"\n")
        count.add()
        if sink.tell() >= target_bytes:
            files.write(f"part-{part:05d}.jsonl", sink.getvalue())
            part, sink = part + 1, io.BytesIO()
    if sink.tell():
        files.write(f"part-{part:05d}.jsonl", sink.getvalue())


def to_json(row: dict[str, Any]) -> str:
    """One row of the output as JSON on one line: times in ISO 8601 UTC, and null for what is no number in JSON."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_timestamp)
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=_timestamp)


def _timestamp(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _finite(value: Any) -> Any:
    """The same without NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
