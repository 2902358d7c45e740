"""An output of `raycap caption` -> report.html: a gallery of captioned images, the failures, plots and rates.

    captions/*.parquet --stream--> Digest (counts, histograms, top captions and words, a random sample)
    the sample's URIs  --fetch---> tiles: small JPEGs inside the page
    Digest + tiles + summary.json -> report.html.j2 -> one file that asks no network for anything

Memory is bounded whatever the number of rows. The images are read again, since the output holds none of them; one that
has gone or changed meanwhile becomes a tile that says so. Knows nothing of Ray, torch or the model.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from io import BytesIO
from typing import Any, Final

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from pyarrow.fs import FileSystem

import raycap
from raycap.bulk.layout import CAPTIONS_PREFIX, CHUNKS_PREFIX, RUN, SUMMARY
from raycap.errors import ConfigurationError, NotFoundError, ObjectError, ObjectNotFoundError, RaycapError, StorageError
from raycap.images import ImageLimits, Preprocessing, decode_image
from raycap.storage import S3Options, Store, is_s3, open_store

__all__ = ["REPORT", "write_report"]

REPORT: Final = "report.html"

_DEFAULT_S3: Final = S3Options()

_COLUMNS: Final = (
    *("uri", "key", "size", "status", "error_code", "error", "caption", "log_prob", "alternatives"),
    *("width", "height", "model_id", "captioned_at"),
)
_BATCH_ROWS: Final = 65_536
_READ_BUFFER_BYTES: Final = 1 << 20
"""A column is read in steps of this size, not a row group at a time."""

_THUMBNAIL: Final = Preprocessing(size_px=240, resize="pad")
_JPEG_QUALITY: Final = 80
_FETCH_THREADS: Final = 4
"""Few, because each may decode an image of `ImageLimits.max_pixels`."""

_NUM_FAILED_KEYS: Final = 20
_NUM_TOP_CAPTIONS: Final = 10
_NUM_TOP_WORDS: Final = 24
_COUNTER_CAPACITY: Final = 100_000
_LONGEST_CAPTION: Final = 40
"""Words; the last bar of the length histogram holds the longer ones too."""
_CONFIDENCE_STEPS: Final = 1000
_CONFIDENCE_BARS: Final = 20

_LITTLE_WORDS: Final = """
    a an the and or but of to in into on onto at by with without from for as over under up down off out through near
    next is are be being been was were has have having it its his her their he she they them him there this that these
    those while who which some two three one several other another each
