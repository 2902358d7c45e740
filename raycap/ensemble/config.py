"""The settings of an ensemble."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from raycap.model.config import DecodingConfig, WeightsDtype, require
from raycap.storage import S3Options


@dataclass(frozen=True, kw_only=True, slots=True)
class EnsembleConfig:
    """Make one bundle of several: in each step of the search it takes the mean of their words' probabilities.

    The bundles must share their words and their preprocessing. Equal encoders are stored, and run, once.
    """

    output: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="OUTPUT")]]
    """Where the bundle goes: a directory or s3:// prefix."""
    models: tuple[str, ...]
    """Bundles to join, local or s3://; each a single model."""
    beam_size: int | None = None
    """Beams; by default the first bundle's setting."""
    length_penalty: float | None = None
    """Length penalty of the beam search; by default the first bundle's setting."""
    weights_dtype: WeightsDtype = "float32"
    """float16 halves the bundle."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        require(bool(self.output), "OUTPUT must name a directory or s3:// prefix")
        require(len(self.models) >= 2, f"--models must name at least two bundles, got {len(self.models)}")
        DecodingConfig().updated(**self.decoding_overrides)

    @property
    def decoding_overrides(self) -> dict[str, int | float | None]:
        """Fields of `DecodingConfig` that were asked for; None where not."""
        return {"beam_size": self.beam_size, "length_penalty": self.length_penalty}
