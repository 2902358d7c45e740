"""The model card: how to make the model again, and nothing of the machine."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import pytest
import tyro

from raycap.train.card import LOCATIONS, NOT_IN_CARD, command_line, last_part, model_card, saved_settings
from raycap.train.config import TrainConfig

METRICS = {
    "scores": {"bleu_4": 0.201, "cider_d": 0.5}, "num_images": 1000, "tokenizer": "ptb", "epoch": 7,
    "stage": "fine_tune",
}  # fmt: skip


def config(**settings: Any) -> TrainConfig:
    required = {
        "annotations": "/data/flowers/train.json",
        "images": "/data/flowers/images/",
        "val_annotations": "s3://data/karpathy.json#val",
        "output": "/models/captioner",
    }
    return TrainConfig(**(required | settings))


def card(made: TrainConfig, **settings: Any) -> str:
    counts = {"num_images": 6000, "num_captions": 30000, "vocabulary_size": 2538}
    given: dict[str, Any] = {"encoder": "efficientnet_lite0", "decoder": "att2in", "fine_tuned": False} | counts
    return model_card(made, METRICS, **(given | settings))


def test_the_card_tells_what_was_trained() -> None:
    made = config(epochs=9, fine_tune_epochs=5, scst_epochs=2, data_notice="Pictures of flowers, CC0.", beam_size=4)
    text = card(made, fine_tuned=True)
    assert text.startswith("# captioner\n\nAn image captioner: efficientnet_lite0 (fine-tuned) with an LSTM that the ")
    assert (
        "Training: 9 epochs of cross-entropy with a frozen CNN, then 5 epochs of cross-entropy with a CNN that learns "
        "too, then 2 epochs of self-critical training on CIDEr-D (Rennie et al. 2017) with a frozen CNN.\n" in text
    )
    assert "6,000 images with 30,000 captions for training, 1,000 images for validation." in text
    assert "Vocabulary: 2,538 words." in text
    assert "Pictures of flowers, CC0." in text
    assert "beam size 4; tokenizer: ptb; epoch 7 of cross-entropy with a CNN that learns too, chosen by" in text
    assert "| - | 20.1 | - | - | 50.0 |" in text, "scores times 100; what Java would have computed is a dash"
    assert f"    {command_line(made)}\n" in text


def test_the_card_says_what_the_training_began_with() -> None:
    assert "Training, from the bundle v1: 15 epochs of" in card(config(init="/models/v1/"))


def test_the_card_says_whose_weights_the_encoder_has() -> None:
    begins = "An image captioner: efficientnet_lite0 ({}) with an LSTM".format
    from_bundle = config(init="/models/v1/", fine_tune_epochs=3)
    assert begins("fine-tuned") in card(from_bundle, fine_tuned=True)
    assert begins("as in the bundle v1") in card(from_bundle), "which may have been fine-tuned itself"
    assert begins("with its ImageNet weights") in card(config(fine_tune_epochs=3)), "the best network was one before"


def test_the_card_says_when_the_licence_is_unknown() -> None:
    assert "The licence of the training data was not stated." in card(config())


OTHERS: list[dict[str, Any]] = [
    {},
    {"flip": False, "learning_rate": 1e-3, "data_notice": 'it\'s CC0 -- "really"', "num_workers": 2},
    {
        "epochs": 0,
        "fine_tune_epochs": 3,
        "scst_epochs": 4,
        "scst_baseline": "greedy",
        "max_failures": -1,
        "patience": 2,
    },
    {
        "init": "/models/v1",
        "extend_vocabulary": True,
        "val_images": "s3://data/val/",
        "s3": {"endpoint_url": "http://h"},
    },
    {"decoder": "show_tell", "size_px": 96, "min_workers": 1, "use_gpu": True, "precision": "bfloat16", "crop": 1.0},
]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_the_command_gives_the_same_settings_again(settings: dict[str, Any]) -> None:
    default = config().s3
    made = config(**settings | {"s3": dataclasses.replace(default, **settings.get("s3", {}))})
    program, command, *words = shlex.split(command_line(made))
    assert (program, command) == ("raycap", "train")
    again = tyro.cli(TrainConfig, args=words)
    for field in dataclasses.fields(TrainConfig):
        value = getattr(made, field.name)
        if field.name in LOCATIONS and value is not None:
            assert getattr(again, field.name) == last_part(value)
        elif field.name not in NOT_IN_CARD:
            assert getattr(again, field.name) == value, field.name
    assert saved_settings(again) == saved_settings(made)


def test_defaults_are_left_out() -> None:
    assert shlex.split(command_line(config())) == [
        "raycap", "train", "--annotations", "train.json", "--images", "images",
        "--val-annotations", "karpathy.json#val", "--output", "captioner",
    ]  # fmt: skip


def test_nothing_tells_of_the_machine() -> None:
    made = config(
        run_dir="/scratch/me", cache_dir="/scratch/cache", name="secret", log_every_s=1.0, cpus_per_worker=3,
        ray_address="ray://10.0.0.1", init="/models/v1", val_images="s3://data/val", dry_run=True,
    )  # fmt: skip
    settings = saved_settings(made)
    assert settings["init"] == "v1"
    assert settings["learning_rate"] == made.learning_rate
    assert saved_settings(config())["val_images"] is None
    texts = [command_line(made), str(settings), card(dataclasses.replace(made, name=None))]
    for secret in ("/data", "/models", "s3://", "/scratch", "secret", "10.0.0.1", "log-every", "log_every", "dry"):
        assert not [text for text in texts if secret in text], secret
