"""Training settings: what cannot work is refused before anything starts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from raycap.errors import ConfigurationError
from raycap.model.config import DecodingConfig
from raycap.train.card import command_line, model_card, saved_settings
from raycap.train.config import TrainConfig


def config(**settings: Any) -> TrainConfig:
    required = {
        "annotations": "/data/flowers/train.json",
        "images": "/data/flowers/images/",
        "val_annotations": "s3://data/val.json",
        "output": "/models/captioner",
    }
    return TrainConfig(**(required | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: 0}, f"--{name.replace('_', '-')} must be at least 1, got 0")
            for name in (
                "epochs",
                "batch_size",
                "hidden_size",
                "attention_size",
                "min_count",
                "max_length",
                "num_workers",
            )
        ),
        ({"cpus_per_worker": 0}, "--cpus-per-worker must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive, got nan"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm must be positive, got -1.0"),
        ({"warmup_steps": -1}, "--warmup-steps must not be negative, got -1"),
        ({"weight_decay": -0.1}, "--weight-decay must not be negative, got -0.1"),
        ({"seed": -1}, "--seed must not be negative, got -1"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"--label-smoothing must be in \[0, 1\), got -0.1"),
        ({"ema_decay": 1.0}, r"--ema-decay must be in \[0, 1\), got 1.0"),
        ({"size_px": 0}, "--size-px must be from 1 to 4096, got 0"),
        ({"batch_size": 20, "num_workers": 3}, "--batch-size 20 must be a multiple of --num-workers 3"),
        ({"decoder": "gru"}, "--decoder must be one of attention, show_tell, got 'gru'"),
        ({"resize": "stretch"}, "--resize must be one of squash, crop, pad, got 'stretch'"),
        ({"weights_dtype": "int8"}, "--weights-dtype must be one of float32, float16, got 'int8'"),
        ({"beam_size": 65}, "beam_size must be from 1 to 64, got 65"),
        ({"max_length": 201}, "max_length must be from 1 to 200 words, got 201"),
        ({"output": ""}, "--output must name a directory or s3:// prefix"),
        ({"output": "."}, "no run name in --output '.'; give one with --name"),
        ({"output": "/"}, "no run name in --output '/'"),
        ({"name": "a/b"}, "--name must be the name of a directory below --run-dir, other than features, got 'a/b'"),
        ({"name": "features"}, "other than features"),
        ({"output": "/models/features"}, "other than features"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "captioner"),
        ({"output": "s3://models/flowers/v2/"}, "v2"),
        ({"output": "relative"}, "relative"),
        ({"name": "first try"}, "first try"),
    ],
)
def test_the_run_is_named_after_the_output(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    made = config(run_dir=str(tmp_path), **settings)
    assert made.run_name == name
    assert made.run_path == tmp_path / name
    assert made.features_path == tmp_path / "features"


def test_the_bundle_decodes_as_validation_did() -> None:
    made = config(beam_size=5, length_penalty=1.0, max_length=12)
    assert made.decoding == DecodingConfig(beam_size=5, length_penalty=1.0, max_length=12)


def test_the_card_tells_the_command_but_nothing_of_the_machine() -> None:
    made = config(
        flip=False, learning_rate=1e-3, run_dir="/scratch/me", name="secret", log_every_s=1.0, cpus_per_worker=3,
        data_notice="Pictures of flowers, CC0.", num_workers=2,
    )  # fmt: skip
    words = shlex.split(command_line(made))
    assert words[:2] == ["raycap", "train"]
    assert (
        dict(zip(words[2::2], words[3::2], strict=False)).items()
        >= {
            "--annotations": "train.json",
            "--images": "images",
            "--val-annotations": "val.json",
        }.items()
    )
    assert "--no-flip" in words
    assert "--epochs" not in words, "defaults are left out"
    settings = saved_settings(made)
    assert settings["learning_rate"] == 1e-3
    assert settings["val_images"] is None
    metrics = {"scores": {"bleu_4": 0.201, "cider_d": 0.5}, "num_images": 1000, "tokenizer": "ptb", "epoch": 7}
    card = model_card(made, metrics, num_images=6000, num_captions=30000, vocabulary_size=2538)
    for text in (command_line(made), str(settings), card):
        assert not [
            secret for secret in ("/data", "/models", "s3://", "/scratch", "log-every", "log_every") if secret in text
        ]
    assert "6,000 images with 30,000 captions" in card
    assert "Pictures of flowers, CC0." in card
    assert "| - | 20.1 | - | - | 50.0 |" in card, "scores times 100; what Java would have computed is a dash"


def test_the_card_says_when_the_licence_is_unknown() -> None:
    metrics = {"scores": {}, "num_images": 1, "tokenizer": "python", "epoch": 1}
    card = model_card(config(), metrics, num_images=1, num_captions=1, vocabulary_size=5)
    assert "The licence of the training data was not stated." in card
