"""Bulk captioning on a cluster whose head is for drivers alone, with a node that says it has a GPU and has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from raycap.bulk.layout import CHUNK_ROWS
from tests.commands import Command, wait_until
from tests.hostile import encode
from tests.ray_cluster import RayCluster

pytestmark = pytest.mark.integration

NUM_CHUNKS = 5
"""So that, with as many actors allowed, two write: enough for one on each node."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster(head_cpus=0) as cluster:
        cluster.add_node(num_cpus=2, num_gpus=1)
        yield cluster


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    data = encode(Image.new("RGB", (40, 30), (90, 30, 60)), "JPEG")
    for number in range(NUM_CHUNKS * CHUNK_ROWS):
        (folder / f"{number:04d}.jpg").write_bytes(data)
    return folder


@pytest.fixture
def caption(
    start: Callable[..., Command], cluster: RayCluster, photos: Path, tmp_path: Path, tiny_bundle: str
) -> Callable[..., Command]:
    """Starts `raycap caption` with further options."""
    arguments = (str(photos), str(tmp_path / "output"), "--model", tiny_bundle, "--ray-address", cluster.address)
    return lambda *more: start("caption", *arguments, "--no-report", *more, env=cluster.env)


def test_an_actor_that_cannot_use_its_gpu_ends_the_run(caption: Callable[..., Command]) -> None:
    code, _, err = caption().finish()
    assert code == 2, err
    last = err.splitlines()[-1]
    assert last.startswith("raycap: error: device 'cuda' is not available here: ")
    assert last.endswith("; use --device cpu"), "nothing of Ray's is added"
    assert "Traceback" not in err


def test_nothing_that_works_is_on_the_head(caption: Callable[..., Command], cluster: RayCluster) -> None:
    command = caption("--device", "cpu", "--max-actors", str(NUM_CHUNKS))
    titles: dict[str, set[str]] = {"head": set(), "node": set()}

    def has_ended() -> bool:
        for place, node in zip(titles, cluster.nodes, strict=True):
            titles[place].update(node.processes().values())
        return command.has_ended()

    wait_until(has_ended, "the end of the run")
    code, _, err = command.finish()
    assert code == 0, err
    assert "the encoder runs on cpu with engine " in err
    for actor in ("_CaptionActor", "_Committer"):
        assert [place for place in titles if any(actor in title for title in titles[place])] == ["node"]
