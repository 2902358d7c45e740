"""The settings of the bulk job: checked when they are made, with the option's name."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from raycap.bulk.config import CaptionConfig, ExportConfig, PlanConfig, ReportConfig, Selection
from raycap.errors import ConfigurationError
from raycap.images import ImageLimits

COUNTS = [
    "batch_size",
    "requests_in_flight",
    "max_bytes",
    "max_pixels",
    "num_actors",
    "max_actors",
    "cpus_per_actor",
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, 0, f"--{name.replace('_', '-')} must be at least 1, got 0") for name in COUNTS),
        ("gpus_per_actor", -0.5, "--gpus-per-actor must not be negative, got -0.5"),
        ("max_failed", -0.1, "--max-failed is a share from 0 to 1, got -0.1"),
        ("max_failed", 5, "--max-failed is a share from 0 to 1, got 5"),
        ("max_failed", float("nan"), "--max-failed is a share from 0 to 1, got nan"),
        ("max_failed", 1.5, "--max-failed is a share from 0 to 1, got 1.5"),
        ("file_size_mb", 0, "--file-size-mb must be above 0, got 0"),
        ("num_cpus_per_fetch", 0, "--num-cpus-per-fetch must be above 0, got 0"),
        ("show", -1, "--show must not be negative, got -1"),
    ],
)
def test_bad_values_are_refused_by_option(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        CaptionConfig(source="a", output="b", **{name: value})
    assert str(raised.value) == message


def test_other_commands_check_too() -> None:
    with pytest.raises(ConfigurationError, match="--max-images must not be negative"):
        ReportConfig(output="a", max_images=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample": 0}, "--sample is a share above 0 and up to 1, got 0"),
        ({"sample": 1.1}, "--sample is a share above 0 and up to 1, got 1.1"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"min_size": -1}, "--min-size must not be negative, got -1"),
        ({"min_size": 5, "max_size": 4}, "--max-size must be at least --min-size, got 4"),
    ],
)
def test_bad_selections_are_refused_by_option(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Selection(**settings)
    assert str(raised.value) == message


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="an output of --limit cannot be updated"):
        CaptionConfig(source="a", output="b", update=True, selection=Selection(limit=5))
    with pytest.raises(ConfigurationError, match="fetch_faild is no error code; there are access_denied, corrupt, "):
        CaptionConfig(source="a", output="b", retry_failed=("fetch_faild", "corrupt"))
    with pytest.raises(ConfigurationError, match="--gpu-images-per-s must be above 0, got 0"):
        PlanConfig(source="a", gpu_images_per_s=0)
    with pytest.raises(ConfigurationError, match="--max-actors must be at least --num-actors, got 2"):
        CaptionConfig(source="a", output="b", num_actors=3, max_actors=2)
    with pytest.raises(ConfigurationError, match="--partition-by is for --format parquet, not jsonl"):
        ExportConfig(output="a", format="jsonl", partition_by="status")
    for name in ("num_samples", "max_list", "num_objects", "num_cpus"):
        with pytest.raises(ConfigurationError, match=f"--{name.replace('_', '-')} must be at least 1, got 0"):
            PlanConfig(source="a", **{name: 0})
    for name in ("price_per_hour", "price_per_1000_gets", "price_per_1000_puts", "num_gpus"):
        with pytest.raises(ConfigurationError, match=f"--{name.replace('_', '-')} must not be negative, got -1"):
            PlanConfig(source="a", **{name: -1})


def test_limits_and_decoding_come_from_the_options() -> None:
    config = CaptionConfig(source="a", output="b", max_bytes=5, max_pixels=7, beam_size=2)
    assert config.limits == ImageLimits(max_bytes=5, max_pixels=7)
    assert config.decoding_overrides == {"beam_size": 2, "length_penalty": None, "max_length": None}
    assert CaptionConfig(source="a", output="b").limits == ImageLimits()


def test_config_is_frozen_and_reaches_workers_unchanged() -> None:
    config = CaptionConfig(source="a", output="b", num_actors=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_actors = 4  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
