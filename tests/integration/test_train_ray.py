"""`raycap.train.on_ray.train` for real: Ray Train with two workers on gloo, pictures, a bundle that captions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from raycap.errors import ConfigurationError, NotFoundError
from raycap.model.bundle import Bundle
from raycap.model.captioner import Captioner
from raycap.storage import open_store
from raycap.storage.lock import OutputLock
from raycap.train.config import TrainConfig
from raycap.train.on_ray import LOCK, train
from tests.hostile import encode

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray", "no_aws_settings")]

COLOURS = ("red", "green", "blue", "white")
SHAPES = ("square", "circle", "stripe")


def picture(colour: str, shape: str) -> bytes:
    image = Image.new("RGB", (64, 64), "black")
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((8, 8, 56, 56), fill=colour)
    else:
        draw.rectangle((8, 8, 56, 56) if shape == "square" else (0, 26, 64, 38), fill=colour)
    return encode(image, "PNG")


def write_dataset(directory: Path) -> None:
    """Twelve pictures with two captions each, one of which is no picture, and one that is not there."""
    (directory / "images").mkdir(parents=True)
    images, annotations = [], []
    for n, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES):
        (directory / "images" / f"{n}.png").write_bytes(picture(colour, shape) if n != 5 else b"no picture")
        images.append({"id": 100 + n, "file_name": f"{n}.png"})
        annotations += [
            {"image_id": 100 + n, "caption": text} for text in (f"a {colour} {shape}", f"one {colour} {shape}")
        ]
    images.append({"id": 999, "file_name": "missing.png"})
    annotations.append({"image_id": 999, "caption": "a red square"})
    (directory / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train")
    write_dataset(path)
    return path


@pytest.fixture(scope="module")
def config(directory: Path) -> TrainConfig:
    return TrainConfig(
        annotations=str(directory / "captions.json"),
        images=str(directory / "images"),
        val_annotations=str(directory / "captions.json"),
        output=str(directory / "bundle"),
        run_dir=str(directory / "runs"),
        size_px=64,
        hidden_size=32,
        attention_size=16,
        min_count=1,
        max_length=5,
        epochs=2,
        fine_tune_epochs=1,
        scst_epochs=1,
        batch_size=4,
        learning_rate=1e-2,
        num_workers=2,
        cpus_per_worker=1,
        log_every_s=0.0,
    )


@pytest.fixture(scope="module")
def trained(config: TrainConfig, local_ray: None) -> tuple[dict[str, Any], list[str]]:
    """The metrics, and the progress lines. The run's directory is given relative to the present one, as users do."""
    with contextlib.chdir(Path(config.run_dir).parent):
        return train_and_listen(dataclasses.replace(config, run_dir="runs"))


