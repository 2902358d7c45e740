"""The captions of a finished output in other formats, each in a folder of its own beside captions/.

    captions/*.parquet --batches of rows--> jsonl/ coco/ webdataset/ parquet/ --> _SUCCESS

Nothing is captioned again, and only webdataset reads the images again. Knows nothing of Ray or torch.

    source.py      captions/ -> batches of rows, all of them or an error
    files.py       the files of one export: each whole or absent; stale ones go, the marker comes last
    jsonl.py       rows -> JSON, one object a line
    coco.py        captioned rows -> COCO results, and the images that they are of
    webdataset.py  captioned rows and their images -> tar shards
    parquet.py     rows -> Parquet files of another size, in hive partitions or flat
"""

from __future__ import annotations

import logging
from typing import Any, Final

from raycap.bulk.config import ExportConfig
from raycap.bulk.export.coco import write_coco
from raycap.bulk.export.files import Count, Files
from raycap.bulk.export.jsonl import write_jsonl
from raycap.bulk.export.parquet import write_parquet
from raycap.bulk.export.source import Captions
from raycap.bulk.export.webdataset import write_webdataset
from raycap.bulk.sources.base import Reader
from raycap.storage import Anywhere, open_store

__all__ = ["export"]

log = logging.getLogger(__name__)

_BYTES_PER_MB: Final = 1_000_000


def export(config: ExportConfig, *, reader: Reader | None = None) -> dict[str, Any]:
    """Write one format. Doing it again replaces the files of an earlier export, and removes those left over.

    Args:
        reader: what webdataset reads the images with, by their URI; by default the storage.

    Returns:
        What the marker says: `format`, `files`, `num_bytes`, `rows` (written), `left_out` (rows by reason: a status, or
        what became of the image: not_found, changed, an error code), and how the format was made.

    Raises:
        ConfigurationError: the output is not finished, or not one of `raycap caption`.
        StorageError: it cannot be read or written, rows are missing, or not one image can be read again.
    """
    output = open_store(config.output, config.s3)
    captions = Captions(output)
    output.check_writable()
    files, count = Files(output, config.format), Count(total=captions.num_rows)
    target_bytes = max(1, int(config.file_size_mb * _BYTES_PER_MB))
    made: dict[str, Any] = {}
    files.begin()
    match config.format:
        case "jsonl":
            write_jsonl(captions, files, count, target_bytes)
        case "coco":
            made["image_id"] = write_coco(captions, files, count)
        case "webdataset":
            write_webdataset(captions, files, count, target_bytes, reader or Anywhere(config.s3))
        case "parquet":
            made["partition_by"] = config.partition_by
            write_parquet(captions, files, count, target_bytes, config.partition_by)
    outcome = {
        "format": config.format,
        **made,
        "rows": count.rows,
        "left_out": dict(count.left_out),
        "files": len(files.written),
        "num_bytes": files.num_bytes,
        "captions_finished_at": captions.finished_at,
    }
    files.finish(outcome)
    log.info("%s: %d rows in %d files, %.1f MB", files.location, count.rows, len(files.written), files.num_bytes / 1e6)
    return outcome
