"""What a training begins with: ImageNet weights and a new decoder, or a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from raycap.errors import ConfigurationError, NotFoundError
from raycap.model.bundle import Bundle
from raycap.model.vocabulary import SPECIAL_TOKENS
from raycap.train.config import TrainConfig
from raycap.train.job import Job
from tests.bundles import SIZE_PX, WORDS, random_bundle
from tests.hostile import encode
from tests.training import assert_equal, copied

CAPTIONS = ["a dog runs", "a zebra runs", "a zebra sits", "one quagga"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two images with two captions each."""
    (tmp_path / "images").mkdir()
    for n in range(2):
        (tmp_path / "images" / f"{n}.png").write_bytes(encode(Image.new("RGB", (8, 8)), "PNG"))
    content = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)],
        "annotations": [{"image_id": n // 2, "caption": caption} for n, caption in enumerate(CAPTIONS)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    return tmp_path


def job(directory: Path, **settings: Any) -> Job:
    paths = {name: str(directory / "captions.json") for name in ("annotations", "val_annotations")}
    paths |= {"images": str(directory / "images"), "output": str(directory / "out")}
    return Job.open(TrainConfig(**(paths | {"min_count": 2, "batch_size": 2} | settings)))


def test_a_new_network_by_the_settings(directory: Path) -> None:
    opened = job(directory, decoder="att2in", hidden_size=8, attention_size=4, size_px=96, resize="pad", dropout=0.2)
    assert opened.start.vocabulary.words == (*SPECIAL_TOKENS, "a", "runs", "zebra")
    assert opened.num_captions == 4
    assert [image.image_id for image in opened.val_images] == [0, 1]
    decoder = opened.start.single.decoder
    assert (decoder.config.kind, decoder.config.hidden_size, decoder.config.attention_size) == ("att2in", 8, 4)
    assert decoder.dropout.p == 0.2
    assert (opened.start.preprocessing.size_px, opened.start.preprocessing.resize) == (96, "pad")


def test_the_seed_decides_the_new_weights(directory: Path) -> None:
    small = {"hidden_size": 8, "attention_size": 4}
    first, other = (copied(job(directory, seed=seed, **small).start.single.decoder) for seed in (0, 1))
    again = copied(job(directory, seed=0, **small).start.single.decoder)
    assert_equal(first, again)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_a_bundle_keeps_its_words_and_weights(directory: Path) -> None:
    model_id = random_bundle().save(str(directory / "bundle"))
    opened = job(directory, init=str(directory / "bundle"), dropout=0.1)
    assert opened.start.vocabulary.words == (*SPECIAL_TOKENS, *WORDS)
    assert opened.start.preprocessing.size_px == SIZE_PX
    assert_equal(copied(opened.start.single), copied(random_bundle().single))
    assert opened.start.single.decoder.dropout.p == 0.1
    assert opened.identity["model_id"] == model_id


def test_an_extended_bundle_knows_the_new_words_besides(directory: Path) -> None:
    random_bundle().save(str(directory / "bundle"))
    opened = job(directory, init=str(directory / "bundle"), extend_vocabulary=True)
    known = (*SPECIAL_TOKENS, *WORDS)
    assert opened.start.vocabulary.words == (*known, "zebra"), "the others are known, or too rare"
    before, after = copied(random_bundle().single), copied(opened.start.single)
    for name in ("decoder.embedding.weight", "decoder.output_bias"):
        assert len(after[name]) == len(known) + 1
        after[name] = after[name][: len(known)]
    assert_equal(after, before)
    opened.start.save(str(directory / "extended"))
    assert Bundle.load(str(directory / "extended")).vocabulary.words == opened.start.vocabulary.words


def test_the_identity_follows_what_the_weights_depend_on(directory: Path) -> None:
    for seed in (0, 1):
        random_bundle(seed=seed).save(str(directory / str(seed) / "bundle"))
    init = str(directory / "0" / "bundle")
    opened = job(directory, init=init)
    assert job(directory, init=init).identity == opened.identity
    other = job(directory, init=str(directory / "1" / "bundle")).identity
    assert {name for name in other if other[name] != opened.identity[name]} == {"model_id"}
    extended = job(directory, init=init, extend_vocabulary=True).identity
    assert {name for name in extended if extended[name] != opened.identity[name]} == {"extend_vocabulary", "vocabulary"}
    changes: list[dict[str, Any]] = [
        {"learning_rate": 1.0}, {"seed": 7}, {"batch_size": 3}, {"ema_decay": 0.5}, {"scst_epochs": 1},
    ]  # fmt: skip
    for settings in changes:
        changed = replace(opened, config=replace(opened.config, **settings)).identity
        assert {name for name in changed if changed[name] != opened.identity[name]} == settings.keys()
    moved: dict[str, Any] = {
        "num_workers": 2,
        "images_per_pass": 2,
        "output": "/elsewhere",
        "run_dir": "/runs",
        "images": "/moved/images",
    }
    assert replace(opened, config=replace(opened.config, **moved)).identity == opened.identity


@pytest.mark.parametrize("setting", ["annotations", "images", "val_annotations", "val_images", "init"])
def test_what_is_not_there_is_named(setting: str, directory: Path) -> None:
    with pytest.raises((ConfigurationError, NotFoundError), match="nowhere"):
        job(directory, **{setting: str(directory / "nowhere")})


def test_more_frozen_stages_than_there_are_is_found_before_workers_start(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"efficientnet_lite0 has . stages; 9 of them cannot be frozen"):
        job(directory, frozen_stages=9)
