"""The settings of the bulk job and its report. Plain data: no torch and no Ray here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from raycap.errors import object_error_codes
from raycap.images import ImageLimits
from raycap.model.config import Engine, require
from raycap.storage import S3Options

Source = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
Format = Literal["parquet", "jsonl", "coco", "webdataset"]
Output = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUTPUT")]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which objects of the source are captioned. The others get no row; they are counted."""

    include: tuple[str, ...] = ()
    """Glob patterns; keys must match one: * and ? stop at /, ** does not. A pattern without / is for the file name."""
    exclude: tuple[str, ...] = ()
    """Glob patterns, as for --include; keys that match one are left out."""
    min_size: int = 0
    """Leave out smaller objects; bytes. Objects of unknown size stay."""
    max_size: int | None = None
    """Leave out larger objects; bytes."""
    sample: float = 1.0
    """Share of the objects to take, chosen by a hash of key and seed: the same ones each time."""
    seed: int = 0
    """Of --sample."""
    limit: int | None = None
    """Take only the first N of what is left."""
    all_files: bool = False
    """Try every object. By default, those named otherwise (.txt, .mp4 ...) become rows with status skipped."""
    root: str | None = None
    """Where relative keys of a manifest start; by default the manifest's folder."""

    def __post_init__(self) -> None:
        require(0 < self.sample <= 1, f"--sample is a share above 0 and up to 1, got {self.sample:g}")
        require(self.limit is None or self.limit >= 1, f"--limit must be at least 1, got {self.limit}")
        require(self.min_size >= 0, f"--min-size must not be negative, got {self.min_size}")
        require(
            self.max_size is None or self.max_size >= self.min_size,
            f"--max-size must be at least --min-size, got {self.max_size}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """Caption every image of a directory, an s3:// prefix or a list. The same command again goes on where a run was
    stopped."""

    source: Source
    """Directory, image file, s3://bucket/prefix, or a manifest: a list of objects (.parquet, .csv, .tsv, .txt, .jsonl)
    or the manifest.json of an S3 Inventory."""
    output: Output
    """Directory or s3://bucket/prefix for captions/*.parquet, summary.json and report.html."""

    update: bool = False
    """List the source again and caption what is new or has another etag; rows of objects that have gone are dropped."""
    retry_failed: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[CODE ...]")] = None
    """Try failed objects again: all, or those with these error codes."""
    selection: Annotated[Selection, tyro.conf.OmitArgPrefixes] = field(default_factory=Selection)

    model: str | None = None
    """Bundle, local or s3://; by default the one that ships with raycap."""
    beam_size: int | None = None
    """Beams an image, and so captions; by default the bundle's setting."""
    length_penalty: float | None = None
    """Length penalty of the beam search; by default the bundle's setting."""
    max_length: int | None = None
    """Longest caption in words; by default the bundle's setting."""
    batch_size: int = 32
    """Images captioned at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to caption. auto: on GPUs if the cluster has any."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model's arithmetic. auto: float32 on a CPU, bfloat16 on a GPU that has it."""
    engine: Engine = "auto"
    """What runs the encoder; the captions are the same. auto: onnx on a CPU if it is installed, else torch."""

    max_bytes: int = ImageLimits().max_bytes
    """Larger files are not fetched: their rows say too_large."""
    max_pixels: int = ImageLimits().max_pixels
    """Images of more pixels are not decoded: their rows say too_large."""
    max_failed: float = 0.05
    """Share of failed rows up to which the exit code is 0; above it, 1."""

    num_actors: int | None = None
    """Captioning actors; by default one for each GPU, or for each --cpus-per-actor cores."""
    max_actors: int | None = None
    """Let their number grow up to this while work is waiting and the cluster, which may itself grow, has room."""
    gpus_per_actor: float | None = None
    """GPUs of each actor, fractions allowed; by default 1 if the cluster has GPUs, else 0."""
    cpus_per_actor: int | None = None
    """Threads of each actor that has no GPU; by default 1, or 4 on clusters of 16 cores and more."""
    num_cpus_per_fetch: float | None = None
    """CPU cores that are reserved for each task that fetches and decodes, fractions allowed; so it also says how many
    there are. By default 1 beside GPUs, 0.25 beside actors on CPUs."""
    requests_in_flight: int = 16
    """Objects that each fetching task asks for at a time."""
    max_stall_s: float = 3600.0
    """End the run with exit code 70 when nothing was captioned for so long, as where Ray waits for what it has lost;
    seconds. The same command goes on."""
    ray_address: str | None = None
    """Ray cluster to run on; by default RAY_ADDRESS, else Ray starts on this machine."""

    format: Format = "parquet"
    """Write the captions in this form too, into a folder of that name; captions/ is always Parquet."""
    file_size_mb: float = 128
    """Size to aim at for each output file, in MB."""
    report: bool = True
    """Write report.html with a sample of the images."""
    show: int = 20
    """Captions to print at the end."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "requests_in_flight",
            "max_bytes",
            "max_pixels",
            "num_actors",
            "max_actors",
            "cpus_per_actor",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        require(
            self.gpus_per_actor is None or self.gpus_per_actor >= 0,
            f"--gpus-per-actor must not be negative, got {self.gpus_per_actor}",
        )
        gpus = self.gpus_per_actor or 0
        require(gpus <= 1 or gpus == int(gpus), f"--gpus-per-actor above 1 must be a whole number, got {gpus:g}")
        cpus = self.num_cpus_per_fetch
        require(cpus is None or cpus > 0, f"--num-cpus-per-fetch must be above 0, got {cpus}")
        require(
            self.max_actors is None or self.max_actors >= (self.num_actors or 1),
            f"--max-actors must be at least --num-actors, got {self.max_actors}",
        )
        require(self.max_stall_s > 0, f"--max-stall-s must be above 0, got {self.max_stall_s:g}")
        require(self.file_size_mb > 0, f"--file-size-mb must be above 0, got {self.file_size_mb:g}")
        limit = self.selection.limit
        require(not (self.update and limit), "an output of --limit cannot be updated: caption into another one")
        codes = object_error_codes()
        unknown = ", ".join(sorted(set(self.retry_failed or ()) - codes))
        require(not unknown, f"--retry-failed: {unknown} is no error code; there are {', '.join(sorted(codes))}")
        require(0 <= self.max_failed <= 1, f"--max-failed is a share from 0 to 1, got {self.max_failed}")
        require(self.show >= 0, f"--show must not be negative, got {self.show}")

    @property
    def limits(self) -> ImageLimits:
        """What one file may cost."""
        return ImageLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)

    @property
    def decoding_overrides(self) -> dict[str, int | float | None]:
        """Fields of the bundle's `DecodingConfig` to replace; None keeps them."""
        return {"beam_size": self.beam_size, "length_penalty": self.length_penalty, "max_length": self.max_length}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write report.html of an output of `raycap caption`: a gallery, the failures, plots; one file by itself."""

    output: Output
    """Directory or s3:// prefix that `raycap caption` wrote to."""
    max_images: int = 200
    """Images in the gallery, chosen at random."""
    seed: int = 0
    """Of the choice."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        require(self.max_images >= 0, f"--max-images must not be negative, got {self.max_images}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusConfig:
    """How far a run is, at what rate, when it will end, what fails most; works while it runs and after it died."""

    output: Output
    """Directory or s3:// prefix that `raycap caption` writes to."""
    json: bool = False
    """Print JSON."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write the captions of a finished output in another format, beside captions/. Nothing is captioned again."""

    output: Output
    """Directory or s3:// prefix that `raycap caption` wrote to."""
    format: Format
    """jsonl: a JSON object a line. coco: results.json and images.json. webdataset: tar shards of images, captions and
    rows. parquet: captions/ cut anew. Each goes into the folder of its name."""
    partition_by: Literal["status", "model_id", "folder"] | None = None
    """With --format parquet: a folder for each value, as in status=ok/. folder: the first part of the key."""
    file_size_mb: float = 128.0
    """About how large each file becomes, in MB; not of coco, which is one document."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        require(self.file_size_mb > 0, f"--file-size-mb must be above 0, got {self.file_size_mb:g}")
        require(
            self.partition_by is None or self.format == "parquet",
            f"--partition-by is for --format parquet, not {self.format}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What captioning a source would take: objects, bytes, hours, cost. Captions a small sample on this machine and
    writes nothing."""

    source: Source
    """As for `raycap caption`."""
    selection: Annotated[Selection, tyro.conf.OmitArgPrefixes] = field(default_factory=Selection)
    model: str | None = None
    """Bundle, local or s3://; by default the one that ships with raycap."""
    num_samples: int = 64
    """Images to fetch and caption, drawn at random from those that were listed."""
    max_list: int = 1_000_000
    """Stop listing after so many objects: then the numbers are for these, or for --num-objects."""
    num_objects: int | None = None
    """How many objects there are, where that is known better: the listed ones then count as a sample of them."""
    num_cpus: int | None = None
    """CPU cores of the cluster; by default those of this machine."""
    num_gpus: int = 0
    """GPUs of the cluster."""
    gpu_images_per_s: float | None = None
    """Images a second that one of these GPUs captions; by default as measured, if this machine has one."""
    within_hours: float | None = None
    """Say how many nodes of --cpus-per-node and --gpus-per-node caption everything in this time."""
    cpus_per_node: int | None = None
    """CPU cores of such a node; by default those of this machine."""
    gpus_per_node: int = 0
    """GPUs of such a node."""
    price_per_hour: float | None = None
    """Of the whole cluster, in any currency."""
    price_per_1000_gets: float = 0.0004
    """Of GET requests; the default is that of S3 Standard in us-east-1, in dollars."""
    price_per_1000_puts: float = 0.005
    """Of PUT and LIST requests."""
    json: bool = False
    """Print JSON."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_list", "num_objects", "num_cpus", "cpus_per_node"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("gpu_images_per_s", "within_hours"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name.replace('_', '-')} must be above 0, got {value}")
        for name in ("num_gpus", "gpus_per_node", "price_per_hour", "price_per_1000_gets", "price_per_1000_puts"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"--{name.replace('_', '-')} must not be negative, got {value}")
