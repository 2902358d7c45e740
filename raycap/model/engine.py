"""What runs the encoder: PyTorch, PyTorch compiled, or ONNX Runtime. The decoder and its search stay with PyTorch."""

from __future__ import annotations

import copy
import logging
from typing import get_args

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from raycap.errors import ConfigurationError
from raycap.model.config import Engine, require
from raycap.model.encoder import Encoder
from raycap.model.engine_onnx import is_installed, onnx_encoder
from raycap.model.engine_trial import Trial, first_line
from raycap.model.ensemble import EnsembleNetwork
from raycap.model.network import CaptionNetwork

log = logging.getLogger(__name__)


def use_engine(
    network: CaptionNetwork | EnsembleNetwork, engine: Engine, *, size_px: int, device: torch.device, dtype: torch.dtype
) -> Engine:
    """Move a network to `device` and `dtype` and let `engine` run its encoders, for inference alone.

    Gives the engine in use: auto is onnx in float32 on a CPU where ONNX Runtime is installed, and torch elsewhere or
    where onnx fails. Raises ConfigurationError if the engine that was asked for by name cannot run the encoders.
    """
    require(engine in get_args(Engine), f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")
    network.to("cpu", torch.float32).eval()
    suits_onnx = device.type == "cpu" and dtype == torch.float32
    require(engine != "onnx" or suits_onnx, "engine onnx computes in float32 on a CPU; elsewhere use --engine auto")
    encoders = [network.encoder] if isinstance(network, CaptionNetwork) else network.encoders
    trials = [Trial(encoder, size_px) for encoder in encoders]
    in_use: Engine = engine
    if engine == "auto":
        in_use = "onnx" if suits_onnx and is_installed() else "torch"
        if suits_onnx and in_use == "torch":
            log.info("PyTorch runs the encoder, which takes longer than ONNX Runtime would: pip install 'raycap[onnx]'")
    if in_use == "onnx":
        try:
            fast: list[Encoder] = [onnx_encoder(*each) for each in zip(encoders, trials, strict=True)]
        except ConfigurationError as error:
            if engine == "onnx":
                raise
            log.warning("PyTorch runs the encoder, which takes longer than ONNX Runtime would: %s", error)
            in_use = "torch"
    if in_use != "onnx":
        fast = [_folded(*each).to(device, dtype) for each in zip(encoders, trials, strict=True)]
    if in_use == "compile":
        for each in zip(fast, trials, strict=True):
            _compile(*each)
    if isinstance(network, CaptionNetwork):
        network.encoder = fast[0]
    else:
        network.encoders = nn.ModuleList(fast)  # type: ignore[assignment]
    network.to(device, dtype)
    return in_use


def _folded(encoder: Encoder, trial: Trial) -> Encoder:
    """The encoder with its batch normalisation in its convolutions, where that gives the same features."""
    folded = copy.deepcopy(encoder)
    try:
        _fold(folded)
        trial.check(folded)
    except Exception as error:  # of a backbone that asks for the layers that are gone; as it was, it still works
        log.debug("the batch normalisation of encoder %s stays: %s", encoder.config.name, error)
        return encoder
    return folded


def _fold(module: nn.Module) -> None:
    """Fold each batch normalisation into the convolution listed before it, which is most likely the one it follows."""
    previous_name, previous = "", module
    for name, child in list(module.named_children()):
        if (
            isinstance(previous, nn.Conv2d)
            and isinstance(child, nn.BatchNorm2d)
            and previous.out_channels == child.num_features
        ):
            setattr(module, previous_name, fuse_conv_bn_eval(previous, child))
            setattr(module, name, getattr(child, "act", nn.Identity()))  # timm's normalisation holds the activation
        else:
            _fold(child)
        previous_name, previous = name, child


def _compile(encoder: Encoder, trial: Trial) -> None:
    """Compile in place. Inductor keeps what it made on disk, so that other processes find it."""
    encoder.compile(options={"freezing": True})
    # The number of images alone varies: with dynamic=True, sizes do too, and compiling takes over ten times as long.
    # For one image the compiler makes code of its own; now, so that no later batch waits for it.
    pixels_BHWC = trial.pixels_BHWC.to(encoder.mean.device)
    torch._dynamo.mark_dynamic(pixels_BHWC, 0)
    try:
        with torch.inference_mode():
            encoder(pixels_BHWC)  # compiles, as the first call does
            encoder(pixels_BHWC[:1])
        trial.check(encoder)
    except Exception as error:  # the compiler has many classes of errors, and some come from g++ or Triton
        raise ConfigurationError(
            f"engine compile cannot run encoder {encoder.config.name}: {first_line(error)}; it needs a compiler, "
            "such as g++; or use --engine auto"
        ) from error
