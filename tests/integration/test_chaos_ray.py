"""One row for each object, whatever process is killed. `python -m tests.integration.chaos` does many more such runs,
and kills nodes, as test_cluster_ray.py does."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from raycap import cli
from tests.integration.chaos import Chaos

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

NUM_OBJECTS = 1000


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: str) -> Iterator[Chaos]:
    """A cluster of two nodes, and the rows of an undisturbed run."""
    chaos = Chaos(tmp_path_factory.mktemp("chaos"), tiny_bundle, NUM_OBJECTS)
    with chaos.on_cluster():
        chaos.undisturbed()
        yield chaos


@pytest.mark.parametrize(
    ("kind", "first_exit"),
    [("driver", -signal.SIGKILL), ("actor", cli.EXIT_OK), ("fetcher", cli.EXIT_OK)],
)
def test_killed_process_loses_and_doubles_no_row(chaos: Chaos, kind: str, first_exit: int) -> None:
    outcome = chaos.run(kind, seed=1)
    assert outcome.faults == []
    assert outcome.first_exit == first_exit, "only the loss of the driver ends a run"
    assert outcome.num_gets < 2 * NUM_OBJECTS
