"""Bundles: what was saved is what is loaded, and whatever is wrong with one is named."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raycap.errors import BundleError, RaycapError
from raycap.model.bundle import CONFIG, METRICS, VOCABULARY, WEIGHTS, Bundle
from raycap.model.captioner import Captioner
from raycap.model.config import DecodingConfig
from raycap.storage import S3Options
from tests.hostile import base_picture, encode
from tests.s3 import S3Server
from tests.small import KINDS, lite0_bundle

FILES = ("config.json", "vocabulary.json", "model.safetensors", "metrics.json", "README.md")


@pytest.fixture(scope="module")
def original() -> Bundle:
    return lite0_bundle()


@pytest.fixture(scope="module")
def pristine(original: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved bundle that no test changes."""
    path = tmp_path_factory.mktemp("pristine")
    original.save(str(path))
    return path


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    for file in pristine.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def picture_captions(bundle: Bundle) -> list[Any]:
    captioner = Captioner(bundle, device="cpu")
    return captioner.caption([captioner.prepare(encode(base_picture(), "PNG"))])


@pytest.mark.parametrize("kind", KINDS)
def test_loading_gives_back_what_was_saved(kind: Any, tmp_path: Path) -> None:
    original = replace(lite0_bundle(kind), decoding=DecodingConfig(beam_size=2, max_length=7, length_penalty=1))
    model_id = original.save(str(tmp_path / "new" / "bundle"))
    loaded = Bundle.load(str(tmp_path / "new" / "bundle"))
    assert {file.name for file in (tmp_path / "new" / "bundle").iterdir()} == set(FILES)
    state, expected = loaded.network.state_dict(), original.network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert loaded.vocabulary.words == original.vocabulary.words
    assert loaded.preprocessing == original.preprocessing
    assert loaded.decoding == original.decoding
    assert (loaded.metrics, loaded.card) == (original.metrics, original.card)
    assert json.loads((tmp_path / "new" / "bundle" / CONFIG).read_text())["format_version"] == 1
    assert loaded.single is loaded.network
    assert loaded.single.encoder.config == original.single.encoder.config
    assert loaded.single.decoder.config == original.single.decoder.config
    assert loaded.model_id == model_id
    assert model_id.startswith(f"efficientnet_lite0-{kind}-")
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert picture_captions(loaded) == picture_captions(original)


def test_saving_again_gives_the_same_bytes(pristine: Path, tmp_path: Path) -> None:
    Bundle.load(str(pristine)).save(str(tmp_path))
    for file in pristine.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_float16_halves_the_file_and_still_captions(original: Bundle, pristine: Path, tmp_path: Path) -> None:
    model_id = original.save(str(tmp_path), weights_dtype="float16")
    size, full_size = (path.joinpath(WEIGHTS).stat().st_size for path in (tmp_path, pristine))
    assert size < 0.55 * full_size
    loaded = Bundle.load(str(tmp_path))
    assert loaded.model_id == model_id != Bundle.load(str(pristine)).model_id
    for name, tensor in loaded.network.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(tensor, original.network.state_dict()[name], rtol=1e-3, atol=1e-4)
    (caption,) = picture_captions(loaded)
    assert caption.text


def test_float16_keeps_large_statistics(tmp_path: Path) -> None:
    bundle = lite0_bundle()
    variance = next(tensor for name, tensor in bundle.network.state_dict().items() if name.endswith("running_var"))
    variance.fill_(1e6)  # past float16's largest number
    bundle.save(str(tmp_path), weights_dtype="float16")
    assert all(tensor.isfinite().all() for tensor in Bundle.load(str(tmp_path)).network.state_dict().values())


def test_the_model_id_changes_with_the_weights(original: Bundle, tmp_path: Path) -> None:
    ids = {original.save(str(tmp_path / "a")), original.save(str(tmp_path / "b"))}
    assert len(ids) == 1
    other = lite0_bundle()
    with torch.no_grad():
        other.single.decoder.output_bias[-1] += 1e-6
    assert other.save(str(tmp_path / "c")) not in ids


