"""A whole training on one worker, without Ray: stage after stage, stopped and resumed anywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from raycap.errors import ConfigurationError, ObjectError
from raycap.evaluate import score_captions
from raycap.images import decode_image
from raycap.storage import open_store
from raycap.train.export import STATE, Best, read_state, write_bundle
from raycap.train.job import Job
from raycap.train.stages import UNUSABLE, Place, run_stages
from tests.training import (
    IMAGES,
    PREPROCESSING,
    VOCABULARY,
    assert_equal,
    copied,
    half_trained,
    one_of_two,
    one_thread,  # noqa: F401  # for the whole module
    read_pixels,
    tiny_job,
)

THREE: dict[str, Any] = {
    "epochs": 4, "fine_tune_epochs": 2, "scst_epochs": 2, "dropout": 0.1, "learning_rate": 2e-2,
    "encoder_learning_rate": 1e-3, "scst_samples": 3, "max_length": 6,
}  # fmt: skip


@dataclass
class Run:
    """What a training told and reported."""

    directory: Path
    lines: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        return read_state(self.checkpoints[-1])

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """Their metrics, but for the time they took."""
        names = ("stage", "epoch", "train_loss", "cider_d", "bleu_4")
        return [{name: each[name] for name in names} for each in self.metrics if "epoch" in each]


def run(job: Job, directory: Path, resume_from: Path | None = None) -> Run:
    """All stages, keeping every checkpoint below `directory`."""
    result = Run(directory)

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        kept = directory / str(len(result.checkpoints))
        shutil.copytree(checkpoint, kept)
        result.metrics.append(metrics)
        result.checkpoints.append(kept)

    place = Place(
        device=torch.device("cpu"),
        cache_dir=directory / "cache",
        tell=result.lines.append,
        report=report,
        resume_from=resume_from,
        read_pixels=read_pixels,
    )
    run_stages(job, place)
    return result


def changed(job: Job, **settings: Any) -> Job:
    return replace(job, config=replace(job.config, **settings))


def best_of(state: dict[str, Any]) -> Best:
    return Best(**state["best"])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_three_stages_in_a_row(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, half_trained(dropout=0.1), **THREE)
    result = run(job, tmp_path / "run")
    assert [(each["stage"], each["epoch"]) for each in result.epochs] == [
        *(("cross_entropy", epoch) for epoch in (1, 2, 3, 4)),
        *(("fine_tune", epoch) for epoch in (1, 2)),
        *(("self_critical", epoch) for epoch in (1, 2)),
    ]
    states = [read_state(path) for path in result.checkpoints]
    assert [state["stage_done"] for state in states] == [False, False, False, True, False, True, False, True]
    best = best_of(states[-1])
    chosen = max(result.epochs, key=lambda each: each["cider_d"])
    assert (best.cider_d, best.stage, best.epoch) == (chosen["cider_d"], chosen["stage"], chosen["epoch"])
    assert best.cider_d > 0
    assert_equal(copied(job.start.single), copied(half_trained()))  # the start is left as it was
    # What is said of the best network is true of it.
    network = best.network(job.start).eval()
    pixels = [decode_image(job.val_store.read(image.file_name), PREPROCESSING).pixels_HWC for image in IMAGES]
    found = network.search(torch.from_numpy(np.stack(pixels)), job.config.decoding)
    captions = {image.image_id: VOCABULARY.decode(best[0].tokens) for image, best in zip(IMAGES, found, strict=True)}
    assert captions == best.captions
    references = {image.image_id: list(image.captions) for image in IMAGES}
    assert score_captions(references, captions, metrics=("cider_d",), tokenizer="python").values == {
        "cider_d": pytest.approx(best.cider_d)
    }


def test_each_stage_begins_with_the_best_so_far(tmp_path: Path) -> None:
    """A rate of next to nothing leaves the network as the stage found it."""
    still = {"fine_tune_learning_rate": 1e-30, "encoder_learning_rate": 1e-30, "scst_learning_rate": 1e-30}
    job = tiny_job(tmp_path, half_trained(), **THREE | still | {"epochs": 6, "learning_rate": 0.1, "ema_decay": 0.0})
    result = run(job, tmp_path / "run")
    states = [read_state(path) for path in result.checkpoints]
    best = best_of(states[5])
    for state in states[6:]:
        weights = {name.removeprefix("decoder."): tensor for name, tensor in state["learner"]["scorer"].items()}
        assert_equal({name: weights[name] for name in best.decoder}, best.decoder)
    assert best_of(states[-1]).epoch == best.epoch
    last = states[5]["learner"]["scorer"]
    assert not same({f"decoder.{name}": tensor for name, tensor in best.decoder.items()}, last), "not the last epoch's"


def test_the_best_survives_a_stage_that_makes_it_worse(tmp_path: Path) -> None:
    job = tiny_job(
        tmp_path, half_trained(), init="bundle", epochs=0, fine_tune_epochs=1, scst_epochs=1, max_length=6,
        fine_tune_learning_rate=100.0, encoder_learning_rate=100.0, ema_decay=0.0,
        scst_learning_rate=1e-30, warmup_steps=0,
    )  # fmt: skip
    result = run(job, tmp_path / "run")
    first, last = (read_state(path) for path in result.checkpoints)
    best = best_of(last)
    assert result.epochs[0]["cider_d"] < best.cider_d
    assert (best.stage, best.epoch, best.encoder) == ("fine_tune", 0, None), "as it was before the stage"
    start = copied(job.start.single)
    assert not same(start, first["learner"]["scorer"])
    assert_equal(copied(best.network(job.start)), start)
    assert result.epochs[1]["cider_d"] == pytest.approx(best.cider_d), "the features are those of the best encoder"


def test_a_fine_tuned_encoder_is_kept_with_its_decoder(tmp_path: Path) -> None:
    job = tiny_job(
        tmp_path, half_trained(), epochs=1, learning_rate=1e-30, fine_tune_epochs=8, scst_epochs=1, batch_size=2,
        fine_tune_learning_rate=1e-2, encoder_learning_rate=1e-2, scst_learning_rate=1e-30, ema_decay=0.0, dropout=0.0,
    )  # fmt: skip
    result = run(job, tmp_path / "run")
    best = best_of(result.last)
    assert best.stage == "fine_tune"
    assert best.encoder is not None
    assert not same(best.encoder, job.start.single.encoder.state_dict())
    assert_equal(copied(best.network(job.start).encoder), best.encoder)
    # The cache of the last stage rounds features to 16 bits, so a caption may differ.
    assert result.epochs[-1]["cider_d"] == pytest.approx(best.cider_d, rel=0.1)
    assert len(list(Path(job.config.features_path).iterdir())) == 4, "training and validation, of two encoders"


def test_patience_ends_a_stage_and_the_next_begins(tmp_path: Path) -> None:
    job = tiny_job(
        tmp_path, half_trained(), init="bundle", epochs=9, scst_epochs=9,
        learning_rate=1e-30, scst_learning_rate=1e-30, patience=2,
    )  # fmt: skip
    result = run(job, tmp_path / "run")
    assert [(each["stage"], each["epoch"]) for each in result.epochs] == [
        ("cross_entropy", 1), ("cross_entropy", 2), ("self_critical", 1), ("self_critical", 2),
    ]  # fmt: skip
    assert result.lines.count("no better validation CIDEr-D in 2 epochs: this stage ends") == 2
    assert best_of(result.last).epoch == 0
    # Resumed where the first stage has ended, though its epochs are not all done.
    again = run(job, tmp_path / "again", resume_from=result.checkpoints[1])
    assert again.epochs == result.epochs[2:]


def test_a_bundle_is_scored_before_it_learns(tmp_path: Path) -> None:
    network = half_trained()
    job = tiny_job(tmp_path, network, init="bundle", epochs=1, learning_rate=100.0, ema_decay=0.0, warmup_steps=0)
    result = run(job, tmp_path / "run")
    best = best_of(result.last)
    assert (best.stage, best.epoch) == ("cross_entropy", 0)
    assert best.cider_d > result.epochs[0]["cider_d"]
    assert_equal(best.decoder, copied(network.decoder))


@pytest.mark.parametrize("settings", [{}, {"patience": 1, "init": "bundle"}], ids=str)
def test_resuming_from_any_checkpoint_gives_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also from within epochs: the last of two batches is the epoch's end."""
    short = {"epochs": 2, "fine_tune_epochs": 1, "scst_epochs": 2, "checkpoint_every": 1}
    job = tiny_job(tmp_path, half_trained(dropout=0.1), **THREE | short | settings)
    straight = run(job, tmp_path / "straight")
    within = [each for each in straight.metrics if each["cider_d"] == -1]
    assert len(within) == len(straight.epochs), "of two batches an epoch, one"
    for number, checkpoint in enumerate(straight.checkpoints[:-1]):
        resumed = run(job, tmp_path / f"from-{number}", resume_from=checkpoint)
        assert resumed.epochs == straight.epochs[len(straight.epochs) - len(resumed.epochs) :]
        assert len(resumed.checkpoints) == len(straight.checkpoints) - number - 1
        assert_same_state(resumed.last, straight.last)


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    torch.testing.assert_close(one["learner"], other["learner"], rtol=0, atol=0)
    for name in ("stage", "epoch", "since_best", "stage_done", "identity"):
        assert one[name] == other[name]
    best, best_of_other = dict(one["best"]), dict(other["best"])
    assert_equal(best.pop("decoder"), best_of_other.pop("decoder"))
    assert_equal(best.pop("encoder") or {}, best_of_other.pop("encoder") or {})
    assert best == best_of_other


