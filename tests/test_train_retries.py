"""What a training is tried again after."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import TrainingFailedError, WorkerGroupError

from raycap.errors import ConfigurationError, EndpointError, RaycapError, StorageError
from raycap.train.on_ray import persevere

RESULT: Any = object()


class Fit:
    """Fails as often as there are failures, then gives a result."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.num_calls = list(failures), 0

    def __call__(self) -> Any:
        self.num_calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return RESULT


def of_a_worker(error: Exception) -> Exception:
    return WorkerGroupError(f"worker 1: {error}", {1: error})


LOST = of_a_worker(OSError("the worker is gone"))
AWAY = of_a_worker(EndpointError("http://s3 cannot be reached, also after 300 s"))


def test_lost_workers_and_an_endpoint_that_is_away_are_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    fit = Fit(LOST, AWAY, AWAY)
    assert persevere(fit, 3) is RESULT
    assert fit.num_calls == 4
    assert "a worker failed (http://s3 cannot be reached, also after 300 s); going on from the last" in caplog.text


def test_so_is_the_loss_of_ray_trains_own_actor() -> None:
    assert persevere(Fit(ActorDiedError()), 1) is RESULT
    with pytest.raises(ActorDiedError):
        persevere(Fit(*[ActorDiedError()] * 2), 1)


def test_there_is_an_end_to_it() -> None:
    fit = Fit(*[LOST] * 5)
    with pytest.raises(TrainingFailedError, match="the worker is gone"):
        persevere(fit, 2)
    assert fit.num_calls == 3
    fit = Fit(*[AWAY] * 5)
    with pytest.raises(EndpointError, match="cannot be reached"):
        persevere(fit, 0)
    assert fit.num_calls == 1
    assert persevere(Fit(*[AWAY, LOST] * 9), -1) is RESULT


@pytest.mark.parametrize("error", [ConfigurationError("too few images"), StorageError("the disk is full")])
def test_other_errors_of_ours_would_come_again(error: RaycapError) -> None:
    fit = Fit(of_a_worker(error))
    with pytest.raises(type(error), match=str(error)):
        persevere(fit, -1)
    assert fit.num_calls == 1
