"""The loads that `raycap benchmark` puts on an endpoint, on the real application."""

from __future__ import annotations

import pytest

from raycap.benchmark.config import BenchmarkConfig
from raycap.benchmark.load import Answers, closed_loop, open_loop
from raycap.benchmark.serve import saturation, summary
from raycap.errors import ConfigurationError
from raycap.serve.config import ServeConfig
from tests.serving import picture, running, small_captioner

CONFIG = BenchmarkConfig(sources=("a",), batch_size=2, serve_s=4)


def test_every_request_is_counted_once() -> None:
    with running(ServeConfig(), small_captioner()) as address:
        found = closed_loop(address.rstrip("/"), [picture()], num_senders=3, seconds=600, max_requests=5)
        assert len(found.latencies_s) == len(found.done_s) == sum(found.batch_sizes.values()) == 15
        assert all(seconds > 0 for seconds in found.latencies_s)
        found = open_loop(address.rstrip("/"), [picture(), b"no picture"], rate=200, seconds=0.5)
    num_sent = len(found.latencies_s) + found.num_refused + found.num_failed
    assert 60 <= num_sent <= 140
    assert found.num_failed == num_sent // 2, "every second one is none"
    assert sum(found.batch_sizes.values()) == len(found.latencies_s)


def test_a_request_may_have_several_images() -> None:
    with running(ServeConfig(), small_captioner()) as address:
        found = closed_loop(
            address.rstrip("/"), [picture(), picture(1)], num_senders=2, seconds=600, max_requests=2, num_images=3
        )
    assert len(found.latencies_s) == 4
    assert len(found.done_s) == sum(found.batch_sizes.values()) == 12


def test_saturation_is_between_the_first_batch_and_the_end() -> None:
    assert saturation([0.5, 0.5, 1, 1.5, 2, 2.5, 3, 9], CONFIG) == pytest.approx(2)
    with pytest.raises(ConfigurationError, match="expected at least 3 batches of 2 from the endpoint in 4 s, got 1"):
        saturation([0.5, 5], CONFIG)


def test_a_load_is_told_in_shares_and_milliseconds() -> None:
    answers = Answers(latencies_s=[0.1, 0.2, 0.3], num_refused=1, num_failed=1, batch_sizes={"1": 1, "2": 2})
    found = summary(answers, share=1.5, rate=40, bound_s=0.2)
    assert (found["asked_per_s"], found["bound_ms"], found["p50_ms"]) == (60, 200, pytest.approx(200))
    assert (found["answered"], found["refused"], found["failed"]) == (0.6, 0.2, 0.2)
    assert found["batch_sizes"] == {"1": pytest.approx(1 / 3), "2": pytest.approx(2 / 3)}