def test_resuming_says_where_and_the_end_has_nothing_left_to_do(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, epochs=2, checkpoint_every=1)
    straight = run(job, tmp_path / "straight")
    assert len(straight.checkpoints) == 4
    for number, line in (
        (0, "resuming in epoch 1, after 1 batches of 2 (cross_entropy) with 1 worker"),
        (1, "resuming after epoch 1 of 2 (cross_entropy) with 1 worker"),
    ):
        resumed = run(job, tmp_path / f"from-{number}", resume_from=straight.checkpoints[number])
        assert line in resumed.lines
    done = run(job, tmp_path / "done", resume_from=straight.checkpoints[-1])
    assert (done.metrics, done.lines) == ([], ["resuming after all epochs (cross_entropy) with 1 worker"])


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, epochs=1)
    (checkpoint,) = run(job, tmp_path / "run").checkpoints
    other = changed(job, learning_rate=0.5, seed=3)
    with pytest.raises(
        ConfigurationError,
        match=r"the run o in .*runs has begun with other settings \(learning_rate was 0\.01, is 0\.5, "
        r"seed was 0, is 3\); give the same ones to resume it, or another --name",
    ):
        run(other, tmp_path / "other", resume_from=checkpoint)
    allowed = changed(job, images_per_pass=2, checkpoint_every=7, data_notice="CC0", patience=3)
    assert run(allowed, tmp_path / "allowed", resume_from=checkpoint).metrics == []


