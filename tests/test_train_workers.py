"""What two workers do together, by gloo for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from raycap.errors import ConfigurationError
from raycap.model.encoder import named_encoder
from raycap.storage import open_store
from raycap.train.config import StageKind, TrainConfig
from raycap.train.workers import Workers
from tests.training import (
    ALL_STAGES,
    Recording,
    assert_equal,
    copied,
    gradients,
    half_trained,
    losses,
    one_of_two,
    one_thread,  # noqa: F401  # for the whole module
    tiny_config,
    tiny_data,
    tiny_learner,
    trained,
)


def agree(rank: int, directory: str) -> None:
    """A worker process."""
    with one_of_two(rank, directory):
        workers = Workers(rank, 2)
        assert workers.from_first(lambda: ("made by", rank)) == ("made by", 0)
        assert workers.gathered({rank: "a", 7: f"of {rank}"}) == {0: "a", 1: "a", 7: "of 1"}
        workers.check_shared(open_store(f"{directory}/shared"))
        if rank == 0:
            workers.check_shared(open_store(f"{directory}/apart-0"))
        else:
            with pytest.raises(ConfigurationError, match=r"worker 1 does not see .*/apart-1: all workers must share"):
                workers.check_shared(open_store(f"{directory}/apart-1"))
            workers.barrier()  # the first one waits
        exchange_gradients_of_a_cnn_with_idle_parameters()


def exchange_gradients_of_a_cnn_with_idle_parameters() -> None:
    """Without `freeze` the second batch fails: the first still waits for gradients that never come."""
    encoder, _ = named_encoder("timm:convnext_atto", pretrained=False)
    encoder.freeze(0)
    wrapped = DistributedDataParallel(encoder)
    for _ in range(3):
        wrapped(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).sum().backward()


@pytest.mark.integration
def test_two_workers(tmp_path: Path) -> None:
    spawn(agree, args=(str(tmp_path),), nprocs=2)
    assert list((tmp_path / "shared").iterdir()) == []


def test_one_worker_is_alone(tmp_path: Path) -> None:
    workers = Workers(0, 1)
    workers.barrier()
    assert workers.from_first(lambda: 3) == 3
    assert workers.gathered({1: "a"}) == {1: "a"}
    workers.check_shared(open_store(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


SPLITS: list[tuple[StageKind, dict[str, Any]]] = [
    ("cross_entropy", {"batch_size": 4}),
    ("cross_entropy", {"batch_size": 5}),
    ("cross_entropy", {"batch_size": 5, "images_per_pass": 2}),
    ("fine_tune", {"batch_size": 5}),
]


def settings_of_two(settings: dict[str, Any]) -> TrainConfig:
    """Without dropout, whose numbers differ between workers."""
    return tiny_config(dropout=0.0, max_grad_norm=0.5, fine_tune_learning_rate=1e-2, **ALL_STAGES, **settings)


def learn_together(rank: int, directory: str) -> None:
    """A worker process."""
    with one_of_two(rank, directory):
        for number, (stage, settings) in enumerate(SPLITS):
            config = settings_of_two(settings)
            learner = tiny_learner(config, stage, data=tiny_data(config, rank=rank, world_size=2))
            reported = losses(learner)
            torch.save(
                (copied(learner.scorer), gradients(learner), torch.initial_seed(), reported),
                Path(directory, f"{number}-{rank}.pt"),
            )
            assert isinstance(learner.wrapped, DistributedDataParallel)
            assert not learner.wrapped.broadcast_buffers, "they never change"
        config = settings_of_two({"batch_size": 5, "scst_samples": 2})
        data = tiny_data(config, rank=rank, world_size=2)
        learner = tiny_learner(config, "self_critical", network=half_trained(), data=data)
        learner.self_critical = recording = Recording(config)
        (metrics,) = trained(learner, 1)
        own = recording.given[0][1]
        torch.save([(metrics[name], own[name]) for name in own], Path(directory, f"rewards-{rank}.pt"))


@pytest.mark.integration
def test_two_workers_learn_what_one_learns(tmp_path: Path) -> None:
    """One worker with whole batches, and two with their parts (of unequal numbers of tokens, and of images), by gloo
    and DistributedDataParallel for real."""
    spawn(learn_together, args=(str(tmp_path),), nprocs=2)
    for number, (stage, settings) in enumerate(SPLITS):
        first, second = (torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in range(2))
        assert_equal(first[0], second[0])
        assert first[2] != second[2], "each worker has a dropout of its own"
        config = settings_of_two(settings)
        alone = tiny_learner(config, stage)
        fresh = copied(alone.scorer)
        assert first[3] == second[3] == pytest.approx(losses(alone), rel=1e-4), "of all workers' tokens"
        torch.testing.assert_close(first[1], gradients(alone), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(first[0], copied(alone.scorer), rtol=1e-3, atol=2e-4)
        moved = [(first[0][name] - fresh[name]).abs().max().item() for name in fresh]
        assert np.max(moved) > 1e-2, "the tolerance is far below what was learnt"
    rewards = [torch.load(tmp_path / f"rewards-{rank}.pt", weights_only=True) for rank in range(2)]
    assert rewards[0][0][1] != rewards[1][0][1]
    for (reported, of_first), (also_reported, of_second) in zip(*rewards, strict=True):
        assert reported == also_reported == pytest.approx((3 * of_first + 2 * of_second) / 5)
