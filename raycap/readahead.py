"""Objects of a store, read and prepared by threads a batch ahead of whoever consumes them.

Knows nothing of pictures, torch or Ray: what is made of an object's bytes is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from raycap.errors import ObjectError
from raycap.storage import Store

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(
    store: Store, names: Sequence[str], prepare: Callable[[bytes], T], *, batch_size: int, num_threads: int
) -> Iterator[list[tuple[int, T | ObjectError]]]:
    """What `prepare` makes of each object, in batches, in the order of `names`; each with its index in `names`.

    An ObjectError of reading or preparing takes the place of the result. Anything else is raised, such as the
    StorageError of a store that is away. At most two batches are in memory.
    """

    def load(index: int) -> tuple[int, T | ObjectError]:
        try:
            return index, prepare(store.read(names[index]))
        except ObjectError as error:
            return index, error

    pool = ThreadPoolExecutor(num_threads)
    try:
        indices = range(len(names))
        ahead = [pool.submit(load, index) for index in indices[:batch_size]]
        for start in range(batch_size, len(names) + batch_size, batch_size):
            current, ahead = ahead, [pool.submit(load, index) for index in indices[start : start + batch_size]]
            yield [future.result() for future in current]
    finally:
        pool.shutdown(cancel_futures=True)  # a consumer that stops early waits only for what is being read