"""
_STOPWORDS: Final = frozenset(_LITTLE_WORDS.split())
"""Words that say little of what a picture shows: left out of the list of frequent words, counted everywhere else."""


def write_report(output: str, *, s3: S3Options = _DEFAULT_S3, max_images: int = 200, seed: int = 0) -> str:
    """Write `report.html` into an output of `raycap caption`, finished or not, and return where it is.

    Args:
        output: directory or s3:// prefix with `captions/`.
        max_images: images in the gallery, drawn at random from all that have a caption.
        seed: of the draw. The same output and seed give the same sample.

    Raises:
        ConfigurationError: `output` has no captions, or they are not raycap's.
        StorageError: it cannot be read or written.
    """
    if max_images < 0:
        raise ConfigurationError(f"max_images must not be negative, got {max_images}")
    store = open_store(output, s3)
    summary = _read_json(store, SUMMARY)
    settings = summary.get("config") or _read_json(store, RUN)
    keys = _caption_files(store, output, finished=bool(summary))
    digest = Digest(max_images=max_images, seed=seed)
    filesystem, root = store.arrow_filesystem()
    for key in keys:
        for batch in _batches(filesystem, f"{root}/{key}", name=store.uri(key)):
            digest.add(batch)
    tiles = _make_tiles(digest.sample.rows(), s3, _limits(settings))
    store.write(REPORT, _render(output, summary, settings, digest, tiles).encode(errors="replace"))
    return store.uri(REPORT)


def _caption_files(store: Store, output: str, *, finished: bool) -> list[str]:
    """The files in captions/; while the run goes on, its finished chunks, which are ahead of them."""
    what = f"{output} is not an output of raycap caption: no captions/ here"
    try:
        for prefix in (CAPTIONS_PREFIX, CHUNKS_PREFIX) if finished else (CHUNKS_PREFIX, CAPTIONS_PREFIX):
            if keys := [info.key for info in store.list(prefix) if info.key.endswith(".parquet")]:
                return keys
    except NotFoundError as error:
        raise ConfigurationError(f"{what} ({error})") from error
    raise ConfigurationError(what)


def _read_json(store: Store, key: str) -> dict[str, Any]:
    """A JSON object of the output; {} where the run has not got so far."""
    try:
        value = json.loads(store.read(key))
    except (ObjectNotFoundError, NotFoundError):
        return {}
    except ObjectError as error:
        raise StorageError(str(error)) from error
    except ValueError as error:
        raise ConfigurationError(f"{store.uri(key)} is not JSON: {error}; run the same command again") from error
    return value if isinstance(value, dict) else {}


def _limits(settings: dict[str, Any]) -> ImageLimits:
    """What the run allowed one file to cost: its images are decoded under the same limits again."""
    given = settings | (settings.get("limits") or {})
    names = ("max_bytes", "max_pixels")
    return ImageLimits(**{name: given[name] for name in names if isinstance(given.get(name), int)})


def _batches(filesystem: FileSystem, path: str, *, name: str) -> Iterator[pa.Table]:
    """The columns that matter of one file, a bounded number of rows at a time."""
    try:
        with filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
            if missing := sorted(set(_COLUMNS) - set(file.schema_arrow.names)):
                raise ConfigurationError(f"{name} was not written by raycap: no column {', '.join(missing)}")
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(_COLUMNS)):
                yield pa.Table.from_batches([batch])
    except pa.ArrowInvalid as error:
        raise ConfigurationError(f"{name} is no readable Parquet file: {error}; caption again") from error
    except OSError as error:
        raise StorageError(f"cannot read {name}: {error}") from error


# What the captions say


class TopCounter:
    """The most frequent of any number of values, in bounded memory (Misra and Gries 1982, merged in batches).

    Counts are exact until there are more than twice `capacity` distinct values. From then on each may be too low by up
    to `error`, which is at most the number of values divided by `capacity`.
    """

    def __init__(self, capacity: int = _COUNTER_CAPACITY) -> None:
        self.capacity = capacity
        self.counts: Counter[str] = Counter()
        self.error = 0

    def add(self, values: pa.ChunkedArray) -> None:
        """Count every value of a string column; nulls are no values."""
        tally = values.drop_null().value_counts()
        for value, count in zip(tally.field("values").to_pylist(), tally.field("counts").to_pylist(), strict=True):
            self.counts[value] += count
        if len(self.counts) > 2 * self.capacity:
            floor = sorted(self.counts.values(), reverse=True)[self.capacity]
            self.counts = Counter({value: count - floor for value, count in self.counts.items() if count > floor})
            self.error += floor


class Sample:
    """A uniform random sample of a stream: every row gets a random number, the rows with the lowest are kept."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = np.random.default_rng(seed)
        self._kept: list[tuple[float, dict[str, Any]]] = []

    def add(self, rows: pa.Table) -> None:
        """Offer the next rows."""
        draws = self._random.random(rows.num_rows)
        full = len(self._kept) == self._size
        bound = (self._kept[-1][0] if self._kept else 0.0) if full else 1.0
        chosen = np.flatnonzero(draws < bound)
        chosen = chosen[np.argsort(draws[chosen])[: self._size]]
        if len(chosen):
            self._kept += zip(draws[chosen].tolist(), rows.take(pa.array(chosen)).to_pylist(), strict=True)
            self._kept.sort(key=lambda each: each[0])
            del self._kept[self._size :]

    def rows(self) -> list[dict[str, Any]]:
        """The sample, in key order."""
        return sorted((row for _, row in self._kept), key=lambda row: (row["key"] or "", row["uri"] or ""))


