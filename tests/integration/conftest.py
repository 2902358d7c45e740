"""Fixtures shared by the integration tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import ray

from tests.commands import Command, starting_commands


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray on this machine with two CPUs, started once for a module and ended with it."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Starts commands; whatever they leave behind ends with the test."""
    with starting_commands() as starter:
        yield starter
