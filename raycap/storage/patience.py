"""Waits for an S3 server that is away for a while, so that a run of days survives it.

boto3 repeats a request for some seconds. What still fails then is either the server's fault, which may pass, or that of
one object, which is a failed row. Which of the two is decided here, for all threads of a process together.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from raycap.errors import EndpointError, RaycapError
from raycap.storage.client import s3_client
from raycap.storage.failures import handled, is_passing, is_unreachable, storage_error
from raycap.storage.options import S3Options

T = TypeVar("T")

log = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.5
_MAX_WAIT_S = 10.0


class Server:
    """What this process knows of one server: whether it is away, and what it could do before."""

    def __init__(
        self, name: str, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.name = name
        self._clock = clock
        self._sleep = sleep
        self.last_read: tuple[str, str] | None = None
        """Bucket and key of an object that this process could read."""
        self._away_since: float | None = None
        self._state = threading.Lock()

    def call(
        self,
        request: Callable[[], T],
        what: str,
        *,
        max_outage_s: float,
        other_request: Callable[[], object] | None = None,
    ) -> T:
        """What `request` returns, tried again for as long as the server is away.

        With `other_request`, something else that the server should be able to do, a server that answers that, but
        fails with `request` before and again after it, is not away. Without it, any failure that may pass is waited
        for.

        Raises what `request` raises where waiting would not help, and EndpointError past the limit.
        """
        first_failure: float | None = None
        num_waits = 0
        does_others = False
        while True:
            started = self._clock()
            try:
                answer = request()
            except RaycapError:  # what the answer was taken for
                self._answered()
                raise
            except handled() as error:
                if not is_passing(error):
                    self._answered()
                    raise
                if max_outage_s == 0:
                    raise
                first_failure = started if first_failure is None else first_failure
                if other_request and not is_unreachable(error) and self._answers(other_request):
                    if does_others:
                        raise
                    does_others = True  # it may have come back at this very moment: then now it does this as well
                else:
                    does_others = False
                    self._wait(error, what, num_waits, first_failure, max_outage_s)
                    num_waits += 1
            else:
                self._answered()
                return answer

    def _answers(self, other_request: Callable[[], object]) -> bool:
        try:
            other_request()
        except handled() as error:
            if is_passing(error):
                return False
        self._answered()
        return True

    def _wait(self, error: Exception, what: str, num_waits: int, first_failure: float, max_outage_s: float) -> None:
        with self._state:
            is_news = self._away_since is None
            since = first_failure if self._away_since is None else min(first_failure, self._away_since)
            self._away_since = since
        tried_s = self._clock() - since
        if tried_s >= max_outage_s:
            raise EndpointError(f"{storage_error(error, what)}; tried for {tried_s:.0f} s") from error
        if is_news:
            log.warning("%s; waiting up to %.0f s for it to pass", storage_error(error, what), max_outage_s)
        wait_s = random.uniform(0.5, 1.0) * min(_FIRST_WAIT_S * 2 ** min(num_waits, 10), _MAX_WAIT_S)
        self._sleep(min(wait_s, max_outage_s - tried_s))

    def _answered(self) -> None:
        with self._state:
            since, self._away_since = self._away_since, None
        if since is not None:
            log.warning("%s answers again, after %.0f s", self.name, self._clock() - since)


def ask(options: S3Options, what: str, request: Callable[[Any], T]) -> T:
    """What `request` returns, given the client; in time of an outage, when it is over.

    Raises StorageError, with `what` for what could not be done.
    """
    try:
        return server_of(options).call(lambda: request(s3_client(options)), what, max_outage_s=options.max_outage_s)
    except handled() as error:
        raise storage_error(error, what) from error


def server_of(options: S3Options) -> Server:
    """What this process knows of the server that `options` lead to: one object for all who ask it."""
    return _server(s3_client(options).meta.endpoint_url, os.getpid())


@functools.lru_cache(maxsize=64)
def _server(endpoint_url: str, process_id: int) -> Server:
    return Server(endpoint_url)
