"""The settings of the bulk job, its report and its benchmark. Plain data: no torch and no Ray here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from raycap.images import ImageLimits
from raycap.model.config import require
from raycap.storage import S3Options

Source = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
Output = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUTPUT")]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionConfig:
    """Caption every image of a directory or an s3:// prefix. The same command again goes on where a run was stopped."""

    source: Source
    """Directory, image file or s3://bucket/prefix."""
    output: Output
    """Directory or s3://bucket/prefix for captions/*.parquet, summary.json and report.html."""

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

    all_files: bool = False
    """Try every object. By default, those named otherwise (.txt, .mp4 ...) become rows with status skipped."""
    max_bytes: int = ImageLimits().max_bytes
    """Larger files are not fetched: their rows say too_large."""
    max_pixels: int = ImageLimits().max_pixels
    """Images of more pixels are not decoded: their rows say too_large."""
    max_failed: float = 0.05
    """Share of failed rows up to which the exit code is 0; above it, 1."""

    num_actors: int | None = None
    """Captioning actors; by default one for each GPU, or for each --cpus-per-actor cores."""
    gpus_per_actor: float | None = None
    """GPUs of each actor, fractions allowed; by default 1 if the cluster has GPUs, else 0."""
    cpus_per_actor: int | None = None
    """Threads of each actor that has no GPU; by default 1, or 4 on clusters of 16 cores and more."""
    requests_in_flight: int = 16
    """Objects that each fetching task asks for at a time."""
    rows_per_file: int = 100_000
    """Rows of each file in captions/."""
    ray_address: str | None = None
    """Ray cluster to run on; by default RAY_ADDRESS, else Ray starts on this machine."""

    report: bool = True
    """Write report.html with a sample of the images."""
    show: int = 20
    """Captions to print at the end."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "requests_in_flight",
            "rows_per_file",
            "max_bytes",
            "max_pixels",
            "num_actors",
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
class BenchmarkConfig:
    """Images/s of the bulk job over those of a tight loop around the same model on bytes in memory, in one run."""

    source: Source
    """Directory or s3:// prefix of images."""
    model: str | None = None
    """Bundle, local or s3://; by default the one that ships with raycap."""
    num_images: int = 256
    """Images of the tight loop, the first of the source."""
    batch_size: int = 32
    """Images captioned at a time, in both."""
    output: str | None = None
    """JSON file for the numbers."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        require(self.num_images >= 1, f"--num-images must be at least 1, got {self.num_images}")
        require(self.batch_size >= 1, f"--batch-size must be at least 1, got {self.batch_size}")
