"""One run on one output at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raycap.bulk.layout import LOCK
from raycap.errors import ConditionalWritesUnsupportedError, ConfigurationError, StorageError
from raycap.storage import LocalStore
from raycap.storage.lock import OutputLock, is_alive, read_lock

BEAT_S = 0.02


@pytest.fixture
def output(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def lock(output: LocalStore, stale_s: float = 60, **settings: Any) -> OutputLock:
    return OutputLock(output, LOCK, beat_s=BEAT_S, stale_s=stale_s, **settings)


def wait_for(condition: Callable[[], bool]) -> None:
    ended = threading.Event()
    for _ in range(3000):
        if condition():
            return
        ended.wait(0.01)
    raise AssertionError("not within 30 s")


def left_by(output: LocalStore, **changes: Any) -> None:
    """A lock whose holder does not renew it."""
    with lock(output):
        content = read_lock(output, LOCK)
    assert content is not None
    output.write(LOCK, json.dumps(content | changes).encode())


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_lock_is_there_while_it_is_held(output: LocalStore) -> None:
    assert read_lock(output, LOCK) is None
    with lock(output, status=lambda: {"state": "listing"}) as held:
        content = read_lock(output, LOCK)
        assert content is not None
        assert (content["state"], content["pid"]) == ("listing", os.getpid())
        held.check()
    assert read_lock(output, LOCK) is None
    assert [info.key for info in output.list()] == []


def test_lock_is_renewed_with_the_status_of_the_moment(output: LocalStore) -> None:
    rows = iter(range(10**9))
    with lock(output, status=lambda: {"num_done": next(rows)}):
        wait_for(lambda: (read_lock(output, LOCK) or {})["num_done"] >= 3)
        assert is_alive(output, LOCK, beat_s=1)
    assert not is_alive(output, LOCK, beat_s=BEAT_S)


def test_second_run_is_refused_while_the_first_lives(output: LocalStore) -> None:
    with lock(output) as first:
        with (
            pytest.raises(ConfigurationError, match=rf"another run \(host .*, process {os.getpid()}, since"),
            lock(output),
        ):
            raise AssertionError("two hold it")
        first.check()
        assert read_lock(output, LOCK) is not None, "the refused one leaves the lock alone"


def test_of_many_runs_that_start_at_once_one_gets_it(output: LocalStore) -> None:
    got, refused, ready, over = [], [], threading.Barrier(8), threading.Event()

    def run(number: int) -> None:
        ready.wait(30)
        try:
            with lock(output):
                got.append(number)
                over.wait(30)
        except ConfigurationError:
            refused.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(got) + len(refused) == 8)
    over.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)


def test_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(output: LocalStore) -> None:
    left_by(output, pid=dead_process())
    with lock(output, stale_s=10**6) as held:
        assert (read_lock(output, LOCK) or {})["pid"] == os.getpid()
        held.check()


@pytest.mark.parametrize("other", [{"processes": "another boot"}, {"host": "elsewhere", "processes": ""}, {"pid": "?"}])
def test_lock_from_elsewhere_is_taken_over_when_it_stops_changing(output: LocalStore, other: dict[str, str]) -> None:
    left_by(output, **({"pid": dead_process()} | other))
    with lock(output, stale_s=5 * BEAT_S):
        assert (read_lock(output, LOCK) or {})["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe"])
def test_lock_that_is_no_lock_is_stale_too(output: LocalStore, content: bytes) -> None:
    output.write(LOCK, content)
    with lock(output, stale_s=5 * BEAT_S):
        assert (read_lock(output, LOCK) or {})["pid"] == os.getpid()


def test_run_whose_lock_was_taken_over_is_told_and_leaves_it_alone(output: LocalStore) -> None:
    with lock(output) as held:
        output.write(LOCK, b'{"id": "another"}')

        def is_told() -> bool:
            try:
                held.check()
            except StorageError as error:
                return "another run took" in str(error)
            return False

        wait_for(is_told)
    assert read_lock(output, LOCK) == {"id": "another"}


def test_lock_that_vanished_is_not_ours_any_more(output: LocalStore) -> None:
    with lock(output) as held:
        output.delete(LOCK)
        wait_for(lambda: held._problem is not None)


def test_storage_that_is_away_for_a_while_does_not_end_the_run(tmp_path: Path) -> None:
    class Away(LocalStore):
        num_failures = 0

        def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
            if version is not None and self.num_failures < 3:
                self.num_failures += 1
                raise StorageError("the network is gone")
            return super().write_if(key, data, version=version)

    output = Away(str(tmp_path))
    with lock(output) as held:
        wait_for(lambda: (read_lock(output, LOCK) or {})["beat"] > 5)
        held.check()


def test_trouble_while_it_looks_whose_the_lock_is_does_not_end_the_thread(tmp_path: Path) -> None:
    class Lossy(LocalStore):
        """Of one renewal the answer is lost, and then the storage is away for a moment."""

        num_lost = num_away = 0

        def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
            written = super().write_if(key, data, version=version)
            if version is not None and not self.num_lost:
                self.num_lost = 1
                raise StorageError("the answer is lost")
            return written

        def read_versioned(self, key: str) -> tuple[bytes, str] | None:
            if self.num_lost and self.num_away < 2:
                self.num_away += 1
                raise StorageError("the network is gone")
            return super().read_versioned(key)

    output = Lossy(str(tmp_path))
    with lock(output) as held:
        wait_for(lambda: json.loads((tmp_path / LOCK).read_bytes())["beat"] > 6)
        held.check()
    assert output.num_away == 2
    assert read_lock(output, LOCK) is None


def test_lock_of_the_next_holder_is_not_deleted(output: LocalStore) -> None:
    with lock(output, status=dict) as held:
        held.beat_s = 10**6  # as if this process had been stopped for a while
        wait_for(lambda: True)
        (Path(output.location) / LOCK).write_bytes(b'{"id": "the next holder"}')
    assert read_lock(output, LOCK) == {"id": "the next holder"}


def test_storage_without_conditional_writes_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Plain(LocalStore):
        def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
            raise ConditionalWritesUnsupportedError("this server has no conditional writes")

    with lock(Plain(str(tmp_path))) as held:
        held.check()
    assert "two runs on one output will not be noticed: this server has no" in caplog.text


def test_file_system_without_locks_is_warned_of(
    output: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(output) as held:
        held.check()
    assert "two runs on one output will not be noticed: the file system of" in caplog.text
