"""An encoder run by ONNX Runtime on the CPU, and the cache of what PyTorch exported for it.

The cache is $RAYCAP_CACHE_DIR/engines, else $XDG_CACHE_HOME/raycap/engines, else ~/.cache/raycap/engines. Its files may
be deleted at any time, and none is believed before it has passed a trial.

Shapes: B images, H x W pixels, P grid cells, C channels.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import logging
import os
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycap.errors import ConfigurationError
from raycap.model.config import EncoderConfig
from raycap.model.encoder import Encoder
from raycap.model.engine_trial import Trial, first_line
from raycap.storage.files import locked, replace_file

log = logging.getLogger(__name__)

_PACKAGES = ("onnx", "onnxruntime")


class OnnxEncoder(Encoder):
    """An `Encoder` whose features ONNX Runtime computes, with as many threads as PyTorch has when this is made."""

    def __init__(self, config: EncoderConfig, model: bytes) -> None:
        super().__init__(config, nn.Identity())
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # After the encoder the cores are PyTorch's: threads that wait in a loop would take them from the search.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        (features_BPC,) = self._session.run(None, {"pixels": pixels_BHWC.numpy()})
        return torch.from_numpy(features_BPC)


def is_installed() -> bool:
    """Whether `onnx_encoder` has what it needs."""
    return all(importlib.util.find_spec(package) for package in _PACKAGES)


def onnx_encoder(encoder: Encoder, trial: Trial) -> OnnxEncoder:
    """The same encoder, run by ONNX Runtime: from the cache if another process has exported it before.

    Processes that want the same one at the same time wait for the first to export it. Raises ConfigurationError, saying
    why, if it cannot be exported, or does not give the same features.
    """
    if not is_installed():
        raise ConfigurationError("engine onnx needs ONNX Runtime: pip install 'raycap[onnx]'")
    try:
        path = _folder() / f"{_key(encoder, trial)}.onnx"
        if (kept := _kept(path, encoder.config, trial)) is not None:
            return kept
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(f"{path}.lock"):
            if (kept := _kept(path, encoder.config, trial)) is not None:
                return kept
            model = _export(encoder, trial)
            exported = _opened(model, encoder.config, trial)
            try:
                replace_file(str(path), model)
            except OSError as error:
                _warn_not_kept(error)
            return exported
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _warn_not_kept(error)
        return _opened(_export(encoder, trial), encoder.config, trial)


def _warn_not_kept(error: Exception) -> None:
    log.warning("the exported encoder is not kept for the next start: %s; RAYCAP_CACHE_DIR sets where", error)


def _folder() -> Path:
    if chosen := os.environ.get("RAYCAP_CACHE_DIR"):
        return Path(chosen, "engines")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "raycap", "engines")


def _key(encoder: Encoder, trial: Trial) -> str:
    digest = hashlib.sha256(repr((encoder.config, trial.pixels_BHWC.shape, _versions())).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _versions() -> list[str]:
    """As the packages say themselves: onnxruntime comes from distributions of several names."""
    try:
        return [importlib.import_module(package).__version__ for package in ("torch", *_PACKAGES)]
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"ONNX Runtime is installed but cannot be loaded: {first_line(error)}") from error


def _kept(path: Path, config: EncoderConfig, trial: Trial) -> OnnxEncoder | None:
    """What the cache has, if it is any good."""
    if not path.exists():
        return None
    try:
        return _opened(path.read_bytes(), config, trial)
    except ConfigurationError as error:
        log.info("%s is exported again: %s", path, error)
        return None


def _opened(model: bytes, config: EncoderConfig, trial: Trial) -> OnnxEncoder:
    try:
        encoder = OnnxEncoder(config, model)
        trial.check(encoder)
    except Exception as error:  # the runtime has a class of its own for each of its failures
        raise ConfigurationError(f"encoder {config.name} on ONNX Runtime: {first_line(error)}") from error
    return encoder


def _export(encoder: Encoder, trial: Trial) -> bytes:
    """The encoder, normalisation included, as an ONNX model for any number of images of the trial's size."""
    from timm.layers.conv2d_same import Conv2dSame

    encoder = copy.deepcopy(encoder)
    for module in encoder.modules():
        if isinstance(module, Conv2dSame):
            module.forward = partial(_convolve_padded, module)  # type: ignore[method-assign]
    # Not the pictures of the trial, and not as many: so it finds out what the export took for constant.
    pixels_BHWC = torch.zeros_like(trial.pixels_BHWC[:1])
    log.info("exporting encoder %s to ONNX", encoder.config.name)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
            # Of its deprecation, and of sizes that become constants. The exporter that is to replace it (dynamo=True)
            # comes to the same speed, but takes 20 times as long and needs onnxscript.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                encoder,
                (pixels_BHWC,),
                path := Path(folder, "encoder.onnx"),
                dynamo=False,
                input_names=["pixels"],
                output_names=["features"],
                dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}},
            )
            return path.read_bytes()
    except Exception as error:  # it raises what it likes, errors of the compiler below it among them
        raise ConfigurationError(
            f"encoder {encoder.config.name} cannot be exported to ONNX: {first_line(error)}"
        ) from error


def _convolve_padded(convolution: nn.Conv2d, images_BCHW: Tensor) -> Tensor:
    """As timm's `Conv2dSame`, its padding a constant. Traced as timm has it, each layer works out its padding again for
    each batch, in some twenty nodes that ONNX Runtime cannot fuse: 73 images/s instead of 106."""
    from timm.layers.padding import get_same_padding

    size = images_BCHW.shape[-2:]
    padding: list[int] = []
    for axis in (1, 0):  # the last axis first, as F.pad has it
        kernel, stride = convolution.kernel_size[axis], convolution.stride[axis]
        total = get_same_padding(int(size[axis]), kernel, stride, convolution.dilation[axis])
        padding += [total // 2, total - total // 2]
    return F.conv2d(
        F.pad(images_BCHW, padding, value=0.0),  # without the value, ONNX Runtime does not fuse it
        convolution.weight,
        convolution.bias,
        convolution.stride,
        dilation=convolution.dilation,
        groups=convolution.groups,
    )
