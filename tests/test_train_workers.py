"""What two workers do together, by gloo for real."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from raycap.errors import ConfigurationError
from raycap.model.encoder import named_encoder
from raycap.storage import open_store
from raycap.train.workers import Workers


def one_of_two(rank: int, directory: str) -> None:
    """A worker process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    try:
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
    finally:
        dist.destroy_process_group()


def exchange_gradients_of_a_cnn_with_idle_parameters() -> None:
    """Without `freeze` the second batch fails: the first still waits for gradients that never come."""
    encoder, _ = named_encoder("timm:convnext_atto", pretrained=False)
    encoder.freeze(0)
    wrapped = DistributedDataParallel(encoder)
    for _ in range(3):
        wrapped(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).sum().backward()


@pytest.mark.integration
def test_two_workers(tmp_path: Path) -> None:
    spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    assert list((tmp_path / "shared").iterdir()) == []


def test_one_worker_is_alone(tmp_path: Path) -> None:
    workers = Workers(0, 1)
    workers.barrier()
    assert workers.from_first(lambda: 3) == 3
    assert workers.gathered({1: "a"}) == {1: "a"}
    workers.check_shared(open_store(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