def test_an_unreadable_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"cut short")
    with pytest.raises(ConfigurationError, match=r"the run's checkpoint cannot be read .* give another --name"):
        run(tiny_job(tmp_path), tmp_path / "run", resume_from=tmp_path)


def test_unreadable_images_are_left_out_counted_and_named(tmp_path: Path) -> None:
    """With a frozen CNN, and while it learns."""
    job = tiny_job(tmp_path, epochs=1, fine_tune_epochs=2, batch_size=2)
    job.train_store.write("3.png", b"no picture")
    job.train_store.delete("6.png")
    result = run(job, tmp_path / "run")
    named = Path(job.config.run_path) / UNUSABLE
    assert [line for line in result.lines if "cannot be used" in line] == [
        f"2 {split} images cannot be used, such as 3.png ({reason_of('3.png', job)}); all are named in {named}"
        for split in ("training", "validation")
    ], "once each"
    assert len(result.epochs) == 3
    assert best_of(result.last).captions.keys() == {image.image_id for image in IMAGES} - {103, 106}
    content = json.loads(named.read_text())
    assert {split: list(images) for split, images in content.items()} == {
        "training": ["3.png", "6.png"], "validation": ["3.png", "6.png"],
    }  # fmt: skip
    assert content["training"]["6.png"].startswith("not_found: ")


def reason_of(name: str, job: Job) -> str:
    with pytest.raises(ObjectError) as caught:
        decode_image(job.train_store.read(name), PREPROCESSING)
    return f"{caught.value.code}: {caught.value}"


