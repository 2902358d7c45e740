"""The settings of the benchmark. Plain data: no torch and no Ray here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import tyro

from raycap.model.config import Engine, Precision, require
from raycap.storage import S3Options

Part = Literal["decode", "encode", "search", "path", "bulk", "serve"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """How fast each stage captions on this machine, alone, in one loop and in the bulk job, on the same images."""

    sources: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE [SOURCE ...]")]]
    """Directories or s3:// prefixes of images. All parts but bulk take their images from the first, into memory; bulk
    captions each of them."""
    parts: tuple[Part, ...] = PARTS
    """decode: JPEG to pixels on one core. encode: the CNN alone. search: captions of ready features. path: all three in
    one loop over files in memory. bulk: raycap caption. serve: raycap serve, asked over HTTP; needs raycap[serve]."""
    model: str | None = None
    """Bundle, local or s3://; by default the one that ships with raycap."""
    num_images: int = 256
    """Images of all parts but bulk, the first of the first source that can be read."""
    num_bulk_images: int | None = None
    """Images of each bulk run, the first of its source; by default all. Few say little: 1,000 and more are useful."""
    serve_s: float = 15.0
    """Seconds of each load on the endpoint: at saturation, and at 50%, 80% and 150% of what that gave."""
    repeats: int = 3
    """Rounds. Each round measures everything once, so that what else the machine does hits all alike."""
    batch_size: int = 32
    """Images captioned at a time, where the table names no other number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to caption. auto: on a GPU if there is one."""
    precision: Precision = "auto"
    """Of the model's arithmetic. auto: float32 on a CPU, bfloat16 on a GPU that has it."""
    engine: Engine = "auto"
    """What runs the encoder, as for `raycap caption`. Measured beside it: engine torch, and PyTorch with the network as
    it is."""
    output: str | None = None
    """JSON file for the numbers, local or s3://."""
    report: str | None = None
    """HTML file for the numbers, with a chart."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        require(len(self.sources) >= 1, "give at least one SOURCE: a directory or s3:// prefix of images")
        require(len(set(self.sources)) == len(self.sources), "a SOURCE is given twice")
        require(len(self.parts) >= 1, f"--parts needs at least one of {', '.join(PARTS)}")
        for name in ("num_images", "num_bulk_images", "repeats", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        require(self.serve_s > 0, f"--serve-s must be above 0, got {self.serve_s:g}")
        require(self.output is None or self.output != self.report, "--output and --report need a file each")
