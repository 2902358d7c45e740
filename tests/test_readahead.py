"""Reading ahead: order, errors in place of results, and no more than two batches at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from raycap.errors import NotAnImageError, ObjectError, ObjectNotFoundError, StorageError
from raycap.readahead import read_ahead
from raycap.storage import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    for number in range(10):
        (tmp_path / f"{number}").write_bytes(b"%d" % number)
    return LocalStore(str(tmp_path))


def names(count: int = 10) -> list[str]:
    return [f"{number}" for number in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 11])
def test_batches_hold_everything_in_order(store: LocalStore, batch_size: int) -> None:
    batches = list(read_ahead(store, names(), int, batch_size=batch_size, num_threads=3))
    assert [row for batch in batches for row in batch] == [(number, number) for number in range(10)]
    assert all(len(batch) == batch_size for batch in batches[:-1]) and batches[-1]


def test_of_no_names_there_is_no_batch(store: LocalStore) -> None:
    assert list(read_ahead(store, [], int, batch_size=4, num_threads=2)) == []


def test_an_error_of_one_object_takes_its_place(store: LocalStore) -> None:
    def prepare(data: bytes) -> int:
        if data == b"2":
            raise NotAnImageError("2 is odd")
        return int(data)

    (batch,) = read_ahead(store, ["0", "gone", "2", "3"], prepare, batch_size=4, num_threads=2)
    assert [index for index, _ in batch] == [0, 1, 2, 3]
    assert (batch[0][1], batch[3][1]) == (0, 3)
    assert isinstance(batch[1][1], ObjectNotFoundError) and isinstance(batch[2][1], NotAnImageError)
    assert sum(isinstance(value, ObjectError) for _, value in batch) == 2


@pytest.mark.parametrize("error", [StorageError("the server is away"), ZeroDivisionError("a bug")])
def test_what_concerns_more_than_one_object_is_raised(store: LocalStore, error: Exception) -> None:
    def prepare(data: bytes) -> int:
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(read_ahead(store, names(), prepare, batch_size=4, num_threads=2))


def test_at_most_two_batches_are_begun_and_none_after_the_consumer_stops(store: LocalStore) -> None:
    begun: list[bytes] = []
    second_batch = threading.Event()

    def prepare(data: bytes) -> int:
        begun.append(data)
        if len(begun) == 6:
            second_batch.set()
        return int(data)

    batches = read_ahead(store, names(), prepare, batch_size=3, num_threads=4)
    assert [index for index, _ in next(batches)] == [0, 1, 2]
    assert second_batch.wait(60), "the second batch must be read while the first is in use"
    batches.close()
    assert sorted(begun) == [b"%d" % number for number in range(6)]