def test_images_that_become_unreadable_while_the_cnn_learns_are_named(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, half_trained(), init="bundle", epochs=0, fine_tune_epochs=2, max_length=6)
    job.val_store.write("5.png", b"no picture")
    result = run(job, tmp_path / "run")
    lines = [line.partition(" (not_an_image: ")[0] for line in result.lines if "cannot be used" in line]
    assert sorted(lines) == [f"1 {split} images cannot be used, such as 5.png" for split in ("training", "validation")]
    content = json.loads((Path(job.config.run_path) / UNUSABLE).read_text())
    assert content["training"].keys() == content["validation"].keys() == {"5.png"}


def test_where_all_images_can_be_used_none_are_named(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, epochs=1, fine_tune_epochs=1)
    assert not [line for line in run(job, tmp_path / "run").lines if "cannot be used" in line]
    assert not (Path(job.config.run_path) / UNUSABLE).exists()


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, epochs=1)
    for image in IMAGES:
        job.train_store.write(image.file_name, b"no picture")
    with pytest.raises(ConfigurationError, match=r"none of the 8 images in .* can be read: not_an_image: "):
        run(job, tmp_path / "run")


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("train", r"none of the training images of epoch 1 can be read; .* --images"),
        (
            "val",
            r"none of the 8 validation images in .*pictures can be read, .* 0\.png \(not_an_image: .* --val-images",
        ),
    ],
)
def test_no_readable_image_is_an_error_while_the_cnn_learns_too(split: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    no_pictures = open_store(str(tmp_path / "pictures"))
    for image in IMAGES:
        no_pictures.write(image.file_name, b"no picture")
    job = replace(tiny_job(tmp_path, epochs=0, fine_tune_epochs=1), **{f"{split}_store": no_pictures})
    with pytest.raises(ConfigurationError, match=says):
        run(job, tmp_path / "run")


def run_together(rank: int, job: Job, directory: str) -> None:
    """A worker process."""
    lines: list[str] = []
    with one_of_two(rank, directory):
        place = Place(
            rank=rank,
            world_size=2,
            device=torch.device("cpu"),
            cache_dir=Path(directory),
            tell=lines.append,
            report=lambda metrics, checkpoint: None,
            read_pixels=read_pixels,
        )
        run_stages(job, place)
    Path(directory, f"lines-{rank}.json").write_text(json.dumps(lines))


@pytest.mark.integration
def test_of_two_workers_the_first_speaks_for_both(tmp_path: Path) -> None:
    """In a training that stops early."""
    job = tiny_job(
        tmp_path, half_trained(), init="bundle", epochs=0, fine_tune_epochs=3, patience=1, max_length=6,
        fine_tune_learning_rate=1e-30, encoder_learning_rate=1e-30,
    )  # fmt: skip
    spawn(run_together, args=(job, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"lines-{rank}.json").read_text()) for rank in range(2))
    assert first[-1] == "no better validation CIDEr-D in 1 epochs: this stage ends"
    assert any("fine_tune epoch 1/3 done" in line for line in first)
    assert second == []


def test_the_bundle_holds_the_best_network_with_its_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without Java, which takes seconds to start
    monkeypatch.delenv("JAVA_HOME", raising=False)
    job = tiny_job(tmp_path, half_trained(), epochs=1, fine_tune_epochs=1, output=str(tmp_path / "out"))
    result = run(job, tmp_path / "run")
    best = best_of(result.last)
    metrics = write_bundle(job, result.checkpoints[-1])
    assert (metrics["stage"], metrics["epoch"], metrics["num_images"]) == (best.stage, best.epoch, 8)
    assert metrics["split"] == "v.json"
    assert metrics["scores"]["cider_d"] > 0
    store = open_store(job.config.output)
    card = store.read("README.md").decode()
    assert f"({'with its ImageNet weights' if best.encoder is None else 'fine-tuned'})" in card
    assert str(tmp_path) not in card + store.read("metrics.json").decode() + store.read("config.json").decode()
    assert {info.key for info in store.list()} == {
        "README.md", "config.json", "metrics.json", "model.safetensors", "vocabulary.json",
    }  # fmt: skip