def test_a_save_that_is_cut_short_leaves_no_whole_bundle(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raycap.storage import LocalStore

    write = LocalStore.write

    def failing(store: LocalStore, key: str, data: bytes) -> None:
        if key == WEIGHTS:
            raise OSError("power cut")
        write(store, key, data)

    monkeypatch.setattr(LocalStore, "write", failing)
    with pytest.raises(OSError, match="power cut"):
        lite0_bundle("show_tell").save(str(saved))
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        Bundle.load(str(saved))


def edit_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((path / CONFIG).read_text())
    change(config)
    (path / CONFIG).write_text(json.dumps(config))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(path / WEIGHTS)
    change(state)
    save_file(state, path / WEIGHTS)


def without(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def make_directory(path: Path) -> None:
    (path / CONFIG).unlink()
    (path / CONFIG).mkdir()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


CONFIG_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda c: c.update(format_version=3), "bundle format 3, but this raycap reads formats 1 to 2; upgrade"),
    "not-an-ensemble": (lambda c: c.update(format_version=2), "section 'encoders' is missing"),
    "version-0": (lambda c: c.update(format_version=0), "bundle format 0"),
    "version-text": (lambda c: c.update(format_version="1"), "no format_version"),
    "no-version": (lambda c: c.pop("format_version"), "not a raycap bundle"),
    "no-decoder": (lambda c: c.pop("decoder"), "section 'decoder' is missing"),
    "no-preprocessing": (lambda c: c.pop("preprocessing"), "section 'preprocessing' is missing"),
    "decoder-list": (lambda c: c.update(decoder=[]), "section 'decoder' is missing"),
    "unknown-field": (lambda c: c["decoder"].update(layers=3), "section 'decoder': .*unexpected .*'layers'"),
    "text-for-number": (lambda c: c["decoder"].update(hidden_size="8"), "hidden_size to be of type int, got '8'"),
    "fraction": (lambda c: c["decoder"].update(hidden_size=8.5), "expected hidden_size to be of type int, got 8.5"),
    "true": (lambda c: c["decoding"].update(beam_size=True), "expected beam_size to be of type int, got True"),
    "null": (lambda c: c["encoder"].update(name=None), "expected name to be of type str, got None"),
    "mean-of-text": (lambda c: c["encoder"].update(mean=["a", "b", "c"]), "expected mean to be of type float, got 'a'"),
    "mean-number": (lambda c: c["encoder"].update(mean=127), "expected mean to be of type tuple, got 127"),
    "negative": (lambda c: c["decoder"].update(hidden_size=-8), "hidden_size must be positive, got -8"),
    "huge": (lambda c: c["decoder"].update(hidden_size=2**50), "the network cannot be built"),
    "unknown-encoder": (lambda c: c["encoder"].update(name="vgg"), "cannot be built: unknown encoder 'vgg'"),
    "hub": (lambda c: c["encoder"].update(name="timm:hf-hub:a/b"), "an architecture that timm itself holds"),
    "beams": (lambda c: c["decoding"].update(beam_size=1000), "section 'decoding': beam_size must be from 1 to 64"),
    "size": (lambda c: c["preprocessing"].update(size_px=10**9), "section 'preprocessing': size_px must be"),
    "vocabulary-size": (
        lambda c: c["decoder"].update(vocabulary_size=13),
        r"vocabulary\.json has 12 words, but config\.json says vocabulary_size 13",
    ),
    "feature-size": (
        lambda c: c["decoder"].update(feature_size=640),
        "the encoder gives 1280 channels, but the decoder expects feature_size 640",
    ),
    "other-shape": (
        lambda c: c["decoder"].update(attention_size=6),
        r"does not fit config\.json: decoder\.energy\.weight is \[1, 5\], expected \[1, 6\]",
    ),
    "other-kind": (lambda c: c["decoder"].update(kind="show_tell"), "missing tensor decoder.image.bias.* and .* more"),
    "other-encoder": (lambda c: c["encoder"].update(name="efficientnet_lite1"), "missing tensor .* more"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_a_wrong_config_is_named(damage: str, saved: Path) -> None:
    change, message = CONFIG_DAMAGE[damage]
    edit_config(saved, change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(str(saved))


FILE_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"no-{name}": (without(name), f"not a model bundle, {name} is missing") for name in FILES},
    "bad-json": (lambda p: (p / CONFIG).write_text('{"format_version": 1,'), r"config\.json: not valid JSON"),
    "not-utf-8": (lambda p: (p / CONFIG).write_bytes(b'{"\xff": 1}'), r"config\.json: not valid JSON"),
    "deep-json": (lambda p: (p / METRICS).write_text("[" * 100_000), r"metrics\.json: not valid JSON"),
    "json-list": (lambda p: (p / CONFIG).write_text("[1]"), "not a raycap bundle"),
    "words-object": (lambda p: (p / VOCABULARY).write_text("{}"), r"vocabulary\.json: expected a list of words"),
    "words-numbers": (lambda p: (p / VOCABULARY).write_text("[1, 2]"), r"vocabulary\.json: expected a list of words"),
    "words-no-specials": (lambda p: (p / VOCABULARY).write_text('["a"]'), r"vocabulary\.json: .*must start with <pad>"),
    "truncated": (lambda p: truncate(p / WEIGHTS), r"model\.safetensors: not a safetensors file"),
    "empty": (lambda p: (p / WEIGHTS).write_bytes(b""), r"model\.safetensors: not a safetensors file"),
    "huge-header": (lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", 2**62)), "not a safetensors file"),
    "missing-tensor": (
        lambda p: edit_weights(p, lambda s: s.pop("decoder.output_bias")),
        "missing tensor decoder.output_bias",
    ),
    "extra-tensor": (
        lambda p: edit_weights(p, lambda s: s.update(extra=torch.zeros(2))),
        "unexpected tensor extra",
    ),
    "wrong-shape": (
        lambda p: edit_weights(p, lambda s: s.update({"decoder.output_bias": torch.zeros(11)})),
        r"decoder\.output_bias is \[11\], expected \[12\]",
    ),
    "directory": (make_directory, r"config\.json"),
}


@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_a_damaged_file_is_named(damage: str, saved: Path) -> None:
    change, message = FILE_DAMAGE[damage]
    change(saved)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(str(saved))
    assert str(saved) in str(caught.value)


class Bomb:
    """Unpickling it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["BOMB"],))


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors", "metrics.json"])
def test_a_pickle_is_not_executed(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.load(str(saved))
    torch.save({"decoder.output_bias": Bomb()}, saved / name)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.load(str(saved))
    assert not (tmp_path / "exploded").exists()


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"config\.json is missing; expected a directory written by raycap train"):
        Bundle.load(str(tmp_path / "nothing"))


def test_a_file_that_may_not_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (saved / WEIGHTS).chmod(0)
    with pytest.raises(BundleError, match=r"model\.safetensors cannot be read"):
        Bundle.load(str(saved))


@pytest.mark.integration
@pytest.mark.usefixtures("no_aws_settings")
def test_a_bundle_on_s3(s3_server: S3Server, original: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    location = f"s3://{s3_server.make_bucket()}/models/small"
    model_id = original.save(location, s3=S3Options())
    loaded = Bundle.load(location, s3=S3Options())
    assert loaded.model_id == model_id
    assert picture_captions(loaded) == picture_captions(original)
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        Bundle.load(location + "/elsewhere", s3=S3Options())
    with pytest.raises(RaycapError, match="no-such-bucket"):
        Bundle.load("s3://no-such-bucket-here/model", s3=S3Options())