def train_and_listen(config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("raycap")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        return train(config), lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_two_workers_train_a_bundle_that_captions(
    trained: tuple[dict[str, Any], list[str]], config: TrainConfig, directory: Path
) -> None:
    metrics, lines = trained
    bundle = Bundle.load(config.output)
    assert bundle.metrics["scores"] == metrics["scores"]
    assert metrics["num_images"] == 11, "the picture that is none and the missing one are not scored"
    assert {"bleu_4", "cider_d"} <= metrics["scores"].keys()
    assert bundle.metrics["training"]["annotations"] == "captions.json"
    assert str(directory) not in bundle.card + json.dumps(bundle.metrics)
    assert bundle.preprocessing.size_px == 64
    assert {"red", "square", "one"} <= set(bundle.vocabulary.words)

    captioner = Captioner(bundle, device="cpu")
    pixels = [captioner.prepare(picture(colour, "square")) for colour in COLOURS]
    for caption in captioner.caption(pixels):
        assert set(caption.text.split()) <= set(bundle.vocabulary.words)
        assert len({caption.text, *(a.text for a in caption.alternatives)}) == 3

    assert any((directory / "runs" / "features").iterdir())
    assert any((directory / "runs" / "bundle" / "tensorboard").iterdir())

    told = "\n".join(lines)
    assert "training on 13 images (25 captions), validating on 13" in told
    for stage, epochs in (("cross_entropy", 2), ("fine_tune", 1), ("self_critical", 1)):
        assert f"{stage} epoch {epochs}/{epochs} done" in told
    for split in ("training", "validation"):
        assert told.count(f"2 {split} images cannot be used, such as ") == 1
    assert "wrote bundle efficientnet_lite0-attention-" in told


def test_images_that_ray_data_cannot_read_are_told_once_and_named(
    trained: tuple[dict[str, Any], list[str]], config: TrainConfig, directory: Path
) -> None:
    tuned = TrainConfig(
        annotations=config.annotations, images=config.images, val_annotations=config.val_annotations,
        init=config.output, output=str(directory / "tuned"), run_dir=config.run_dir, max_length=5, batch_size=12,
        epochs=0, fine_tune_epochs=2, num_workers=2, cpus_per_worker=1,
    )  # fmt: skip
    _, lines = train_and_listen(tuned)
    named = directory / "runs" / "tuned" / "unusable-images.json"
    about = [line for line in lines if "cannot be used" in line]
    counted = [line for line in about if f"all are named in {named}" in line]
    assert sorted(line[:32] for line in counted) == [
        "2 training images cannot be used",
        "2 validation images cannot be us",
    ]
    assert len(about) <= 3, "the first worker may tell of its first one while the epoch runs"
    content = json.loads(named.read_text())
    assert content["training"].keys() == content["validation"].keys() == {"5.png", "missing.png"}
    assert content["training"]["5.png"].startswith("not_an_image: ")


def test_two_drivers_do_not_share_a_run(trained: tuple[dict[str, Any], list[str]], config: TrainConfig) -> None:
    with (
        OutputLock(open_store(config.run_path), LOCK, beat_s=0.1),
        pytest.raises(ConfigurationError, match=r"runs/bundle is being written by another run .*process \d+"),
    ):
        train(config)
    assert not (Path(config.run_path) / LOCK).exists()


def test_the_best_checkpoints_are_kept_besides_the_last(
    trained: tuple[dict[str, Any], list[str]], config: TrainConfig, directory: Path
) -> None:
    """Two of four epochs', and the last one's if it is another."""
    scores = [line.partition("CIDEr-D ")[2].split()[0] for line in trained[1] if "validation CIDEr-D" in line]
    assert (len(scores), config.keep_checkpoints) == (4, 2)
    run = directory / "runs" / "bundle"
    noted = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    kept = {
        result["checkpoint_dir_name"]: f"{100 * result['metrics']['cider_d']:.1f}"
        for result in noted["checkpoint_results"]
    }
    assert {path.name for path in run.glob("checkpoint_2*")} == kept.keys()
    last = noted["latest_checkpoint_result"]["checkpoint_dir_name"]
    assert kept[last] == scores[-1]
    assert len(kept) <= 3
    assert sorted(map(float, kept.values()))[-2:] == sorted(map(float, scores))[-2:]


def test_the_same_command_again_does_not_train_again(
    trained: tuple[dict[str, Any], list[str]], config: TrainConfig, directory: Path
) -> None:
    before = Bundle.load(config.output).model_id
    metrics, lines = train_and_listen(dataclasses.replace(config, output=str(directory / "again"), name="bundle"))
    assert Bundle.load(str(directory / "again")).model_id == before
    assert metrics == trained[0]
    assert not [line for line in lines if "done in" in line or "encoding the images" in line]


def test_other_settings_under_the_same_name_are_refused(
    trained: tuple[dict[str, Any], list[str]], config: TrainConfig
) -> None:
    with pytest.raises(
        ConfigurationError, match=r"other settings \(learning_rate was 0\.01, is 0\.002\); .* another --name"
    ):
        train(dataclasses.replace(config, learning_rate=2e-3))


def test_what_is_wrong_is_said_before_workers_start(config: TrainConfig, directory: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere"):
        train(dataclasses.replace(config, images=str(directory / "nowhere")))
    with pytest.raises(ConfigurationError, match=r"nothing\.json: there is no such file"):
        train(dataclasses.replace(config, annotations=str(directory / "nothing.json")))
    (directory / "broken.json").write_text('{"images": [')
    with pytest.raises(ConfigurationError, match=r"broken\.json: not JSON"):
        train(dataclasses.replace(config, val_annotations=str(directory / "broken.json")))
    with pytest.raises(
        ConfigurationError,
        match=r"training needs 2 workers of 3 CPUs each, but Ray has a place for 0 .nodes: 1, CPUs: 2",
    ):
        train(dataclasses.replace(config, cpus_per_worker=3))


def test_a_worker_error_arrives_as_it_is(config: TrainConfig, directory: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"none of the 13 images of the annotations is here .* check that --images"
    ):
        train(dataclasses.replace(config, images=str(directory), output=str(directory / "never"), num_workers=1))
