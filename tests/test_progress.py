"""Progress lines and rates, on a clock of the test's own."""

from __future__ import annotations

import pytest

from raycap.bulk import progress as module
from raycap.bulk.progress import LOG_EVERY_S, RunProgress, duration_text


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "raycap")
    return caplog


def started(total: int, done: int) -> RunProgress:
    progress = RunProgress()
    progress.start(total=total, done=done)
    return progress


def test_rate_is_from_the_first_batch_to_the_last(clock: Clock) -> None:
    progress = started(1000, 100)
    assert progress.images_per_s is None
    clock.now += 60  # starting up does not count
    progress.add(32)
    assert progress.images_per_s is None
    clock.now += 2
    progress.add(32)
    clock.now += 2
    progress.add(32, errors={"corrupt": 1, "empty": 2})
    assert progress.images_per_s == 16
    assert (progress.done, progress.errors) == (196, {"corrupt": 1, "empty": 2})


def test_a_line_now_and_then(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with started(10_000, 0) as progress:
        for _ in range(40):
            clock.now += 1
            progress.add(10)
        assert len(lines.messages) == 40 // int(LOG_EVERY_S)
        assert lines.messages[0] == "finished 150 of 10000 (2%), 0 failed, 10.0 images/s, 16m25s left"
    assert lines.messages[-1] == "finished 400 of 10000 (4%), 0 failed, 10.0 images/s, 16m00s left"


def test_a_line_is_not_said_again_at_the_end(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with started(10, 0) as progress:
        clock.now += LOG_EVERY_S
        progress.add(10)
    assert lines.messages == ["finished 10 of 10 (100%), 0 failed"]


def test_nothing_is_said_of_nothing(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with started(10, 10):
        pass
    assert lines.messages == []


def test_last_line_is_written_when_the_run_fails_too(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="the run"), started(10, 2) as progress:
        progress.add(3, errors={"empty": 1})
        raise ValueError("the run failed")
    assert lines.messages == ["finished 5 of 10 (50%), 1 failed"]


def test_rows_that_were_done_twice_are_not_more_than_all(clock: Clock, lines: pytest.LogCaptureFixture) -> None:
    with started(10, 0) as progress:
        progress.add(8)
        clock.now += 2
        progress.add(8)  # a worker died, and another did its rows again
    assert lines.messages == ["finished 10 of 10 (100%), 0 failed, 4.0 images/s"]


def test_batches_count_when_they_were_done_and_not_when_the_driver_hears_of_them(clock: Clock) -> None:
    progress = started(100, 0)
    progress.add(10, at_s=500.0)
    progress.add(10, at_s=510.0)
    assert progress.images_per_s == 1


def test_there_is_no_rate_of_a_moment(clock: Clock) -> None:
    progress = started(100, 0)
    progress.add(1)
    clock.now += 0.001
    progress.add(14)
    assert progress.images_per_s is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0m00s"), (59.6, "1m00s"), (754, "12m34s"), (3600, "1h00m"), (360_059, "100h00m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_status_is_what_others_may_know(clock: Clock) -> None:
    progress = RunProgress()
    assert progress.status()["state"] == "starting"
    progress.start(total=50, done=10)
    progress.add(20)
    clock.now += 4
    progress.add(40, errors={"empty": 1})  # some of them again
    assert progress.status() == {
        "state": "captioning",
        "num_listed": 0,
        "num_rows": 50,
        "num_done": 50,
        "images_per_s": 10.0,
        "errors": {"empty": 1},
    }
