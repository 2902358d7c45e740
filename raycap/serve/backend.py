"""What the endpoint asks of a model, in this process or behind a handle of Ray Serve. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from raycap.images import Box, Preprocessing
from raycap.model.config import DecodingConfig
from raycap.serve.schemas import Options

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What must be known of a model before it is asked."""

    model_id: str
    preprocessing: Preprocessing
    decoding: DecodingConfig


class ModelChangedError(Exception):
    """The pixels were prepared for another model than the one that was asked: prepare them again."""

    def __init__(self, info: ModelInfo) -> None:
        super().__init__(info)
        self.info = info
        """Of the model that refused. (Ray's twin of this error has it too, but other `args`.)"""


class Job(NamedTuple):
    """One image to caption, and how."""

    pixels_HWC: Array
    options: Options


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a model says of one image."""

    captions: tuple[tuple[str, float], ...]
    """Texts with their log-probabilities, the best first."""
    attention_TRC: Array | None
    """float32 [words, rows, columns], if it was asked for and the model has attention."""
    model_id: str
    queue_s: float
    """Seconds until the model took it."""
    model_s: float
    """Seconds that its batch took."""
    batch_size: int
    """Images of that batch."""
    box: Box = (0.0, 0.0, 1.0, 1.0)
    """What of the picture it saw; who decoded the picture says so."""


class Backend(Protocol):
    """A model that answers."""

    async def info(self) -> ModelInfo:
        """What it is now; another model may take its place between two calls."""

    async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
        """A result for each image, uint8 [B, size, size, 3], decoded with `preprocessing`.

        When the caller is cancelled, images that wait are not captioned. Raises ModelChangedError for pixels of another
        preprocessing than the model's, and ProblemError where it cannot answer now.
        """
