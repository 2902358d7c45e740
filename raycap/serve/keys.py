"""Who may ask, and how often: API keys from a file, and a token bucket for each."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from pathlib import Path

from raycap.errors import ConfigurationError

log = logging.getLogger(__name__)

BURST_S = 2.0
"""A key that was quiet may send as many requests at once as its rate allows in this time."""


class ApiKeys:
    """The keys of a file, each with its name. When the file changes it is read again; one that is then wrong is left
    aside with a warning, and the keys stay as they were."""

    def __init__(self, path: str) -> None:
        """Raises ConfigurationError if the file is missing, holds no key, or a line that is not NAME KEY."""
        self._path = Path(path)
        self._seen = self._stamp()
        self._digests = self._read()

    def name_of(self, key: str) -> str | None:
        """Whose key this is; None if it is nobody's. All keys are compared, each in constant time."""
        self._refresh()
        digest, found = _digest(key), None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _refresh(self) -> None:
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                self._digests = self._read()
                log.info("read %d API keys", len(self._digests))
        except ConfigurationError as error:
            log.warning("the API keys stay as they were: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> dict[str, bytes]:
        try:
            lines = self._path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--keys-file: cannot read {self._path}: {error}") from error
        digests: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or words[0] in digests:  # the line itself is not repeated: it may hold a key
                raise ConfigurationError(
                    f"--keys-file: {self._path}, line {number}: expected NAME KEY, with a name that is there once"
                )
            digests[words[0]] = _digest(words[1])
        if not digests:
            raise ConfigurationError(f"--keys-file: {self._path} holds no key; expected lines of NAME KEY")
        return digests


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


class RateLimit:
    """A token bucket for each name: `rate` tokens a second, up to `BURST_S` seconds' worth and at least one."""

    def __init__(self, rate: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._size = max(1.0, rate * BURST_S)
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> float:
        """Take a token. 0 if there was one, else the seconds until there is."""
        now_s = self._clock()
        tokens, since_s = self._buckets.get(name, (self._size, now_s))
        tokens = min(self._size, tokens + (now_s - since_s) * self._rate)
        if tokens < 1:
            self._buckets[name] = tokens, now_s
            return (1 - tokens) / self._rate
        self._buckets[name] = tokens - 1, now_s
        return 0.0
