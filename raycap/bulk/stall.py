"""Work in which nothing happens any more is ended.

Ray may wait without an end for what it lost track of while a node was cut off (ray-project/ray#63405, for instance).
Whoever runs the command again, as Kubernetes does, gets on; only a command that never ends is never run again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raycap.errors import StalledError

LOOKS = 60
"""In the time after which work is ended, it is looked at so often."""


@contextmanager
def ended_if_stalled(progress: Callable[[], object], *, after_s: float) -> Iterator[None]:
    """End the block when what `progress` gives has not changed for so long.

    It is ended as Ctrl-C or SIGTERM ends it, in the main thread alone: in another one, or where neither of the two is
    handled, it is left to itself. Raises StalledError.
    """
    ending = next((each for each in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(each))), None)
    main = threading.main_thread()
    if ending is None or threading.current_thread() is not main:
        yield
        return
    has_ended, has_stalled = threading.Event(), threading.Event()

    def watch() -> None:
        last, since_s = progress(), time.monotonic()
        while not has_ended.wait(after_s / LOOKS):
            now = progress()
            if now != last:
                last, since_s = now, time.monotonic()
            elif time.monotonic() - since_s >= after_s:
                has_stalled.set()
                assert main.ident is not None
                signal.pthread_kill(main.ident, ending)  # which wakes it up, whatever it waits for
                return

    watcher = threading.Thread(target=watch, name="raycap-stall", daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            has_ended.set()
            watcher.join()
    except KeyboardInterrupt:
        if not has_stalled.is_set():
            raise
        raise StalledError(
            f"nothing was captioned for {after_s:g} s, so this run ends; Ray may wait for what it has lost, or for "
            "nodes with room. What was written stays: the same command goes on (--max-stall-s says how long to wait)"
        ) from None
