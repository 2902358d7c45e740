"""Anywhere: objects by their full address, in any bucket and folder."""

from __future__ import annotations

import os
from typing import Any

from raycap.errors import NotFoundError, ObjectNotFoundError
from raycap.storage.client import resolved
from raycap.storage.fetch import fetch
from raycap.storage.local import LocalStore
from raycap.storage.options import S3Options
from raycap.storage.s3 import is_bucket, is_key


class Anywhere:
    """Reads objects of many buckets and folders, such as those of a manifest. Can be pickled, and used by threads."""

    def __init__(self, s3: S3Options) -> None:
        self.s3 = s3
        self._files = LocalStore("/")

    def __getstate__(self) -> dict[str, Any]:
        """Another process uses the same server, region and addressing, whatever its own environment says."""
        return self.__dict__ | {"s3": resolved(self.s3)}

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole content of the object at `s3://bucket/key`, taken as it is, or of the file at an absolute path.

        Asks the server for nothing else. Raises what `Store.read` raises; an address that can be none of an object, or
        whose bucket does not exist, is an ObjectNotFoundError.
        """
        if key.startswith("s3://"):
            bucket, _, object_key = key.removeprefix("s3://").partition("/")
            if not is_bucket(bucket) or not is_key(object_key):
                raise ObjectNotFoundError(f"expected s3://bucket/key, got {key!r}")
            try:
                return fetch(self.s3, bucket, object_key, max_bytes=max_bytes)[0]
            except NotFoundError as error:  # one misspelt bucket in a list of many must not end the run
                raise ObjectNotFoundError(str(error)) from error
        if not key.startswith("/"):
            raise ObjectNotFoundError(f"expected s3://bucket/key or an absolute path, got {key!r}")
        return self._files.read(os.path.normpath(key).lstrip("/"), max_bytes=max_bytes)
