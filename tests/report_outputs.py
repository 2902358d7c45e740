"""Outputs of the bulk job for the tests of the report, and its page as a browser would see it."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raycap.bulk.report import write_report

SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        *((name, pa.string()) for name in ("uri", "key", "etag")),
        ("size", pa.int64()),
        *((name, pa.string()) for name in ("status", "error_code", "error", "caption")),
        ("log_prob", pa.float64()),
        ("alternatives", pa.list_(pa.struct([("caption", pa.string()), ("log_prob", pa.float64())]))),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("model_id", pa.string()),
        ("captioned_at", pa.timestamp("us", tz="UTC")),
    ]
)
NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
EVIL = "<script>alert(1)</script>"
EVIL_KEY = f"{EVIL}\"'><img src=x onerror=alert(2)>.jpg"
EVIL_CAPTION = "a dog </li></script><script>document.title='owned'</script> & {{ 7 * 7 }}"


def row(name: str, caption: str | None = "a dog runs", **fields: Any) -> dict[str, Any]:
    """One row of the output; without a caption, a failed one."""
    ok = caption is not None
    return {
        "row_id": 0,
        "uri": f"/nowhere/{name}",
        "key": name,
        "size": None,
        "status": "ok" if ok else "failed",
        "error_code": None if ok else "corrupt",
        "error": None if ok else f"{name} is damaged",
        "caption": caption,
        "log_prob": -2.0 if ok else None,
        "alternatives": [] if ok else None,
        "model_id": "tiny@1",
        "captioned_at": NOW,
    } | fields


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA)


def write_output(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    summary: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    num_files: int = 1,
) -> str:
    """An output of `raycap caption` in `folder`; returns its location."""
    (folder / "captions").mkdir(parents=True)
    for part in range(num_files):
        pq.write_table(table(rows[part::num_files]), folder / f"captions/part-{part:05d}.parquet")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if settings is not None:
        (folder / "_raycap").mkdir()
        (folder / "_raycap/run.json").write_text(json.dumps(settings))
    return str(folder)


def summary_of(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {
        "status": "complete",
        "source": "s3://photos/2026",
        "model_id": "tiny@1",
        "num_objects": len(rows),
        "started_at": "2026-03-01T12:00:00+00:00",
        "finished_at": "2026-03-01T12:31:00+00:00",
        "elapsed_s": 1860.0,
        "images_per_s": 12.34,
        "stage_s": {"fetch": 100.0, "decode": 300.0, "caption": 600.0},
        "num_files": 1,
        "raycap_version": "0.1.0",
    } | fields


def image_row(folder: Path, name: str, data: bytes, **fields: Any) -> dict[str, Any]:
    """A file of an image source, and its row."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return row(name) | {"uri": str(folder / name), "size": len(data)} | fields


class Page(HTMLParser):
    """What a browser would see of the report, as far as the tests ask."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self.source = Path(location).read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {}
        self.text = ""
        self._open = ""
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.contents.setdefault(self._open, []).append(data)
        else:
            self.text += f" {data}"

    def images(self) -> list[dict[str, str | None]]:
        """Those of the gallery; the small ones elsewhere have no source of their own."""
        return [attributes for tag, attributes in self.tags if tag == "img" and "src" in attributes]


def report(output: str, **options: Any) -> Page:
    return Page(write_report(output, **options))


def thumbnail(attributes: dict[str, str | None]) -> Image.Image:
    head, data = (attributes["src"] or "").split(",", 1)
    assert head == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(data)))
