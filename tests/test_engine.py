"""Whatever engine runs the encoder, the captions are the same; and what has been exported once is found again."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import onnx
import pytest
import torch
from torch import Tensor, nn

from raycap.errors import ConfigurationError
from raycap.images import Preprocessing
from raycap.model.bundle import Bundle
from raycap.model.captioner import Captioner
from raycap.model.config import DecodingConfig, EncoderConfig, Engine
from raycap.model.encoder import Encoder, named_encoder
from raycap.model.engine import use_engine
from raycap.model.engine_onnx import OnnxEncoder, onnx_encoder
from raycap.model.engine_trial import LOW_PRECISION_TOLERANCE, TF32_TOLERANCE, TOLERANCE, Trial, tolerance
from raycap.model.ensemble import EnsembleNetwork
from raycap.model.network import CaptionNetwork
from tests.small import KINDS, PatchMean, lite0_bundle, small_bundle, small_decoder, small_encoder, small_vocabulary

SAMPLES = Path(__file__).parent.parent / "raycap" / "samples"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's exported encoders go."""
    monkeypatch.setenv("RAYCAP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def pictures(num_images: int, size_px: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse_BHWC = torch.randint(0, 256, (num_images, 2, 2, 3), dtype=torch.uint8, generator=generator)
    return coarse_BHWC.repeat_interleave(size_px // 2, 1).repeat_interleave(size_px // 2, 2)


def assert_same_captions(bundle: Bundle, engine: Engine, pixels_BHWC: Tensor) -> None:
    """As from the network itself, all at once and one by one."""
    expected = bundle.network.search(pixels_BHWC, bundle.decoding)
    captioner = Captioner(bundle, device="cpu", engine=engine)
    assert captioner.engine == engine
    found = captioner.caption(pixels_BHWC)
    assert len({caption.text for caption in found}) > 2, "the pictures must differ for the model"
    for index, (caption, hypotheses) in enumerate(zip(found, expected, strict=True)):
        (alone,) = captioner.caption(pixels_BHWC[index : index + 1])
        for each in (caption, alone):
            texts = [each.text, *(other.text for other in each.alternatives)]
            assert texts == [bundle.vocabulary.decode(h.tokens) for h in hypotheses]
            assert each.log_prob == pytest.approx(hypotheses[0].log_prob, abs=1e-3)


class Backbone(PatchMean):
    """A CNN whose features are then changed by `odd`."""

    def __init__(self) -> None:
        super().__init__(num_channels=6, side=2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.odd(super().forward(images_BCHW))

    def odd(self, grid_BCHW: Tensor) -> Tensor:
        raise NotImplementedError


class Inexportable(Backbone):
    def odd(self, grid_BCHW: Tensor) -> Tensor:
        return grid_BCHW + torch.special.bessel_j0(grid_BCHW)


class OfThisBatch(Backbone):
    """What tracing takes for constant: the mean of the batch that it sees."""

    def odd(self, grid_BCHW: Tensor) -> Tensor:
        return grid_BCHW + float(grid_BCHW.mean())


class NormalisesFirst(Backbone):
    """Lists its layers in another order than it runs them."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        grid_BCHW: Tensor = self.convolution(nn.functional.adaptive_avg_pool2d(images_BCHW, self.side))
        return torch.tanh(grid_BCHW) + self.norm(torch.tanh(grid_BCHW))


class AsksItsNormalisation(Backbone):
    def odd(self, grid_BCHW: Tensor) -> Tensor:
        return grid_BCHW * self.norm.num_features


def random_statistics(encoder: Encoder) -> Encoder:
    """Batch normalisation that does something: a new one has mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return encoder


def bundle_of(backbone: nn.Module) -> Bundle:
    encoder = Encoder(EncoderConfig(name="odd", num_channels=6), backbone).eval().requires_grad_(False)
    return Bundle(
        network=CaptionNetwork(random_statistics(encoder), small_decoder()),
        vocabulary=small_vocabulary(),
        preprocessing=Preprocessing(size_px=16),
        decoding=DecodingConfig(max_length=6),
    )


@pytest.mark.parametrize("engine", ["torch", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_captions_are_those_of_the_network(kind: str, engine: Engine) -> None:
    bundle = small_bundle(kind)  # type: ignore[arg-type]
    random_statistics(bundle.single.encoder)
    assert_same_captions(bundle, engine, pictures(8))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_captions_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert_same_captions(small_bundle(), "compile", pictures(8))
    captioner = Captioner(small_bundle(), device="cpu", engine="compile")
    with torch.compiler.set_stance("fail_on_recompile"):  # all is compiled when it is made
        for num_images in (8, 1, 5):
            captioner.caption(pictures(num_images))


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_the_captions_of_the_shipped_bundle(engine: Engine) -> None:
    bundle = Bundle.load()
    prepare = Captioner(bundle, device="cpu", engine="torch").prepare
    names = ("cat", "dog", "moose", "river", "snow", "stairs")
    photos_BHWC = torch.stack([prepare((SAMPLES / f"{name}.jpg").read_bytes()) for name in names])
    assert_same_captions(bundle, engine, photos_BHWC)


@pytest.mark.parametrize("name", ["efficientnet_lite1", "timm:resnet18", "torchvision:mobilenet_v3_small"])
@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_the_features_of_other_encoders(name: str, engine: Engine) -> None:
    torch.manual_seed(0)
    encoder = random_statistics(named_encoder(name, pretrained=False)[0])
    pixels_BHWC = pictures(5, 64)
    with torch.inference_mode():
        expected_BPC = encoder(pixels_BHWC)
        network = CaptionNetwork(encoder, small_decoder())
        assert use_engine(network, engine, size_px=64, device=CPU, dtype=torch.float32) == engine
        assert network.encoder is not encoder
        features_BPC = network.encoder(pixels_BHWC)
    torch.testing.assert_close(features_BPC, expected_BPC, rtol=0, atol=TOLERANCE * float(expected_BPC.abs().max()))


def test_auto_is_onnx_in_float32_on_a_cpu_and_torch_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bundle = small_bundle()
    assert Captioner(bundle, device="cpu").engine == "onnx"
    assert Captioner(bundle, device="cpu", precision="bfloat16").engine == "torch"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    advice = "than ONNX Runtime would: pip install 'raycap[onnx]'"
    assert advice not in caplog.text
    assert Captioner(bundle, device="cpu").engine == "torch"
    assert advice in caplog.text
    with pytest.raises(ConfigurationError, match=r"engine onnx needs ONNX Runtime: pip install 'raycap\[onnx\]'"):
        Captioner(bundle, device="cpu", engine="onnx")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "onnx", "precision": "bfloat16"}, "engine onnx computes in float32 on a CPU; elsewhere use"),
        ({"engine": "tensorrt"}, "engine must be one of auto, torch, compile, onnx, got 'tensorrt'"),
    ],
)
def test_an_engine_that_does_not_fit(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Captioner(small_bundle(), device="cpu", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backbone", "message"),
    [(Inexportable, "encoder odd cannot be exported to ONNX: "), (OfThisBatch, "features differ from PyTorch's by ")],
)
def test_what_onnx_cannot_do_runs_on_torch(
    backbone: type[Backbone], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = bundle_of(backbone())
    captioner = Captioner(bundle, device="cpu")
    assert captioner.engine == "torch"
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert message in warning
    expected = bundle.network.search(pictures(3), bundle.decoding)
    assert [c.text for c in captioner.caption(pictures(3))] == [bundle.vocabulary.decode(h[0].tokens) for h in expected]
    with pytest.raises(ConfigurationError, match=message):
        Captioner(bundle, device="cpu", engine="onnx")


def test_how_far_features_may_be_off_depends_on_the_arithmetic() -> None:
    cuda = torch.device("cuda")
    assert [tolerance(*each) for each in ((CPU, torch.float32), (cuda, torch.float32), (cuda, torch.bfloat16))] == [
        TOLERANCE,
        TF32_TOLERANCE,
        LOW_PRECISION_TOLERANCE,
    ]
    assert TOLERANCE < TF32_TOLERANCE < LOW_PRECISION_TOLERANCE


def test_batch_normalisation_is_folded_where_it_may_be() -> None:
    for backbone, remains in ((PatchMean(6, 2), False), (NormalisesFirst(), True), (AsksItsNormalisation(), True)):
        network = bundle_of(backbone).single
        with torch.inference_mode():
            expected_BPC = network.encoder(pictures(3))
            use_engine(network, "torch", size_px=16, device=CPU, dtype=torch.float32)
            torch.testing.assert_close(network.encoder(pictures(3)), expected_BPC, rtol=1e-4, atol=1e-4)
        assert any(isinstance(module, nn.BatchNorm2d) for module in network.encoder.modules()) == remains


def test_the_second_captioner_finds_what_the_first_exported(cache: Path) -> None:
    bundle = lite0_bundle()
    first = Captioner(bundle, device="cpu", engine="onnx")
    (path,) = cache.iterdir()  # and no lock file beside it
    before = path.stat()
    second = Captioner(bundle, device="cpu", engine="onnx")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert second.caption(pictures(2, 64)) == first.caption(pictures(2, 64))
    Captioner(lite0_bundle(seed=1), device="cpu", engine="onnx")  # other weights
    assert len(list(cache.iterdir())) == 2


def test_captioners_that_start_at_once_export_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    encoder = small_encoder()
    trial = Trial(encoder, 16)
    with ThreadPoolExecutor(4) as pool:
        encoders = list(pool.map(lambda _: onnx_encoder(encoder, trial), range(4)))
    assert len(encoders) == 4
    assert [record.getMessage() for record in caplog.records] == ["exporting encoder small to ONNX"]


def other_model(cache: Path) -> bytes:
    """An encoder of the same shapes with other weights."""
    onnx_encoder(other := small_encoder(seed=1), Trial(other, 16))
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "foreign"])
def test_a_damaged_file_is_exported_again(damage: str, cache: Path) -> None:
    foreign = other_model(cache)
    bundle = small_bundle()
    expected = Captioner(bundle, device="cpu", engine="onnx").caption(pictures(4))
    (path,) = cache.iterdir()
    good = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": good[: len(good) // 2], "noise": b"\xff" * 999, "foreign": foreign}[damage])
    assert Captioner(bundle, device="cpu", engine="onnx").caption(pictures(4)) == expected
    (path,) = cache.iterdir()
    onnx_encoder(encoder := bundle.single.encoder, Trial(encoder, 16))
    assert len(path.read_bytes()) == len(good)


def test_it_works_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYCAP_CACHE_DIR", str(tmp_path / "file"))
    assert_same_captions(small_bundle(), "onnx", pictures(8))
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert warning.startswith("the exported encoder is not kept for the next start: ")


def test_what_does_not_fit_on_the_disk_is_exported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_disk(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(os, "fsync", full_disk)
    onnx_encoder(encoder := small_encoder(), Trial(encoder, 16))
    exported, not_kept = (record.getMessage() for record in caplog.records)
    assert exported == "exporting encoder small to ONNX"
    assert "is not kept for the next start: [Errno 28] No space left on device; RAYCAP_CACHE_DIR sets where" in not_kept


def test_onnx_runtime_of_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu brings the same package, and metadata of another name."""

    def from_name(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(Distribution, "from_name", from_name)
    assert Captioner(small_bundle(), device="cpu").engine == "onnx"


def test_a_broken_onnx_runtime_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    broken = ModuleType("onnxruntime")  # as an uninstallation leaves it: a folder without code
    broken.__spec__ = ModuleSpec("onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", broken)
    assert Captioner(small_bundle(), device="cpu").engine == "torch"
    assert "ONNX Runtime is installed but cannot be loaded: " in caplog.text


def test_the_cache_is_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small_encoder()
    monkeypatch.delenv("RAYCAP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    onnx_encoder(encoder, Trial(encoder, 16))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    onnx_encoder(encoder, Trial(encoder, 16))
    for folder in (tmp_path / "xdg", tmp_path / ".cache"):
        assert len(list((folder / "raycap" / "engines").glob("*.onnx"))) == 1


def test_as_many_threads_as_pytorch_has() -> None:
    encoder, num_threads = small_encoder(), torch.get_num_threads()
    trial, features = Trial(encoder, 16), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            fast = onnx_encoder(encoder, trial)
            assert fast._session.get_session_options().intra_op_num_threads == count
            features.append(fast(pictures(9)))
    finally:
        torch.set_num_threads(num_threads)
    torch.testing.assert_close(*features)


def test_pixels_need_not_be_in_one_piece() -> None:
    encoder = small_encoder()
    fast = onnx_encoder(encoder, Trial(encoder, 16))
    mirrored_BHWC = pictures(4).flip(2).transpose(0, 1).contiguous().transpose(0, 1)
    assert not mirrored_BHWC.is_contiguous()
    torch.testing.assert_close(fast(mirrored_BHWC), encoder(mirrored_BHWC), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_an_ensemble_has_each_encoder_once(engine: Engine, cache: Path) -> None:
    networks = [CaptionNetwork(small_encoder(seed=seed), small_decoder(seed=seed)) for seed in (0, 1)]
    networks.append(CaptionNetwork(small_encoder(seed=0), small_decoder("show_tell", seed=2)))
    bundle = Bundle(
        network=EnsembleNetwork.of(networks),
        vocabulary=small_vocabulary(),
        preprocessing=Preprocessing(size_px=16),
        decoding=DecodingConfig(max_length=6),
    )
    assert_same_captions(bundle, engine, pictures(8))
    if engine == "onnx":
        assert len(list(cache.iterdir())) == 2
        assert not any(isinstance(module, OnnxEncoder) for module in bundle.network.modules()), "the bundle stays"


def test_padding_is_constant_in_the_exported_encoder(cache: Path) -> None:
    encoder = lite0_bundle().single.encoder
    onnx_encoder(encoder, Trial(encoder, 64))
    (path,) = cache.iterdir()
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "Pad" in kinds
    assert not {"BatchNormalization", "Ceil"} & kinds
