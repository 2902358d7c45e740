"""One run on one output at a time: a lock file that its holder keeps renewing, made and taken over by conditional
writes.

No clock is compared with another machine's: who finds a lock watches whether it changes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from raycap.errors import ConditionalWritesUnsupportedError, ConfigurationError, StorageError
from raycap.storage.base import Store

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Seconds between two renewals."""
STALE_S = 40.0
"""A lock that did not change for so long has no holder any more: several beats, and some trouble with the network."""


class OutputLock:
    """Holds an output by the object `key` in it; a context manager. Its content is `status()`, renewed."""

    def __init__(
        self,
        output: Store,
        key: str,
        *,
        status: Callable[[], dict[str, Any]] = dict,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        self.output, self.key = output, key
        self.status = status
        self.beat_s = beat_s
        self.stale_s = stale_s
        self._id = uuid.uuid4().hex
        self._started_at = datetime.now(UTC).isoformat()
        self._beat = 0
        self._version: str | None = None
        self._problem: StorageError | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="raycap-lock", daemon=True)

    def __enter__(self) -> OutputLock:
        """Raises ConfigurationError if another run holds the output. Waits while that may be dead."""
        try:
            self._version = self.output.write_if(self.key, self._content(), version=None) or self._take_over()
        except ConditionalWritesUnsupportedError as error:
            log.warning("two runs on one output will not be noticed: %s", error)
            return self
        self._thread.start()
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread.ident is None:
            return
        self._thread.join()
        try:
            if self._is_ours():
                self.output.delete(self.key)
        except StorageError as problem:  # the next run finds it stale
            log.warning("%s", problem)

    def check(self) -> None:
        """Raise StorageError if another run took the output over."""
        if self._problem is not None:
            raise self._problem

    def _take_over(self) -> str:
        """Replace a lock whose holder is dead; returns the new version."""
        deadline, first, told = time.monotonic() + self.stale_s, None, False
        while True:
            found = self.output.read_versioned(self.key)
            if found is None:
                version = self.output.write_if(self.key, self._content(), version=None)
            else:
                holder = _holder(found[0])
                if first is None:
                    first = found[1]
                if found[1] != first:
                    raise ConfigurationError(
                        f"{self.output.location} is being written by another run ({_name(holder)}); wait for it, "
                        "stop it, or write elsewhere"
                    )
                version = None
                if _is_dead_process_of_this_machine(holder) or time.monotonic() >= deadline:
                    log.info("the run that held %s is dead (%s)", self.output.location, _name(holder))
                    version = self.output.write_if(self.key, self._content(), version=found[1])
            if version is not None:
                return version
            if not told and found is not None:
                log.info("looking whether the run that holds %s is alive (%s)", self.output.location, _name(holder))
                told = True
            self._end.wait(min(1.0, self.beat_s))

    def _renew(self) -> None:
        while not self._end.wait(self.beat_s):
            try:
                self._beat += 1
                content = self._content()
                version = self.output.write_if(self.key, content, version=self._version)
                if version is None and not self._is_ours():
                    self._problem = StorageError(f"another run took {self.output.location} over; this one stops")
                    return
            except StorageError as error:  # trouble with the network is for those who write captions to tell
                log.debug("the lock could not be renewed: %s", error)
                continue
            self._version = version or self._version

    def _is_ours(self) -> bool:
        """Whether the lock is ours after all: the answer to an earlier write may have been lost."""
        found = self.output.read_versioned(self.key)
        if found is None or _holder(found[0]).get("id") != self._id:
            return False
        self._version = found[1]
        return True

    def _content(self) -> bytes:
        return json.dumps(
            {
                "id": self._id,
                "beat": self._beat,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "processes": _process_space(),
                "started_at": self._started_at,
                "updated_at": datetime.now(UTC).isoformat(),
                **self.status(),
            },
            indent=1,
        ).encode()


def read_lock(output: Store, key: str) -> dict[str, Any] | None:
    """What the run that works on this output last said; None where none does. It may have died since."""
    found = output.read_versioned(key)
    return None if found is None else _holder(found[0])


def is_alive(output: Store, key: str, *, beat_s: float = BEAT_S) -> bool:
    """Whether the lock of this output is being renewed. Takes up to two beats to say no."""
    first = output.read_versioned(key)
    if first is None or _is_dead_process_of_this_machine(_holder(first[0])):
        return False
    deadline = time.monotonic() + 2 * beat_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, beat_s))
        now = output.read_versioned(key)
        if now is None or now[1] != first[1]:
            return now is not None
    return False


def _holder(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    return f"host {holder.get('host')}, process {holder.get('pid')}, since {holder.get('started_at')}"


def _process_space() -> str:
    """What tells whether a process id means the same here: the boot and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _is_dead_process_of_this_machine(holder: dict[str, Any]) -> bool:
    space, pid = _process_space(), holder.get("pid")
    if not space or holder.get("processes") != space or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
