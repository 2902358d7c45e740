"""Work in which nothing happens is ended; all other work is not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from raycap.bulk.stall import ended_if_stalled
from raycap.errors import StalledError

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Python's own handler, which a shell's background jobs do not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_work_that_stands_still_is_ended_whatever_it_waits_for() -> None:
    with (
        pytest.raises(StalledError, match=r"nothing was captioned for 0.1 s.* the same command goes on"),
        ended_if_stalled(lambda: 0, after_s=0.1),
    ):
        threading.Event().wait(DEADLINE_S)
        pytest.fail("it went on")


def test_work_that_gets_on_is_not() -> None:
    progress = count()
    with ended_if_stalled(lambda: next(progress), after_s=0.05):
        start_s = time.monotonic()
        while time.monotonic() - start_s < 0.2:
            pass
    assert next(progress) > 3, "it was looked at"


def test_ctrl_c_stays_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), ended_if_stalled(lambda: 0, after_s=DEADLINE_S):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(DEADLINE_S)


def test_where_ctrl_c_is_ignored_it_ends_as_by_sigterm() -> None:
    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(StalledError), ended_if_stalled(lambda: 0, after_s=0.1):
            threading.Event().wait(DEADLINE_S)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_other_threads_do_is_left_to_them() -> None:
    done = threading.Event()

    def work() -> None:
        with ended_if_stalled(lambda: 0, after_s=0.01):
            time.sleep(0.1)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done.is_set()
    assert not [each for each in threading.enumerate() if each.name == "raycap-stall"]
