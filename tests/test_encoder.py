"""CNN encoders. Nothing here uses the network: hub models are built with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raycap.errors import ConfigurationError
from raycap.images import Preprocessing, decode_image
from raycap.model.config import EncoderConfig
from raycap.model.encoder import OFFLINE_ENCODERS, Encoder, build_encoder, named_encoder, pretrained_encoder
from tests.hostile import base_picture, encode
from tests.small import small_encoder
from tests.training import assert_equal, copied


@pytest.fixture(scope="module")
def lite0() -> Encoder:
    return pretrained_encoder("efficientnet_lite0")[0]


@torch.inference_mode()
def test_lite0_gives_7_x_7_cells_of_1280_channels(lite0: Encoder) -> None:
    pixels_BHWC = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    features_BPC = lite0(pixels_BHWC)
    assert features_BPC.shape == (2, 49, 1280)
    assert features_BPC.dtype == torch.float32
    assert features_BPC.isfinite().all()
    assert torch.equal(features_BPC, lite0(pixels_BHWC)), "the same pixels, the same features"
    torch.testing.assert_close(features_BPC[:1], lite0(pixels_BHWC[:1]), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_grid_is_in_reading_order(lite0: Encoder) -> None:
    """What changes in the bottom left corner of the picture changes cells of the last rows and first columns."""
    pixels_BHWC = torch.full((2, 224, 224, 3), 127, dtype=torch.uint8)
    pixels_BHWC[1, 160:, :64] = torch.randint(
        0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    plain_PC, changed_PC = lite0(pixels_BHWC)
    row, column = divmod(int((plain_PC - changed_PC).abs().sum(-1).argmax()), 7)
    assert row >= 5
    assert column <= 1


def test_pixels_are_normalised_as_the_config_says() -> None:
    config = EncoderConfig(name="identity", num_channels=3, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0))
    encoder = Encoder(config, torch.nn.Identity())
    features_BPC = encoder(torch.tensor([[[[12, 24, 38], [255, 0, 30]]]], dtype=torch.uint8))
    assert features_BPC.tolist() == [[[2.0, 2.0, 2.0], [245.0, -10.0, 0.0]]]


@torch.inference_mode()
def test_lite0_has_its_imagenet_weights(lite0: Encoder) -> None:
    """The statistics of batch normalisation were trained, and a picture of noise is another thing than a smooth one."""
    state = lite0.state_dict()
    variances = [tensor for name, tensor in state.items() if name.endswith("running_var")]
    assert all((variance != 1).all() for variance in variances)
    assert "mean" not in state, "normalisation comes from the config, not from the weights"
    picture = decode_image(encode(base_picture(), "PNG"), Preprocessing())
    pixels_BHWC = torch.from_numpy(np.stack([picture.pixels_HWC, picture.pixels_HWC[:, ::-1]]))
    noise_BHWC = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smooth_C, mirrored_C, noise_C = lite0(torch.cat([pixels_BHWC, noise_BHWC])).mean(1)
    similarity = torch.nn.functional.cosine_similarity
    assert similarity(smooth_C, mirrored_C, 0) > 0.8, "a mirrored picture looks alike"
    assert similarity(smooth_C, noise_C, 0) < 0.5
    fresh = build_encoder(lite0.config).eval()
    assert similarity(smooth_C, fresh(pixels_BHWC[:1]).mean(1)[0], 0) < 0.5


def test_a_built_encoder_takes_pretrained_weights(lite0: Encoder) -> None:
    fresh = build_encoder(lite0.config).eval()
    fresh.load_state_dict(lite0.state_dict())
    pixels_BHWC = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(fresh(pixels_BHWC), lite0(pixels_BHWC))


@pytest.mark.parametrize(("name", "size_px"), [("efficientnet_lite1", 240), ("efficientnet_lite2", 260)])
def test_the_larger_offline_encoders(name: str, size_px: int) -> None:
    encoder, found_px = pretrained_encoder(name)
    assert (found_px, encoder.config.num_channels, encoder.config.mean) == (size_px, 1280, (127.0,) * 3)
    assert not encoder.training


def test_the_registry() -> None:
    assert sorted(OFFLINE_ENCODERS) == ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"]


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "torchvision:mobilenet_v3_small"])
@torch.inference_mode()
def test_hub_encoders_build_without_the_hub(name: str) -> None:
    encoder, size_px = named_encoder(name, pretrained=False)
    num_channels = 576 if "mobilenet" in name else 512
    assert encoder.config.num_channels == num_channels
    assert size_px == 224
    assert encoder.config.mean == pytest.approx((123.675, 116.28, 103.53))
    pixels_BHWC = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    assert encoder(pixels_BHWC).shape == (1, 4, num_channels)
    assert build_encoder(encoder.config).state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "unknown encoder 'resnet50': expected one of efficientnet_lite0, .*timm:NAME or torchvision:NAME"),
        ("timm:", "unknown encoder 'timm:'"),
        ("keras:vgg16", "unknown encoder 'keras:vgg16'"),
        ("timm:no_such_model", "encoder timm:no_such_model: timm cannot build it"),
        ("torchvision:no_such_model", "encoder torchvision:no_such_model: torchvision cannot build it"),
        ("timm:hf-hub:someone/something", "expected the name of an architecture that timm itself holds"),
        ("timm:local-dir:/tmp", "expected the name of an architecture that timm itself holds"),
        (
            "timm:vit_tiny_patch16_224",
            r"expected a CNN .*got features of shape \[1, 197, 192\]; transformers do not fit",
        ),
        ("timm:swin_tiny_patch4_window7_224", r"expected a CNN .*shape \[1, 7, 7, 768\]"),  # channels last
        ("torchvision:vit_b_16", "no feature grid found"),
        ("torchvision:swin_t", r"expected a CNN .*shape \[1, 7, 7, 768\]"),
        ("torchvision:googlenet", "expected a CNN .*does not run as one"),  # has side branches
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_what_cannot_encode_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        named_encoder(name, pretrained=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_channels": 0}, "num_channels must be positive"),
        ({"mean": (1.0, 2.0)}, "mean and std must have three values"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EncoderConfig(**settings)  # type: ignore[arg-type]


def test_bfloat16_normalises_too() -> None:
    encoder = small_encoder().to(torch.bfloat16)
    assert encoder(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("efficientnet_lite0", ["conv_stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5"]),
        ("timm:resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("torchvision:resnet18", ["0", "4", "5", "6", "7"]),
        ("torchvision:efficientnet_b0", [str(stage) for stage in range(9)]),
    ],
)
def test_frozen_stages_are_the_first_ones(name: str, stages: list[str]) -> None:
    encoder, _ = named_encoder(name, pretrained=False)
    everything = {parameter for parameter, _ in encoder.named_parameters()}
    for num_stages in range(len(stages)):
        encoder.requires_grad_(True)
        encoder.freeze(num_stages)
        learning = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        if num_stages == 0:
            assert learning == everything
            continue
        prefixes = [f"backbone.{'' if 'torchvision' in name else 'model.'}{stage}." for stage in stages]
        frozen = everything - learning
        for index, prefix in enumerate(prefixes):
            of_stage = {parameter for parameter in everything if parameter.startswith(prefix)}
            assert of_stage
            assert of_stage <= (frozen if index <= num_stages else learning), (num_stages, prefix)
    with pytest.raises(ConfigurationError, match=f"encoder {name} has . stages; 20 of them cannot be frozen"):
        encoder.freeze(20)


@pytest.mark.parametrize(
    ("name", "idle"),
    [
        ("timm:convnext_atto", {"backbone.model.head.norm.weight", "backbone.model.head.norm.bias"}),
        ("timm:mobilenetv3_small_050", {"backbone.model.conv_head.weight", "backbone.model.conv_head.bias"}),
        ("timm:resnet18", set()),
    ],
)
@pytest.mark.parametrize("num_stages", [0, 1])
def test_what_the_features_do_not_depend_on_does_not_learn(name: str, idle: set[str], num_stages: int) -> None:
    """Workers that exchange gradients would wait for those that never come."""
    encoder, _ = named_encoder(name, pretrained=False)
    before = copied(encoder)
    assert idle <= before.keys()
    encoder.freeze(num_stages)
    assert_equal(copied(encoder), before)
    encoder(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).sum().backward()
    for parameter_name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), parameter_name
        assert parameter_name not in idle or not parameter.requires_grad
