"""The training loop: it learns, it repeats, it resumes, and several workers are one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycap.errors import ConfigurationError
from raycap.model.beam import beam_search
from raycap.model.config import DecoderKind, DecodingConfig
from raycap.model.vocabulary import BOS
from raycap.train.config import StageKind
from raycap.train.data import CaptionData, in_order_of_time
from raycap.train.loop import Learner
from raycap.train.schedule import learning_rate_share
from tests.naive import naive_loss_sum
from tests.small import KINDS
from tests.training import (
    ALL_STAGES,
    FEATURES_NPC,
    IMAGES,
    PIXELS_NHWC,
    VOCABULARY,
    assert_equal,
    copied,
    from_memory,
    gradients,
    losses,
    one_thread,  # noqa: F401  # for the whole module
    tiny_config,
    tiny_data,
    tiny_learner,
    tiny_network,
    trained,
)

STAGE_KINDS: tuple[StageKind, ...] = ("cross_entropy", "fine_tune", "self_critical")


@pytest.mark.parametrize("stage", STAGE_KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_weights(kind: DecoderKind, stage: StageKind) -> None:
    runs = []
    for seed in (0, 0, 1):
        learner = tiny_learner(tiny_config(decoder=kind, seed=seed, **ALL_STAGES), stage)
        runs.append((losses(learner), copied(learner.scorer)))
        torch.rand(3)  # whatever else draws numbers in between
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert_equal(runs[0][1], runs[1][1])


class PowerCutError(Exception):
    """Ends a run."""


@pytest.mark.parametrize(
    "settings", [{}, {"scheduled_sampling": 1.0}, {"images_per_pass": 1, "scst_baseline": "greedy"}]
)
@pytest.mark.parametrize("stage", STAGE_KINDS)
@pytest.mark.parametrize("stopped_after", [4, 5])
def test_a_resumed_run_equals_one_that_was_never_stopped(
    stage: StageKind, stopped_after: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Four batches an epoch: between two epochs, and in the second."""
    config = tiny_config(batch_size=2, **ALL_STAGES, **settings)
    straight, stopped, resumed = (tiny_learner(config, stage) for _ in range(3))
    means = [straight.train_epoch(epoch)["train_loss"] for epoch in range(2)]

    def power_cut(step: int, metrics: dict[str, float]) -> None:
        if step == stopped_after:
            torch.save(stopped.state_dict(), tmp_path / "state.pt")
            raise PowerCutError

    with pytest.raises(PowerCutError):
        for epoch in range(2):
            stopped.train_epoch(epoch, power_cut)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.rand(3)  # the state of the random numbers is another
    rest = [resumed.train_epoch(epoch)["train_loss"] for epoch in range(stopped_after // 4, 2)]
    assert rest == means[stopped_after // 4 :]
    assert_equal(copied(resumed.scorer), copied(straight.scorer))
    assert_equal(copied(resumed.averaged_network), copied(straight.averaged_network))
    assert resumed.step == straight.step == 8


def captions_by(learner: Learner) -> list[str]:
    found = beam_search(learner.averaged_network.decoder, FEATURES_NPC, DecodingConfig())
    return [VOCABULARY.decode(hypotheses[0].tokens) for hypotheses in found]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_eight_images_by_heart(kind: DecoderKind) -> None:
    config = tiny_config(
        decoder=kind, epochs=150, batch_size=4, dropout=0.0, label_smoothing=0.0, hidden_size=32, learning_rate=2e-2
    )
    captions = [image.captions[0] for image in IMAGES]
    data = tiny_data(config)
    one_each = CaptionData(**(vars(data) | {"captions": [[VOCABULARY.encode(caption)] for caption in captions]}))
    learner = tiny_learner(config, data=one_each)
    learnt = losses(learner, 150)
    assert learnt[-1] < 0.1 < 1 < learnt[0]
    assert captions_by(learner) == captions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_tokens(label_smoothing: float, kind: DecoderKind) -> None:
    config = tiny_config(decoder=kind, dropout=0.0, label_smoothing=label_smoothing, batch_size=8, epochs=1)
    decoder, data = tiny_network(config).decoder.eval(), tiny_data(config)
    losses_of_captions = [
        naive_loss_sum(decoder, FEATURES_NPC[image : image + 1], tokens, label_smoothing=label_smoothing)
        for image, captions in enumerate(data.captions)
        for tokens in captions
    ]
    num_tokens = sum(len(tokens) - 1 for captions in data.captions for tokens in captions)
    assert losses(tiny_learner(config), 1) == [pytest.approx(sum(losses_of_captions) / num_tokens, rel=1e-4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["cross_entropy", "fine_tune"])
def test_parts_of_a_batch_learn_what_it_learns_whole(kind: DecoderKind, stage: StageKind) -> None:
    """Images have captions of unequal numbers of tokens, and seven are no multiple of the parts."""
    runs = []
    for images_per_pass in (None, 4, 3, 1):
        config = tiny_config(decoder=kind, dropout=0.0, batch_size=7, images_per_pass=images_per_pass, **ALL_STAGES)
        learner = tiny_learner(config, stage)
        taken: list[int] = []
        learner.scorer.register_forward_pre_hook(lambda scorer, args, taken=taken: taken.append(len(args[0])))
        runs.append((losses(learner, 1), gradients(learner), copied(learner.scorer)))
        assert (sum(taken), max(taken) <= (images_per_pass or 7)) == (7, True)
    for loss, grads, weights in runs[1:]:
        assert loss == pytest.approx(runs[0][0], rel=1e-5)
        torch.testing.assert_close(grads, runs[0][1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights, runs[0][2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", ["cross_entropy", "fine_tune"])
def test_unreadable_images_change_nothing(stage: StageKind) -> None:
    config = tiny_config(dropout=0.0, batch_size=8, **ALL_STAGES)
    inputs = (PIXELS_NHWC if stage == "fine_tune" else FEATURES_NPC).clone()
    inputs[[2, 5]] = 0
    without = tiny_learner(config, stage, data=tiny_data(config, failed=("2.png", "5.png")))
    with_them = tiny_learner(config, stage, read=from_memory(inputs, unreadable=(2, 5)))
    assert losses(with_them, 1) == pytest.approx(losses(without, 1), rel=1e-5)
    torch.testing.assert_close(gradients(with_them), gradients(without), rtol=1e-4, atol=1e-6)


def test_a_batch_of_unreadable_images_alone_teaches_nothing() -> None:
    config = tiny_config(batch_size=4, epochs=1)
    first = next(tiny_data(config).epoch(0)).images_B.tolist()
    learner = tiny_learner(config, read=from_memory(FEATURES_NPC, unreadable=first))
    history = [copied(learner.scorer)]
    reported: list[float] = []

    def note(step: int, metrics: dict[str, float]) -> None:
        reported.append(metrics["train/loss"])
        history.append(copied(learner.scorer))

    learner.train_epoch(0, note)
    assert reported[0] == 0.0 < reported[1]
    assert_equal(history[1], history[0])


@pytest.mark.parametrize("stage", ["cross_entropy", "fine_tune"])
def test_an_epoch_of_unreadable_images_alone_is_an_error(stage: StageKind) -> None:
    inputs = PIXELS_NHWC if stage == "fine_tune" else FEATURES_NPC
    learner = tiny_learner(tiny_config(**ALL_STAGES), stage, read=from_memory(inputs, unreadable=range(8)))
    with pytest.raises(ConfigurationError, match=r"none of the training images of epoch 1 can be read; .*--images"):
        learner.train_epoch(0)


def test_scheduled_sampling_changes_what_is_read_and_not_what_is_said() -> None:
    config = tiny_config(scheduled_sampling=1.0, epochs=4, batch_size=8, dropout=0.0, label_smoothing=0.0)
    learner, again = tiny_learner(config), tiny_learner(config)
    read: list[Tensor] = []

    def record(decoder: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # not while it is asked for its own words
            read.append(args[2])

    learner.network.decoder.register_forward_pre_hook(record)
    changed: list[float] = []
    for epoch in range(4):
        before = copy.deepcopy(learner.network.decoder)
        part, inputs, readable_B = next(learner.read(learner.data.epoch(epoch)))
        batch = learner.data.references(part, inputs, readable_B)
        loss = learner.train_epoch(epoch)["train_loss"]
        with torch.no_grad():
            logits_MV, targets_M = before(inputs, batch.image_N, read[-1], batch.lengths_N)
        _, targets_M = in_order_of_time(batch.tokens_NT, batch.lengths_N)
        assert loss == pytest.approx(F.cross_entropy(logits_MV, targets_M).item(), rel=1e-5)
        assert (read[-1][:, 0] == BOS).all()
        changed.append((read[-1] != batch.tokens_NT).sum().item() / batch.num_tokens)
    assert changed[0] == 0 < changed[1] < changed[3], "more and more"
    trained(again, 4)
    assert_equal(copied(again.scorer), copied(learner.scorer))


@pytest.mark.parametrize("settings", [{}, {"scheduled_sampling": 0.5}], ids=str)
@pytest.mark.parametrize("stage", STAGE_KINDS)
def test_bfloat16_learns(stage: StageKind, settings: dict[str, Any]) -> None:
    config = tiny_config(
        epochs=20, fine_tune_epochs=20, scst_epochs=1, precision="bfloat16", dropout=0.0, fine_tune_learning_rate=1e-2,
        **settings,
    )  # fmt: skip
    learner = tiny_learner(config, stage)
    before = copied(learner.scorer)
    learnt = losses(learner, learner.stage.epochs)
    assert all(math.isfinite(loss) for loss in learnt)
    assert stage == "self_critical" or learnt[-1] < 0.85 * learnt[0]
    assert [name for name, p in learner.scorer.named_parameters() if torch.equal(p, before[name])] == []
    assert [name for name, p in learner.scorer.named_parameters() if name not in gradients(learner)] == []
    assert {p.dtype for p in learner.scorer.parameters()} == {torch.float32}


def with_scale(learner: Learner, scale: float) -> Learner:
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": scale})
    return learner


@pytest.mark.parametrize("stage", STAGE_KINDS)
def test_float16_leaves_out_what_overflows_and_learns_the_rest(stage: StageKind) -> None:
    config = tiny_config(precision="float16", epochs=8, fine_tune_epochs=8, scst_epochs=8)
    learner = with_scale(tiny_learner(config, stage), 2.0**24)
    history = [copied(learner.scorer)]
    overflowed: list[bool] = []

    def note(step: int, metrics: dict[str, float]) -> None:
        overflowed.append(not math.isfinite(metrics["train/grad_norm"]))
        if overflowed[-1]:
            assert_equal(copied(learner.scorer), history[-1])
        history.append(copied(learner.scorer))

    for epoch in range(8):
        learner.train_epoch(epoch, note)
    assert overflowed[0] and not overflowed[-1]
    assert [name for name, p in learner.scorer.named_parameters() if torch.equal(p, history[0][name])] == []


def test_float16_gradients_are_clipped_after_their_scale_is_taken_back() -> None:
    runs = []
    for precision in ("float32", "float16"):
        learner = tiny_learner(tiny_config(precision=precision, dropout=0.0, max_grad_norm=0.1, epochs=1, batch_size=8))
        (metrics,) = trained(learner, 1)
        norm = torch.cat([gradient.flatten() for gradient in gradients(learner).values()]).norm().item()
        assert norm == pytest.approx(0.1, rel=1e-3)
        runs.append(metrics["train/grad_norm"])
    assert runs[1] == pytest.approx(runs[0], rel=2e-2)
    assert runs[0] > 0.2


def test_a_resumed_run_goes_on_with_its_scale() -> None:
    config = tiny_config(precision="float16", epochs=2)
    straight, resumed = with_scale(tiny_learner(config), 2.0**24), tiny_learner(config)
    straight.train_epoch(0)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert resumed.train_epoch(1)["train_loss"] == straight.train_epoch(1)["train_loss"]
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()
    assert_equal(copied(resumed.scorer), copied(straight.scorer))


def test_the_optimizer_is_fused_though_a_checkpoint_is_of_one_that_was_not() -> None:
    straight, resumed = (tiny_learner(tiny_config()) for _ in range(2))
    straight.train_epoch(0)
    state = copy.deepcopy(straight.state_dict())
    for group in state["optimizer"]["param_groups"]:
        assert group["fused"]
        group["fused"] = None
    resumed.load_state_dict(state)
    assert all(group["fused"] for group in resumed.optimizer.param_groups)
    assert resumed.train_epoch(1)["train_loss"] == straight.train_epoch(1)["train_loss"]
    assert_equal(copied(resumed.scorer), copied(straight.scorer))


def test_the_learning_rate_climbs_and_falls() -> None:
    shares = [learning_rate_share(step, 10, 110) for step in range(110)]
    assert shares[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert shares[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 100)) for n in range(100)])
    assert learning_rate_share(110, 10, 110) == pytest.approx(0, abs=1e-12)
    assert learning_rate_share(200, 10, 110) == pytest.approx(0, abs=1e-12)
    assert learning_rate_share(0, 0, 5) == 1.0
    assert learning_rate_share(0, 10, 1) == 1.0, "one batch in all"
    assert max(learning_rate_share(step, 10, 6) for step in range(6)) == 1.0, "fewer batches than the warm-up"


def test_encoder_and_decoder_have_rates_of_their_own() -> None:
    config = tiny_config(**ALL_STAGES, warmup_steps=0, fine_tune_learning_rate=1e-3, encoder_learning_rate=0.0)
    learner = tiny_learner(config, "fine_tune")
    before = copied(learner.scorer)
    reports = trained(learner)
    assert [metrics["train/learning_rate"] for metrics in reports] == [
        1e-3 * learning_rate_share(step, 0, 4) for step in range(4)
    ]
    after = copied(learner.scorer)
    for name, parameter in learner.scorer.named_parameters():
        assert torch.equal(after[name], before[name]) == name.startswith("encoder"), name
        assert parameter.grad is not None


@pytest.mark.parametrize("stage", STAGE_KINDS)
def test_the_encoder_learns_in_its_stage_alone(stage: StageKind) -> None:
    learner = tiny_learner(tiny_config(encoder_learning_rate=1e-3, **ALL_STAGES), stage)
    before = copied(learner.network.encoder)
    trained(learner)
    for encoder in (learner.network.encoder, learner.averaged_network.encoder):
        after = encoder.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        learns = {name for name, _ in encoder.named_parameters()} if stage == "fine_tune" else set()
        assert moved == learns, "the statistics of batch normalisation never move"


def test_frozen_stages_stay_as_they_are() -> None:
    config = tiny_config(frozen_stages=1, weight_decay=0.1, encoder_learning_rate=1e-3, **ALL_STAGES)
    network = tiny_network(config)
    stages = [nn.Sequential(nn.Conv2d(6, 6, 1)) for _ in range(3)]
    network.encoder.backbone = nn.Sequential(network.encoder.backbone, *stages)
    learner = tiny_learner(config, "fine_tune", network=network)
    before = copied(network.encoder)
    trained(learner)
    for encoder in (network.encoder, learner.averaged_network.encoder):
        after = encoder.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {f"backbone.{stage}.0.{name}" for stage in (2, 3) for name in ("weight", "bias")}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_averaged_weights_equal_the_naive_average(decay: float) -> None:
    learner = tiny_learner(tiny_config(ema_decay=decay, epochs=8))
    history: list[dict[str, Tensor]] = []
    for epoch in range(8):
        learner.train_epoch(epoch, lambda step, metrics: history.append(copied(learner.network.decoder)))
    assert len(history) == 16
    for name, averaged in copied(learner.averaged_network.decoder).items():
        expected = history[0][name].double()
        for n, weights in enumerate(history[1:], start=1):
            share = min(decay, (1 + n) / (10 + n))
            expected = share * expected + (1 - share) * weights[name].double()
        torch.testing.assert_close(averaged.double(), expected, rtol=1e-5, atol=1e-6)
    assert not learner.averaged_network.training


@pytest.mark.parametrize("stage", STAGE_KINDS)
def test_every_batch_is_reported(stage: StageKind) -> None:
    learner = tiny_learner(tiny_config(**ALL_STAGES), stage)
    steps: list[int] = []
    names = {"train/loss", "train/learning_rate", "train/grad_norm", "train/images_per_s"}

    def check(step: int, metrics: dict[str, float]) -> None:
        steps.append(step)
        assert metrics.keys() == names | ({"train/reward", "train/sample_words"} if stage == "self_critical" else set())
        assert all(math.isfinite(value) for value in metrics.values())

    for epoch in range(2):
        learner.train_epoch(epoch, check)
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(("precision", "batch"), [("float32", 1), ("bfloat16", 1), ("float16", 28)])
def test_divergence_is_named_and_spares_the_weights(precision: str, batch: int) -> None:
    """With float16 it may be an overflow, until the scale is so small that it is none."""
    learner = tiny_learner(tiny_config(precision=precision, epochs=20))
    with torch.no_grad():
        learner.network.decoder.output_bias[0] = float("nan")
    before = copied(learner.network.decoder.embedding)
    with pytest.raises(
        ConfigurationError,
        match=rf"training diverged: at batch {batch} the loss is nan .*lower the learning rate, now 0\.01",
    ):
        trained(learner, 20)
    assert_equal(copied(learner.network.decoder.embedding), before)
