"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from raycap.errors import ConfigurationError
from raycap.model.config import Engine
from raycap.storage import S3Options


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Score captions with the official COCO metrics: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr-D."""

    annotations: str
    """COCO captions JSON with the reference captions, local or s3://; or a Karpathy JSON with its split, such as
    dataset_coco.json#test."""
    images: str | None = None
    """Directory or s3:// prefix of the images, to caption and score them."""
    results: str | None = None
    """COCO results JSON to score, instead of --images."""
    model: str | None = None
    """Bundle to caption with; by default the one that ships with raycap."""
    output: str | None = None
    """JSON file for the scores, those of each image among them; NAME.csv: one row for each image."""
    results_output: str | None = None
    """COCO results JSON file for the captions that were made of --images."""
    report: str | None = None
    """HTML file for the scores and the best and worst images, with what the model looked at for each word."""
    report_images: int = 24
    """Best images on the page, and as many of the worst."""
    tokenizer: Literal["auto", "ptb", "python"] = "auto"
    """ptb: the official tokenizer, needs Java. python: close to it, without Java. auto: ptb if Java is there."""
    beam_size: int | None = None
    """Beams; by default the bundle's setting."""
    length_penalty: float | None = None
    """Length penalty of the beam search; by default the bundle's setting."""
    batch_size: int = 32
    """Images captioned at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    engine: Engine = "auto"
    """What runs the encoder; the captions are the same. auto: onnx on a CPU if it is installed, else torch."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        if (self.images is None) == (self.results is None):
            raise ConfigurationError(
                "give either --images (to caption and score them) or --results (to score captions), and not both"
            )
        if self.results_output and self.results:
            raise ConfigurationError(
                "--results-output goes with --images: with --results there are no new captions to write"
            )
        files = [self.annotations, self.results, self.output, self.results_output, self.report]
        given = [file for file in files if file]
        if twice := next((file for file in given if given.count(file) > 1), None):
            raise ConfigurationError(f"{twice} is given twice; each file that is read or written needs its own name")
        if self.report_images < 1:
            raise ConfigurationError(f"--report-images must be at least 1, got {self.report_images}")
        if self.batch_size < 1:
            raise ConfigurationError(f"--batch-size must be at least 1, got {self.batch_size}")
