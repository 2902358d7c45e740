"""Bytes in, captions out: the one door to the model that the bulk job, the endpoint and the evaluation share.

Knows nothing of Ray. Device, precision and engine are chosen once, when it is made.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raycap.errors import ConfigurationError
from raycap.images import ImageLimits, decode_image
from raycap.model.beam import Hypothesis
from raycap.model.bundle import Bundle
from raycap.model.config import DecodingConfig, Engine, Precision
from raycap.model.engine import use_engine
from raycap.storage import S3Options


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another caption of the same image."""

    text: str
    log_prob: float


@dataclass(frozen=True, slots=True)
class Caption:
    """The caption of one image."""

    text: str
    """Lower-case words separated by spaces."""
    log_prob: float
    """Natural logarithm of the caption's probability under the model, its end included."""
    alternatives: tuple[Alternative, ...]
    """The other beams, best first (by length-normalised score); all texts differ."""


class Captioner:
    """A model on a device, ready to caption."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        engine: Engine = "auto",
        decoding: DecodingConfig | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        """
        Args:
            device: auto (a GPU if there is one), cpu, cuda, cuda:N or mps.
            precision: of the encoder and decoder arithmetic. auto: float32 on a CPU, bfloat16 on a GPU that has it.
            engine: what runs the encoder. auto: ONNX Runtime in float32 on a CPU, if it is installed, else PyTorch.
                The captions are the same. onnx runs as many threads as PyTorch has now.
            decoding: how to search; by default as the bundle says.
            limits: of the files that `prepare` accepts.

        Raises ConfigurationError if the device, precision or engine is not to be had.
        """
        self.device = _device(device)
        self.dtype = _dtype(precision, self.device)
        self.decoding = decoding or bundle.decoding
        self.preprocessing = bundle.preprocessing
        self.limits = limits or ImageLimits()
        self.model_id = bundle.model_id
        self._vocabulary = bundle.vocabulary
        # A copy: the bundle stays as it is, whatever device, precision and engine this captioner takes.
        self.network = copy.deepcopy(bundle.network)
        size_px = self.preprocessing.size_px
        self.engine = use_engine(self.network, engine, size_px=size_px, device=self.device, dtype=self.dtype)

    @classmethod
    def load(
        cls,
        location: str | None = None,
        *,
        s3: S3Options | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        engine: Engine = "auto",
        **overrides: int | float | bool | None,
    ) -> Captioner:
        """From a bundle's location, or the shipped bundle.

        `overrides` replace fields of its `DecodingConfig`; None keeps them.
        """
        bundle = Bundle.load(location, s3=s3)
        decoding = bundle.decoding.updated(**overrides)
        return cls(bundle, device=device, precision=precision, engine=engine, decoding=decoding)

    def prepare(self, data: bytes) -> Tensor:
        """An image file's bytes as RGB pixels: uint8 [size, size, 3]. Raises ImageError, and nothing else."""
        return torch.from_numpy(decode_image(data, self.preprocessing, self.limits).pixels_HWC)

    @torch.inference_mode()
    def caption(self, pixels: Tensor | Sequence[Tensor]) -> list[Caption]:
        """Captions of prepared images: uint8 [B, size, size, 3], or a sequence of B tensors [size, size, 3].

        The caption of an image does not depend on the others in its batch (up to rounding in the last bits, which
        matters only when two captions are as good as equal). Raises ValueError for pixels of another type or shape.
        """
        if len(pixels) == 0:
            return []
        return [self._to_caption(of_image) for of_image in self.network.search(self._batch(pixels), self.decoding)]

    def caption_array(self, pixels_BHWC: np.ndarray) -> list[Caption]:
        """`caption` of a NumPy array, uint8 [B, size, size, 3]."""
        if pixels_BHWC.dtype != np.uint8:
            raise ValueError(f"expected uint8 pixels, got {pixels_BHWC.dtype} {list(pixels_BHWC.shape)}")
        # Arrays out of Ray's object store are read-only, which torch does not know; it warns of them.
        return self.caption(torch.from_numpy(np.require(pixels_BHWC, requirements=["C", "W"])))

    @torch.inference_mode()
    def attention(self, pixels: Tensor | Sequence[Tensor], captions: Sequence[str]) -> list[np.ndarray] | None:
        """Where the model looks in each prepared image for each word of its caption; None if it has no attention.

        One array for each image, float32 [words + 1, rows, cols]: weights over the encoder's grid that sum to 1, for
        the words that `tokenize` finds in the caption, in order, and then for the caption's end. Any caption can be
        asked about; words that the model does not know are read as <unk>. Raises ValueError for pixels of another type
        or shape, or another number of captions.
        """
        if len(pixels) != len(captions):
            raise ValueError(f"expected one caption for each image, got {len(pixels)} images, {len(captions)} captions")
        if len(pixels) == 0:
            return []
        tokens = [self._vocabulary.encode(caption)[1:-1] for caption in captions]
        weights = self.network.attend(self._batch(pixels), tokens)
        return None if weights is None else [weights_TRC.cpu().numpy() for weights_TRC in weights]

    def _batch(self, pixels: Tensor | Sequence[Tensor]) -> Tensor:
        """The pixels as one tensor on the device. Raises ValueError for those of another type or shape."""
        size = self.preprocessing.size_px
        batches = [pixels] if isinstance(pixels, Tensor) else [image[None] for image in pixels]
        for each in batches:
            if each.dtype != torch.uint8 or each.shape[1:] != (size, size, 3):
                raise ValueError(
                    f"expected uint8 pixels [B, {size}, {size}, 3] or B tensors [{size}, {size}, 3] from prepare(), "
                    f"got {each.dtype} {list(pixels.shape if isinstance(pixels, Tensor) else each.shape[1:])}"
                )
        pixels_BHWC = torch.cat(batches) if len(batches) > 1 else batches[0]
        if self.device.type == "cuda":  # copies from other memory are not asynchronous
            pixels_BHWC = pixels_BHWC.pin_memory()
        return pixels_BHWC.to(self.device, non_blocking=True)

    def _to_caption(self, hypotheses: list[Hypothesis]) -> Caption:
        best, *others = (Alternative(self._vocabulary.decode(h.tokens), h.log_prob) for h in hypotheses)
        return Caption(best.text, best.log_prob, tuple(others))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"device {name!r} is not available here: {str(error).splitlines()[0]}; use --device cpu"
        ) from error
    return device


def auto_dtype(device: torch.device) -> torch.dtype:
    """The arithmetic that suits a device best."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return auto_dtype(device)
    if precision not in ("float32", "bfloat16", "float16"):
        raise ConfigurationError(f"precision must be auto, float32, bfloat16 or float16, got {precision!r}")
    if precision == "float16" and device.type == "cpu":
        raise ConfigurationError("float16 needs a GPU; on a CPU use --precision float32")
    dtype: torch.dtype = getattr(torch, precision)
    return dtype
