"""Training settings: what cannot work is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycap.errors import ConfigurationError
from raycap.model.config import DecodingConfig
from raycap.train.config import Stage, TrainConfig


def config(**settings: Any) -> TrainConfig:
    required = {
        "annotations": "/data/flowers/train.json",
        "images": "/data/flowers/images/",
        "val_annotations": "s3://data/val.json",
        "output": "/models/captioner",
    }
    return TrainConfig(**(required | settings))


AT_LEAST_1 = (
    "batch_size", "images_per_pass", "hidden_size", "attention_size", "min_count", "max_length", "num_workers",
    "scst_samples", "keep_checkpoints", "patience", "cpus_per_worker",
)  # fmt: skip
AT_LEAST_0 = (
    "epochs", "fine_tune_epochs", "scst_epochs", "warmup_steps", "weight_decay", "seed", "checkpoint_every",
    "frozen_stages",
)  # fmt: skip
POSITIVE = ("learning_rate", "fine_tune_learning_rate", "scst_learning_rate", "scst_temperature", "max_grad_norm")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: 0}, f"{flag(name)} must be at least 1, got 0") for name in AT_LEAST_1),
        *(({name: -1}, f"{flag(name)} must be at least 0, got -1") for name in AT_LEAST_0),
        *(({name: 0.0}, f"{flag(name)} must be positive, got 0.0") for name in POSITIVE),
        ({"max_failures": -2}, "--max-failures must be at least -1, got -2"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive, got nan"),
        ({"encoder_learning_rate": -1e-5}, "--encoder-learning-rate must not be negative, got -1e-05"),
        ({"dropout": 1.0}, r"--dropout must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"--label-smoothing must be in \[0, 1\), got -0.1"),
        ({"ema_decay": 1.0}, r"--ema-decay must be in \[0, 1\), got 1.0"),
        ({"scheduled_sampling": 1.5}, "--scheduled-sampling must be from 0 to 1, got 1.5"),
        ({"crop": 0.0}, "--crop must be above 0 and at most 1, got 0.0"),
        ({"crop": 1.1}, "--crop must be above 0 and at most 1, got 1.1"),
        ({"size_px": 0}, "--size-px must be from 1 to 4096, got 0"),
        ({"decoder": "gru"}, "--decoder must be one of attention, att2in, show_tell, got 'gru'"),
        ({"resize": "stretch"}, "--resize must be one of squash, crop, pad, got 'stretch'"),
        ({"weights_dtype": "int8"}, "--weights-dtype must be one of float32, float16, got 'int8'"),
        ({"precision": "half"}, "--precision must be one of auto, float32, bfloat16, float16, got 'half'"),
        ({"scst_baseline": "max"}, "--scst-baseline must be one of mean, greedy, got 'max'"),
        ({"epochs": 0}, "nothing to do: --epochs, --fine-tune-epochs and --scst-epochs are all 0"),
        ({"epochs": 0, "scst_epochs": 1}, "needs a model that captions already: give --epochs or --init"),
        ({"batch_size": 2, "num_workers": 3}, "--batch-size 2 must be at least --num-workers 3"),
        ({"scst_samples": 1}, "--scst-samples must be at least 2 with --scst-baseline mean, got 1"),
        ({"num_workers": 2, "min_workers": 3}, "--min-workers must be from 1 to --num-workers 2, got 3"),
        ({"num_workers": 2, "min_workers": 0}, "--min-workers must be from 1 to --num-workers 2, got 0"),
        ({"extend_vocabulary": True}, "--extend-vocabulary goes with --init"),
        ({"init": "b", "hidden_size": 64}, "--hidden-size goes without --init: a bundle keeps its architecture"),
        ({"init": "b", "size_px": 64}, "--size-px goes without --init"),
        ({"init": "b", "encoder": "timm:resnet50"}, "--encoder goes without --init"),
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
    "settings",
    [
        {"epochs": 0, "fine_tune_epochs": 1},
        {"epochs": 0, "scst_epochs": 1, "init": "b"},
        {"scst_samples": 1, "scst_baseline": "greedy"},
        {"batch_size": 5, "num_workers": 3, "min_workers": 1},
        {"max_failures": -1, "warmup_steps": 0, "encoder_learning_rate": 0.0, "crop": 1.0, "scheduled_sampling": 1.0},
        {"init": "b", "extend_vocabulary": True},
    ],
    ids=str,
)
def test_settings_at_the_edge_are_taken(settings: dict[str, Any]) -> None:
    config(**settings)


def test_stages_come_in_order_with_rates_of_their_own() -> None:
    made = config(
        epochs=3, fine_tune_epochs=2, scst_epochs=1, warmup_steps=7, learning_rate=0.1, fine_tune_learning_rate=0.2,
        encoder_learning_rate=0.3, scst_learning_rate=0.4,
    )  # fmt: skip
    assert made.stages == [
        Stage(kind="cross_entropy", epochs=3, learning_rate=0.1, warmup_steps=7),
        Stage(kind="fine_tune", epochs=2, learning_rate=0.2, warmup_steps=7, encoder_learning_rate=0.3),
        Stage(kind="self_critical", epochs=1, learning_rate=0.4, warmup_steps=7),
    ]
    assert [stage.kind for stage in config(scst_epochs=1).stages] == ["cross_entropy", "self_critical"]
    assert [stage.kind for stage in config(epochs=0, scst_epochs=1, init="b").stages] == ["self_critical"]


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
    assert made.run_path == str(tmp_path / name)
    assert made.features_path == str(tmp_path / "features")


def test_runs_may_be_on_s3_and_directories_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config(run_dir="s3://lab/runs/").run_path == "s3://lab/runs/captioner"
    assert config(run_dir="s3://lab/runs").features_path == "s3://lab/runs/features"
    monkeypatch.chdir(tmp_path)
    assert config().run_root == str(tmp_path / "runs")


def test_the_bundle_decodes_as_validation_did() -> None:
    made = config(beam_size=5, length_penalty=1.0, max_length=12)
    assert made.decoding == DecodingConfig(beam_size=5, length_penalty=1.0, max_length=12)
