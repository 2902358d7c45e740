"""The training loop: it learns, it repeats, it resumes, and several workers are one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from raycap.coco import CaptionedImage
from raycap.errors import ConfigurationError
from raycap.model.config import DecoderConfig, DecoderKind, DecodingConfig
from raycap.model.decoder import Decoder, build_decoder
from raycap.model.vocabulary import Vocabulary
from raycap.train.config import TrainConfig
from raycap.train.data import CaptionData
from raycap.train.features import Features
from raycap.train.loop import Learner, caption_features, learning_rate
from tests.naive import naive_loss_sum
from tests.small import KINDS

COLOURS = ("red", "green", "blue", "white")
IMAGES = [
    CaptionedImage(
        n, f"{n}.jpg", (f"a {COLOURS[n % 4]} dog {'runs' if n < 4 else 'sleeps'}", f"one {COLOURS[n % 4]} dog")
    )
    for n in range(8)
]
VOCABULARY = Vocabulary.from_captions((c for image in IMAGES for c in image.captions), min_count=1)
FEATURES = Features(np.random.default_rng(0).normal(size=(8, 2, 3, 6)).astype(np.float16), {})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small take many times as long on several threads when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "annotations": "a.json", "images": "i", "val_annotations": "v.json", "output": "o",
        "epochs": 2, "batch_size": 4, "hidden_size": 16, "attention_size": 8,
        "dropout": 0.3, "warmup_steps": 2, "learning_rate": 1e-2, "ema_decay": 0.9,
    }  # fmt: skip
    return TrainConfig(**(defaults | settings))


def learner(config: TrainConfig, *, rank: int = 0, world_size: int = 1, parallel: bool = False) -> Learner:
    torch.manual_seed(config.seed)
    decoder = build_decoder(
        DecoderConfig(
            kind=config.decoder,
            vocabulary_size=len(VOCABULARY),
            feature_size=6,
            hidden_size=config.hidden_size,
            attention_size=config.attention_size,
            dropout=config.dropout,
        )
    )
    data = CaptionData.encode(
        IMAGES, FEATURES, VOCABULARY, max_length=config.max_length, batch_size=config.batch_size,
        rank=rank, world_size=world_size, seed=config.seed,
    )  # fmt: skip
    return Learner(config, decoder, data, nn.parallel.DistributedDataParallel(decoder) if parallel else None)


def copied(decoder: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in decoder.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_weights(kind: DecoderKind) -> None:
    runs = []
    for seed in (0, 0, 1):
        trained = learner(config(decoder=kind, seed=seed))
        losses = [trained.train_epoch(epoch)["train_loss"] for epoch in range(2)]
        runs.append((losses, copied(trained.decoder)))
        torch.rand(3)  # whatever else draws numbers in between
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert_equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_one_that_was_never_stopped(kind: DecoderKind, tmp_path: Path) -> None:
    settings = config(decoder=kind, epochs=3)
    straight = learner(settings)
    for epoch in range(3):
        straight.train_epoch(epoch)

    stopped = learner(settings)
    stopped.train_epoch(0)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed = learner(replace(settings, seed=settings.seed))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for epoch in range(1, 3):
        resumed.train_epoch(epoch)
    assert_equal(copied(resumed.decoder), copied(straight.decoder))
    assert_equal(copied(resumed.best_decoder), copied(straight.best_decoder))
    assert resumed.step == straight.step == 6


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_eight_images_by_heart(kind: DecoderKind) -> None:
    images = [replace(image, captions=image.captions[:1]) for image in IMAGES]
    settings = config(
        decoder=kind, epochs=200, batch_size=4, dropout=0.0, label_smoothing=0.0, hidden_size=32, learning_rate=2e-2
    )
    trained = learner(settings)
    trained.data = CaptionData.encode(images, FEATURES, VOCABULARY, max_length=20, batch_size=4)
    losses = [trained.train_epoch(epoch)["train_loss"] for epoch in range(200)]
    assert losses[-1] < 0.1 < 1 < losses[0]
    captions = caption_features(trained.best_decoder, FEATURES, range(8), VOCABULARY, DecodingConfig(), batch_size=3)
    assert captions == [image.captions[0] for image in images]
    assert caption_features(trained.best_decoder, FEATURES, [], VOCABULARY, DecodingConfig()) == []
    assert caption_features(trained.best_decoder, FEATURES, [5], VOCABULARY, DecodingConfig()) == captions[5:6]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_tokens(label_smoothing: float) -> None:
    settings = config(dropout=0.0, label_smoothing=label_smoothing, batch_size=8, epochs=1)
    fresh, trained = learner(settings), learner(settings)
    reports: list[dict[str, float]] = []
    trained.train_epoch(0, lambda step, metrics: reports.append(metrics))
    (batch,) = fresh.data.epoch(0)
    expected = sum(
        naive_loss_sum(
            fresh.decoder.eval(),
            batch.features_BPC[image][None],
            tokens[:length].tolist(),
            label_smoothing=label_smoothing,
        )
        for image, tokens, length in zip(batch.image_N, batch.tokens_NT, batch.lengths_N, strict=True)
    )
    assert reports[0]["train/loss"] == pytest.approx(expected / batch.num_tokens, rel=1e-4)


def test_the_learning_rate_climbs_and_falls() -> None:
    settings = config(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate(step, settings, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 100)) for n in range(100)])
    assert learning_rate(110, settings, 110) == pytest.approx(0, abs=1e-12)
    assert learning_rate(200, settings, 110) == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, replace(settings, warmup_steps=0), 5) == 1.0
    assert learning_rate(0, settings, 1) == 1.0, "one batch in all"
    assert max(learning_rate(step, settings, 6) for step in range(6)) == 1.0, "fewer batches than the warm-up"


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_averaged_weights_equal_the_naive_average(decay: float) -> None:
    trained = learner(config(ema_decay=decay, epochs=8))
    history: list[dict[str, torch.Tensor]] = []
    for epoch in range(8):
        trained.train_epoch(epoch, lambda step, metrics: history.append(copied(trained.decoder)))
    assert len(history) == 16
    for name, averaged in copied(trained.best_decoder).items():
        expected = history[0][name].double()
        for n, weights in enumerate(history[1:], start=1):
            share = min(decay, (1 + n) / (10 + n))
            expected = share * expected + (1 - share) * weights[name].double()
        torch.testing.assert_close(averaged.double(), expected, rtol=1e-5, atol=1e-6)
    assert not trained.best_decoder.training


def test_every_batch_is_reported() -> None:
    trained = learner(config())
    steps: list[int] = []
    for epoch in range(2):
        trained.train_epoch(epoch, lambda step, metrics: check(steps, step, metrics))
    assert steps == [1, 2, 3, 4]


def check(steps: list[int], step: int, metrics: dict[str, float]) -> None:
    steps.append(step)
    assert metrics.keys() == {"train/loss", "train/learning_rate", "train/grad_norm", "train/images_per_s"}
    assert all(math.isfinite(value) for value in metrics.values())


def test_divergence_is_named_and_spares_the_weights() -> None:
    trained = learner(config())
    with torch.no_grad():
        trained.decoder.output_bias[0] = float("nan")
    before = copied(trained.decoder.embedding)
    with pytest.raises(
        ConfigurationError, match=r"training diverged: at batch 1 the loss is nan .*lower --learning-rate"
    ):
        trained.train_epoch(0)
    assert_equal(copied(trained.decoder.embedding), before)


def one_of_two(rank: int, kind: DecoderKind, directory: str) -> None:
    """A worker process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    try:
        trained = learner(settings_of_two(kind), rank=rank, world_size=2, parallel=True)
        for epoch in range(2):
            trained.train_epoch(epoch)
        torch.save(trained.decoder.state_dict(), Path(directory, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def settings_of_two(kind: DecoderKind) -> TrainConfig:
    """Without dropout, whose numbers differ between workers."""
    return config(decoder=kind, dropout=0.0, learning_rate=1e-3, max_grad_norm=0.5)


def test_two_workers_learn_what_one_learns(tmp_path: Path) -> None:
    """One worker with batches of 4, and two with 2 each (of unequal numbers of tokens), by gloo and DDP for real."""
    spawn(one_of_two, args=("attention", str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first, second)
    alone: Decoder = (single := learner(settings_of_two("attention"))).decoder
    fresh = copied(alone)
    for epoch in range(2):
        single.train_epoch(epoch)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=2e-5)
    moved = max((alone.state_dict()[name] - fresh[name]).abs().max().item() for name in fresh)
    assert moved > 1e-3, "the tolerance is far below what was learnt"
