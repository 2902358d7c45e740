"""Whether another way to run an encoder gives the same features.

Shapes: B images, H x W pixels, P grid cells, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycap.errors import ConfigurationError
from raycap.model.encoder import Encoder

TOLERANCE = 1e-3
"""Largest error of a feature, as a share of the largest feature. Measured with EfficientNet-Lite0 in float32 on a CPU:
4e-6."""
TF32_TOLERANCE = 0.03
"""The same in float32 on GPUs, whose convolutions may round as TensorFloat-32 does. Measured with inputs and weights of
all convolutions rounded so, EfficientNet-Lite0: 0.011."""
LOW_PRECISION_TOLERANCE = 0.3
"""The same in bfloat16 and float16. Measured in bfloat16: 0.11."""


class Trial:
    """Three pictures, and the features that a plain encoder of float32 makes of them on the CPU."""

    @torch.inference_mode()
    def __init__(self, encoder: Encoder, size_px: int) -> None:
        self.pixels_BHWC = _pictures(size_px)
        self.expected_BPC = encoder(self.pixels_BHWC)

    @torch.inference_mode()
    def check(self, encoder: Encoder) -> None:
        """Raise ConfigurationError unless `encoder`, on whatever device and in whatever precision, gives them too."""
        device, dtype = encoder.mean.device, encoder.mean.dtype
        features_BPC: Tensor = encoder(self.pixels_BHWC.to(device)).to("cpu", torch.float32)
        if features_BPC.shape != self.expected_BPC.shape:
            raise ConfigurationError(
                f"expected features {list(self.expected_BPC.shape)}, got {list(features_BPC.shape)}"
            )
        share = tolerance(device, dtype)
        largest = float(self.expected_BPC.abs().max())
        error = float((features_BPC - self.expected_BPC).abs().max())
        if not error <= share * largest:  # NaN too
            raise ConfigurationError(
                f"features differ from PyTorch's by {error:.2g}, more than {share:g} of the largest, {largest:.2g}"
            )


def tolerance(device: torch.device, dtype: torch.dtype) -> float:
    """How far a feature may be off, as a share of the largest."""
    if dtype != torch.float32:
        return LOW_PRECISION_TOLERANCE
    return TOLERANCE if device.type == "cpu" else TF32_TOLERANCE


def _pictures(size_px: int) -> Tensor:
    """Coloured squares, the same each time: they differ more for an encoder than noise does."""
    squares_BHWC = torch.randint(0, 256, (3, 7, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cell = torch.arange(size_px) * 7 // size_px
    return squares_BHWC[:, cell][:, :, cell]


def first_line(error: Exception) -> str:
    """Of its message: compilers and exporters write pages."""
    return next(iter(str(error).splitlines()), type(error).__name__)