@dataclass(slots=True)
class Failures:
    """The rows that share a status and an error code."""

    status: str
    code: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    """`key` and `error` of the first few."""


class Digest:
    """All that the page says about the captions, gathered batch by batch."""

    def __init__(self, *, max_images: int, seed: int) -> None:
        self.sample = Sample(max_images, seed)
        self.captions, self.words, self.models = TopCounter(), TopCounter(), TopCounter()
        self.failures: dict[tuple[str, str], Failures] = {}
        self.num_ok = self.num_rows = self.num_bytes = 0
        self.lengths = np.zeros(_LONGEST_CAPTION + 1, np.int64)
        self.confidences = np.zeros(_CONFIDENCE_STEPS, np.int64)
        self.first_at: datetime | None = None
        self.last_at: datetime | None = None

    def add(self, rows: pa.Table) -> None:
        """Take in the next rows."""
        self.num_rows += rows.num_rows
        self.num_bytes += pc.sum(rows["size"]).as_py() or 0
        self.models.add(rows["model_id"])
        times = pc.min_max(rows["captioned_at"]).as_py()
        self.first_at = min(filter(None, (self.first_at, times["min"])), default=None)
        self.last_at = max(filter(None, (self.last_at, times["max"])), default=None)
        is_ok = pc.fill_null(pc.equal(rows["status"], "ok"), False)
        self._add_ok(rows.filter(is_ok))
        self._add_failed(rows.filter(pc.invert(is_ok)))

    def count(self, status: str) -> int:
        """Rows of one status other than ok."""
        return sum(each.count for each in self.failures.values() if each.status == status)

    def _add_ok(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        self.num_ok += rows.num_rows
        self.sample.add(rows)
        self.captions.add(rows["caption"])
        words = pc.utf8_split_whitespace(pc.utf8_lower(pc.fill_null(rows["caption"], "")))
        plain = pc.utf8_trim(pc.list_flatten(words), characters="‘’“”\"'.,;:!?()")
        self.words.add(plain.filter(pc.not_equal(plain, "")))
        lengths = np.asarray(pc.list_value_length(words), np.int64)
        self.lengths += np.bincount(lengths.clip(max=_LONGEST_CAPTION), minlength=len(self.lengths))
        log_probs = np.asarray(rows["log_prob"].cast(pa.float64()).to_numpy())
        confidences = np.exp(log_probs / (lengths + 1))
        steps = (confidences[np.isfinite(confidences)] * _CONFIDENCE_STEPS).astype(np.int64)
        self.confidences += np.bincount(steps.clip(0, _CONFIDENCE_STEPS - 1), minlength=_CONFIDENCE_STEPS)

    def _add_failed(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        rows = pa.table(
            {
                "status": pc.fill_null(rows["status"], "unknown"),
                "code": pc.fill_null(rows["error_code"], ""),
                "key": rows["key"],
                "error": rows["error"],
            }
        )
        for group in rows.group_by(["status", "code"]).aggregate([([], "count_all")]).to_pylist():
            status, code = group["status"], group["code"]
            failures = self.failures.setdefault((status, code), Failures(status, code))
            failures.count += group["count_all"]
            if wanted := _NUM_FAILED_KEYS - len(failures.examples):
                same = rows.filter((pc.field("status") == status) & (pc.field("code") == code))
                failures.examples += same.slice(0, wanted).select(["key", "error"]).to_pylist()


# The images


@dataclass(frozen=True, slots=True)
class Tile:
    """One image of the gallery."""

    row: dict[str, Any]
    """Its row of the output."""
    thumbnail: str = ""
    """JPEG as a data: URI; "" where there is none."""
    width: int = 0
    height: int = 0
    """Of the thumbnail, in pixels."""
    tint: str = ""
    """Average colour, #rrggbb."""
    note: str = ""
    """Why there is no thumbnail, or what is odd about it."""


def _make_tiles(rows: list[dict[str, Any]], s3: S3Options, limits: ImageLimits) -> list[Tile]:
    unreachable: dict[str, str] = {}
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        return list(pool.map(partial(_make_tile, s3=s3, limits=limits, unreachable=unreachable), rows))


def _make_tile(row: dict[str, Any], *, s3: S3Options, limits: ImageLimits, unreachable: dict[str, str]) -> Tile:
    """Fetch and shrink one image. `unreachable` collects the buckets that fail as a whole: each is waited for once."""
    uri = str(row["uri"] or "")
    bucket = uri.split("/")[2] if is_s3(uri) else ""
    with _notes_lock:
        note = unreachable.get(bucket, "")
    if note:
        return Tile(row, note=note)
    try:
        parent, _, name = uri.rpartition("/")
        data = open_store(f"{parent}/", s3).read(name, max_bytes=limits.max_bytes)
        thumbnail = _thumbnail(data, limits)
    except (ObjectNotFoundError, NotFoundError):
        return Tile(row, note="The image is no longer there.")
    except StorageError as error:
        if bucket:
            with _notes_lock:
                unreachable[bucket] = str(error)
        return Tile(row, note=str(error))
    except RaycapError as error:
        return Tile(row, note=str(error))
    buffer = BytesIO()
    thumbnail.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True, progressive=True)
    red, green, blue = np.asarray(thumbnail).mean(axis=(0, 1)).astype(int).tolist()
    return Tile(
        row,
        thumbnail="data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        width=thumbnail.width,
        height=thumbnail.height,
        tint=f"#{red:02x}{green:02x}{blue:02x}",
        note="" if row["size"] in (None, len(data)) else "The file has changed since it was captioned.",
    )


_notes_lock: Final = threading.Lock()


def _thumbnail(data: bytes, limits: ImageLimits) -> Image.Image:
    """The picture, upright, its long side `_THUMBNAIL.size_px`: decoded padded, then the padding cut off."""
    decoded = decode_image(data, _THUMBNAIL, limits)
    size = _THUMBNAIL.size_px
    scale = size / max(decoded.width, decoded.height)
    width, height = max(1, round(decoded.width * scale)), max(1, round(decoded.height * scale))
    left, top = (size - width) // 2, (size - height) // 2
    return Image.fromarray(decoded.pixels_HWC[top : top + height, left : left + width])


# The page


def _render(output: str, summary: dict[str, Any], settings: dict[str, Any], digest: Digest, tiles: list[Tile]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": _bytes_text,
        "count": lambda value: f"{value:,}",
        "csp_hash": lambda text: "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode(),
        "duration": _duration_text,
        "share": _share_text,
        "time": _time_text,
    }
    template = environment.from_string((files("raycap.bulk") / "report.html.j2").read_text(encoding="utf-8"))
    failures = sorted(digest.failures.values(), key=lambda each: (each.status, -each.count, each.code))
    return template.render(
        summary=summary,
        output=output,
        source=summary.get("source") or settings.get("source") or output,
        models=[name for name, _ in digest.models.counts.most_common(3)],
        started_at=summary.get("started_at") or digest.first_at,
        finished_at=summary.get("finished_at") or digest.last_at,
        digest=digest,
        num_failed=digest.num_rows - digest.num_ok - digest.count("skipped"),
        num_skipped=digest.count("skipped"),
        failures=failures,
        tiles=[_tile_view(tile) for tile in tiles],
        lengths=_length_plot(digest.lengths),
        confidences=_confidence_plot(digest.confidences),
        top_captions=[
            (text, count) for text, count in digest.captions.counts.most_common(_NUM_TOP_CAPTIONS) if count > 1
        ],
        top_words=_top_words(digest.words),
        stages=_stages(summary.get("stage_s")),
        settings=json.dumps(settings, indent=2, ensure_ascii=False) if settings else "",
        version=raycap.__version__,
        now=datetime.now(UTC),
    )


def confidence(caption: str | None, log_prob: float | None) -> float | None:
    """Geometric mean of the model's probabilities of the caption's words and its end: exp(log_prob / tokens)."""
    if log_prob is None or not math.isfinite(log_prob):
        return None
    return min(1.0, math.exp(log_prob / (len((caption or "").split()) + 1)))


def _tile_view(tile: Tile) -> dict[str, Any]:
    row = tile.row
    others = row["alternatives"] or []
    return {
        "tile": tile,
        "row": row,
        "confidence": confidence(row["caption"], row["log_prob"]),
        "alternatives": [(each["caption"], confidence(each["caption"], each["log_prob"])) for each in others],
    }


def _top_words(words: TopCounter) -> list[tuple[str, int, float]]:
    """Word, count and the count's share of the first one's."""
    content = Counter({word: count for word, count in words.counts.items() if word not in _STOPWORDS})
    top = content.most_common(_NUM_TOP_WORDS)
    return [(word, count, count / top[0][1]) for word, count in top]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a plot. Positions are shares of the plot's width, from 0 to 1."""

    left: float
    width: float
    height: float
    """Share of the tallest bar."""
    label: str
    """What it counts and how many, for the pointer and for screen readers."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A histogram, ready to draw."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    median: str


def _length_plot(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> Plot | None:
    """Captions by their number of words, from the shortest to the longest that occur."""
    if not lengths.any():
        return None
    present = np.flatnonzero(lengths)
    low, high = max(0, int(present[0]) - 1), int(present[-1]) + 1
    names = {n: f"{n}+" if n == _LONGEST_CAPTION else str(n) for n in range(low, high + 1)}
    counts = [int(lengths[n]) if n < len(lengths) else 0 for n in names]
    bars = _bars(counts, [f"{name} word{'' if name == '1' else 's'}" for name in names.values()])
    every = math.ceil(len(names) / 12)
    ticks = [((n - low + 0.5) / len(names), name) for n, name in names.items() if (n - low) % every == 0]
    return Plot(bars, ticks, f"{_median(lengths)} words")


def _confidence_plot(fine: np.ndarray[Any, np.dtype[np.int64]]) -> Plot | None:
    """Captions by their confidence, from 0 to 1."""
    if not fine.any():
        return None
    counts = fine.reshape(_CONFIDENCE_BARS, -1).sum(axis=1).tolist()
    names = [f"confidence {i / _CONFIDENCE_BARS:.2f} to {(i + 1) / _CONFIDENCE_BARS:.2f}" for i in range(len(counts))]
    ticks = [(i / 5, f"{i / 5:.1f}") for i in range(6)]
    return Plot(_bars(counts, names), ticks, f"{(_median(fine) + 0.5) / _CONFIDENCE_STEPS:.2f}")


def _bars(counts: list[int], names: list[str]) -> list[Bar]:
    total, tallest, width = sum(counts), max(counts), 1 / len(counts)
    return [
        Bar(i * width, width, count / tallest, f"{name}: {count:,} ({_share_text(count, total)})")
        for i, (count, name) in enumerate(zip(counts, names, strict=True))
    ]


def _median(histogram: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    """The bin that holds the median."""
    return int(np.searchsorted(np.cumsum(histogram), histogram.sum() / 2))


def _stages(stage_s: Any) -> list[tuple[str, float, float, float]]:
    """Name, seconds, where its part of the bar starts, and its share."""
    if not isinstance(stage_s, dict):
        return []
    times = {
        str(name): float(value) for name, value in stage_s.items() if isinstance(value, (int, float)) and value >= 0
    }
    total = sum(times.values())
    stages, left = [], 0.0
    for name, seconds in times.items() if total else ():
        stages.append((name, seconds, left, seconds / total))
        left += seconds / total
    return stages


def _bytes_text(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} PB"


def _duration_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def _share_text(part: float, whole: float) -> str:
    """A percentage that is 0 only for nothing and 100 only for everything."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "< 0.1%"
    if 99.9 < percent < 100:
        return "> 99.9%"
    return f"{percent:.0f}%" if percent >= 10 or percent == 0 else f"{percent:.1f}%"


def _time_text(value: datetime | str) -> str:
    """To the minute, in UTC. What is no time is shown as it is."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        return str(value)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
