"""TensorBoard files of a training: what is in them, and that a resumed training draws its curves once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raycap.evaluate.overlay import OVERLAY_PX
from raycap.model.beam import beam_search
from raycap.train.config import StageKind
from raycap.train.job import Job
from raycap.train.loop import Learner
from raycap.train.monitor import Monitor
from raycap.train.stages import Place, run_stages
from tests.test_train_stages import run
from tests.training import (
    FEATURES_NPC,
    VOCABULARY,
    half_trained,
    one_thread,  # noqa: F401  # for the whole module
    read_pixels,
    tiny_job,
    tiny_learner,
)

OF_BATCHES = {"train/loss", "train/learning_rate", "train/grad_norm", "train/images_per_s"}
OF_SAMPLES = {"train/reward", "train/sample_words"}
OF_EPOCHS = {"val/cider_d", "val/bleu_4"}


def written(job: Job) -> EventAccumulator:
    """All that TensorBoard shows of the run."""
    found = EventAccumulator(
        f"{job.config.run_path}/tensorboard", size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    found.Reload()
    return found


def curve(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def watched(job: Job, kind: StageKind, lines: list[str]) -> tuple[Monitor, Learner]:
    monitor, learner = Monitor(job, lines.append), tiny_learner(job.config, kind, network=half_trained())
    monitor.begin(learner.stage, learner.data.steps_per_epoch, 0)
    return monitor, learner


@pytest.mark.parametrize("kind", ["cross_entropy", "self_critical"])
def test_tensorboard_holds_what_batches_and_epochs_gave(kind: StageKind, tmp_path: Path) -> None:
    """The second stage's steps follow those of the first, of two epochs of two batches."""
    job = tiny_job(tmp_path, half_trained(), epochs=2, scst_epochs=2)
    job.val_store.write("1.png", b"no picture")
    lines: list[str] = []
    monitor, learner = watched(job, kind, lines)
    before = 4 if kind == "self_critical" else 0
    reported: list[dict[str, float]] = []

    def on_step(step: int, metrics: dict[str, float]) -> None:
        monitor.on_step(step, metrics)
        reported.append(metrics)

    learner.train_epoch(0, on_step)
    scores = {"cider_d": 0.5, "bleu_4": 0.25, "train_loss": 1.5, "epoch_s": 2.0}
    monitor.on_epoch(1, scores, improved=True, network=learner.averaged_network)
    monitor.end()

    found = written(job)
    names = [f"{n}.png" for n in (0, 2, 3, 4)]
    assert set(found.Tags()["scalars"]) == OF_BATCHES | OF_EPOCHS | (OF_SAMPLES if before else set())
    assert set(found.Tags()["tensors"]) == {f"captions/{name}/text_summary" for name in names}
    assert set(found.Tags()["images"]) == {f"attention/{name}" for name in names}
    for tag in found.Tags()["scalars"]:
        if tag in OF_EPOCHS:
            assert curve(found, tag) == [(before + 2, scores[tag.removeprefix("val/")])]
        else:
            steps, values = zip(*curve(found, tag), strict=True)
            assert steps == (before + 1, before + 2)
            assert values == pytest.approx([metrics[tag] for metrics in reported])
    decoder = learner.averaged_network.decoder
    captions = [VOCABULARY.decode(best[0].tokens) for best in beam_search(decoder, FEATURES_NPC, job.config.decoding)]
    for n, name in zip((0, 2, 3, 4), names, strict=True):
        (text,) = found.Tensors(f"captions/{name}/text_summary")
        assert (text.step, [value.decode() for value in text.tensor_proto.string_val]) == (before + 2, [captions[n]])
        (strip,) = found.Images(f"attention/{name}")
        assert strip.step == before + 2
        assert strip.width == pytest.approx((len(captions[n].split()) + 1) * (OVERLAY_PX + 4) - 4)
    assert lines[-1] == (
        f"{kind} epoch 1/2 done in 2 s  train loss 1.500  validation CIDEr-D 50.0  BLEU-4 25.0 (best so far)"
    )
    assert lines[0].startswith(f"{kind} epoch 1/2  batch 1/2  {'reward' if before else 'loss'} ")


def test_a_resumed_training_draws_its_curves_once(tmp_path: Path) -> None:
    """From the first checkpoint on, everything comes again."""
    job = tiny_job(tmp_path, half_trained(), epochs=2, scst_epochs=1, checkpoint_every=1)
    straight = run(job, tmp_path / "straight")
    once = written(job)
    for checkpoint in straight.checkpoints[0], straight.checkpoints[4]:
        run(job, tmp_path / f"from-{checkpoint.name}", resume_from=checkpoint)
        again = written(job)
        assert again.Tags() == once.Tags()
        for tag in set(once.Tags()["scalars"]) - {"train/images_per_s"}:
            assert curve(again, tag) == curve(once, tag)
    assert [step for step, _ in curve(once, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curve(once, "val/cider_d")] == [2, 4, 6]


def test_the_curves_are_as_far_as_each_checkpoint(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, epochs=2, checkpoint_every=1)
    steps: list[list[int]] = []
    lines: list[str] = []

    def report(metrics: dict[str, Any], checkpoint: Path | None) -> None:
        steps.append([step for step, _ in curve(written(job), "train/loss")])

    cpu = torch.device("cpu")
    run_stages(job, Place(device=cpu, cache_dir=tmp_path, tell=lines.append, report=report, read_pixels=read_pixels))
    assert steps == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]


def test_a_stage_with_fewer_batches_follows_the_one_before(tmp_path: Path) -> None:
    """The CNN learnt from eight images; of two of them there are no features."""
    job = tiny_job(tmp_path, fine_tune_epochs=2, epochs=0, scst_epochs=1, batch_size=2)
    fine_tune, self_critical = job.config.stages
    lines: list[str] = []
    monitor = Monitor(job, lines.append)
    for stage, steps_per_epoch in ((fine_tune, 4), (self_critical, 3)):
        monitor.begin(stage, steps_per_epoch, 0)
        for step in range(1, stage.epochs * steps_per_epoch + 1):
            monitor.on_step(step, {"train/loss": float(step), "train/images_per_s": 1.0})
        monitor.end()
    assert curve(written(job), "train/loss") == [(n, float(n)) for n in range(1, 9)] + [(8 + n, n) for n in (1, 2, 3)]
