"""Manifest files of S3 on this machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from raycap.errors import NotFoundError, StorageError
from raycap.storage import ObjectInfo, S3Options, is_s3, open_store, read_bytes

MAX_COPIED_BYTES: Final = 2 * 1024**3
"""Largest manifest file on S3: all of it passes through memory, on its way to a temporary file."""


def find(location: str, s3: S3Options) -> ObjectInfo:
    """The one file or object at `location`. Raises NotFoundError if that is none, or another StorageError."""
    store = open_store(location, s3)
    store.check_readable()
    info = next(store.list(), None)
    if info is None or info.uri != location:
        raise NotFoundError(
            f"{location}: expected one file, found none; check the name, or type {location}/ for what is below it"
        )
    return info


class LocalCopy:
    """A file as one of this machine: itself or, of an object on S3, a temporary copy."""

    def __init__(self, location: str, s3: S3Options, *, md5: str | None = None, keep: bool = False) -> None:
        """`md5`: the digest, in hexadecimal digits, that the file must have. `keep`: copy it once, and delete the copy
        with this object; else each use makes a copy of its own."""
        self.location = location
        self._s3 = s3
        self._md5 = md5
        self._keep = keep
        self._kept: str | None = None
        self._lock = threading.Lock()

    @contextmanager
    def opened(self) -> Iterator[str]:
        """The path of the file. Raises StorageError."""
        if not is_s3(self.location):
            self._check_local()
            yield self.location
        elif self._keep:
            yield self._kept_copy()
        else:
            path = self._copied()
            try:
                yield path
            finally:
                _delete(path)

    def _kept_copy(self) -> str:
        with self._lock:
            if self._kept is None:
                self._kept = self._copied()
                weakref.finalize(self, _delete, self._kept)
            return self._kept

    def _check_local(self) -> None:
        open_store(self.location).check_readable()
        if self._md5 is not None:
            with open(self.location, "rb") as file:
                self._compare(hashlib.file_digest(file, _md5).hexdigest())

    def _copied(self) -> str:
        size = find(self.location, self._s3).size
        if size > MAX_COPIED_BYTES:
            raise StorageError(
                f"{self.location}: expected a manifest file of at most {MAX_COPIED_BYTES} bytes, got {size}; "
                "copy it to this machine, or split it"
            )
        data = read_bytes(self.location, self._s3)
        if self._md5 is not None:
            self._compare(_md5(data).hexdigest())
        try:
            descriptor, path = tempfile.mkstemp(prefix="raycap-manifest-")
            with open(descriptor, "wb") as file:
                file.write(data)
        except OSError as error:
            raise StorageError(f"cannot copy {self.location} to {tempfile.gettempdir()}: {error}") from error
        return path

    def _compare(self, md5: str) -> None:
        if md5 != self._md5:
            raise StorageError(
                f"{self.location}: expected a file with the MD5 {self._md5}, got {md5}; it was changed or cut short"
            )


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _delete(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)  # noqa: PTH108
