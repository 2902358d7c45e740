"""Buckets and prefixes of an S3 server as a store."""

from __future__ import annotations

import io
import random
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from raycap.errors import (
    ConfigurationError,
    CredentialsError,
    ImageTooLargeError,
    NotFoundError,
    ObjectNotFoundError,
    StorageError,
)
from raycap.storage.base import TEMPORARY_PREFIX, ObjectInfo, Store
from raycap.storage.client import resolved, s3_client
from raycap.storage.failures import handled, is_denied, is_missing, not_s3, object_error, storage_error
from raycap.storage.options import S3Options, refuse_secrets

MULTIPART_BYTES = 64 * 1024 * 1024
"""Above this, an upload goes in parts, several at once; it still appears whole."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}|arn:.+")
_BODY_BACKOFF_S = 0.2
_NUM_READ_SAMPLES = 5


class S3Store(Store):
    """The objects below `s3://bucket/prefix`.

    The prefix is a folder: `s3://b/photos` holds `photos/1.jpg` and not `photos-old/1.jpg`. Only if there is an object
    with exactly this key is the store that one object; to know, the first use asks the server once (a HEAD request,
    unless the location ends in `/`).
    """

    def __init__(self, location: str, options: S3Options) -> None:
        bucket, _, self.prefix = location.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigurationError(f"expected s3://bucket/prefix, got {location!r} without a bucket")
        if not _BUCKET.fullmatch(bucket):
            refuse_secrets(location)
            raise ConfigurationError(
                f"{bucket!r} is no bucket name (letters, digits, '.', '-', '_'); type s3://BUCKET/PREFIX, "
                "the server's address goes into the endpoint URL"
            )
        self.location = location
        self.bucket = bucket
        self.options = options
        self._base: str | None = self.prefix if not self.prefix or self.prefix.endswith("/") else None
        self._single: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process uses the same server, region and addressing, whatever its own environment says."""
        return self.__dict__ | {"options": resolved(self.options)}

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._resolve()
        if self._single is not None:
            yield from self._single_object(prefix)
            return
        for page in self._pages(prefix):
            yield from self._objects(page)

    def list_level(self, prefix: str = "") -> Iterator[ObjectInfo | str]:
        base = self._resolve()
        if self._single is not None:
            yield from self._single_object(prefix)
            return
        for page in self._pages(prefix, Delimiter="/"):
            yield from (each["Prefix"][len(base) :] for each in page.get("CommonPrefixes", ()))
            yield from self._objects(page)

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        uri = self.uri(key)
        full_key = self._full_key(key)
        if full_key is None:
            raise ObjectNotFoundError(f"{uri!r} is no possible S3 key")
        return self._fetch(uri, full_key, max_bytes)

    def _fetch(self, uri: str, full_key: str, max_bytes: int | None) -> bytes:
        """botocore repeats requests, but not the reading of a body that breaks off: that is repeated here."""
        from botocore.exceptions import ClientError

        for attempt in range(1, self.options.max_attempts + 1):
            answered = False
            try:
                answer = self._client().get_object(Bucket=self.bucket, Key=full_key)
                answered = True
                with answer["Body"] as body:
                    size = answer.get("ContentLength")
                    if max_bytes is not None and size is not None and size > max_bytes:
                        raise ImageTooLargeError(f"{uri}: {size} bytes, more than the limit of {max_bytes}")
                    if max_bytes is not None and size is None:
                        data: bytes = body.read(max_bytes + 1)
                        if len(data) > max_bytes:
                            raise ImageTooLargeError(f"{uri}: more than the limit of {max_bytes} bytes")
                    else:
                        data = body.read()  # raises if it is shorter than Content-Length
                    return data
            except handled() as error:
                if not answered or isinstance(error, ClientError) or attempt == self.options.max_attempts:
                    raise object_error(error, uri) from error
                time.sleep(random.uniform(0, _BODY_BACKOFF_S * 2**attempt))
        raise AssertionError("the last attempt returns or raises")

    def write(self, key: str, data: bytes) -> None:
        self._resolve()
        if self._single is not None:
            raise StorageError(f"cannot write below {self.location}: there is an object with this name, not a folder")
        self._put(self._client(), key, data)

    def _put(self, client: Any, key: str, data: bytes) -> None:
        full_key = self._full_key(key)
        what = f"cannot write {self.uri(key)!r}"
        if full_key is None:
            raise StorageError(f"{what}: this is no possible S3 key")
        try:
            if len(data) > MULTIPART_BYTES:
                from boto3.s3.transfer import TransferConfig

                config = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 4)
                client.upload_fileobj(io.BytesIO(data), self.bucket, full_key, Config=config)
            elif "ETag" not in client.put_object(Bucket=self.bucket, Key=full_key, Body=data):
                raise not_s3(what)
        except handled() as error:
            raise storage_error(error, what) from error

    def exists(self, key: str) -> bool:
        full_key = self._full_key(key)
        if full_key is None:
            return False
        try:
            self._client().head_object(Bucket=self.bucket, Key=full_key)
        except handled() as error:
            if is_missing(error):
                return False
            raise storage_error(error, f"cannot look up {self.uri(key)}") from error
        return True

    def delete(self, key: str) -> None:
        full_key = self._full_key(key)
        if full_key is None:
            return
        try:
            self._client().delete_object(Bucket=self.bucket, Key=full_key)
        except handled() as error:
            raise storage_error(error, f"cannot delete {self.uri(key)}") from error

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._resolve()}{key}"

    def check_readable(self) -> None:
        client = self._impatient_client()
        self._resolve(client)
        if self._single is not None:
            return  # a HEAD request found it
        what = f"cannot read {self.location}"
        try:
            page = client.list_objects_v2(Bucket=self.bucket, Prefix=self._resolve(), MaxKeys=_NUM_READ_SAMPLES)
        except handled() as error:
            raise storage_error(error, what) from error
        _require_s3(page, what)
        keys = [each["Key"] for each in page.get("Contents", ())]
        if not keys and self.prefix:
            raise NotFoundError(f"{what}: there is nothing below this prefix; check it for a typing error")
        if keys and not any(self._may_read(client, key) for key in keys):
            raise CredentialsError(f"{what}: these keys may list the objects but not read them; allow s3:GetObject")

    def check_writable(self) -> None:
        client = self._impatient_client()
        self._resolve(client)
        if self._single is not None:
            raise StorageError(f"cannot write below {self.location}: there is an object with this name, not a folder")
        self._require_bucket(client)
        probe = f"{TEMPORARY_PREFIX}check"  # one name: where deleting is not allowed, at most this one is left
        self._put(client, probe, b"raycap looks whether it may write here\n")
        try:
            client.delete_object(Bucket=self.bucket, Key=self._resolve() + probe)
        except handled() as error:
            if not is_denied(error):
                raise storage_error(error, f"cannot delete below {self.location}") from error

    def _require_bucket(self, client: Any) -> None:
        """Some servers (SeaweedFS) make a missing bucket when they are written to: a typing error would go unseen."""
        what = f"cannot write to {self.location}"
        try:
            page = client.list_objects_v2(Bucket=self.bucket, Prefix=self._resolve(), MaxKeys=1)
        except handled() as error:
            if not is_denied(error):  # keys that may write need not be allowed to list
                raise storage_error(error, what) from error
        else:
            _require_s3(page, what)

    def _client(self) -> Any:
        return s3_client(self.options)

    def _impatient_client(self) -> Any:
        """For the checks: an answer now, not after the patience that a run of hours has."""
        return s3_client(
            replace(
                self.options,
                connect_timeout_s=min(self.options.connect_timeout_s, 5.0),
                read_timeout_s=min(self.options.read_timeout_s, 10.0),
                max_attempts=min(self.options.max_attempts, 2),
            )
        )

    def _resolve(self, client: Any = None) -> str:
        """What every full key here starts with: "" or a folder with its "/". Asks the server at most once."""
        if self._base is None:
            single = False
            try:
                (client or self._client()).head_object(Bucket=self.bucket, Key=self.prefix)
                single = True
            except handled() as error:
                # Keys that may only list, or only write, are refused here. Bad keys are too, but what comes next says
                # it better.
                if not is_missing(error) and not is_denied(error):
                    raise storage_error(error, f"cannot look up {self.location}") from error
            folder, _, name = self.prefix.rpartition("/")
            if single:
                self._single = name
            # Last, since other threads look at it: when it is set, all is.
            self._base = (f"{folder}/" if "/" in self.prefix else "") if single else f"{self.prefix}/"
        return self._base

    def _full_key(self, key: str) -> str | None:
        """None where S3 cannot have such a key."""
        full_key = self._resolve() + key
        try:
            num_bytes = len(full_key.encode())
        except UnicodeEncodeError:
            return None
        return full_key if key and num_bytes <= 1024 else None

    def _single_object(self, prefix: str) -> Iterator[ObjectInfo]:
        if self._single is None or not self._single.startswith(prefix):
            return
        try:
            head = self._client().head_object(Bucket=self.bucket, Key=self.prefix)
        except handled() as error:
            raise storage_error(error, f"cannot look up {self.location}") from error
        yield ObjectInfo(self._single, self.location, head["ContentLength"], head.get("ETag", "").strip('"'))

    def _pages(self, prefix: str, **settings: str) -> Iterator[dict[str, Any]]:
        what = f"cannot list {self.location}"
        full_prefix = self._resolve() + prefix
        pages = (
            self._client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full_prefix, **settings)
        )
        try:
            for page in pages:
                _require_s3(page, what)
                yield page
        except handled() as error:
            raise storage_error(error, what) from error

    def _objects(self, page: dict[str, Any]) -> Iterator[ObjectInfo]:
        base = self._resolve()
        for each in page.get("Contents", ()):
            full_key, size = each["Key"], each["Size"]
            key = full_key[len(base) :]
            if full_key.endswith("/") and size == 0:  # what S3 consoles make for an empty folder
                continue
            # SeaweedFS reads `a//` as `a/`: what it lists then is not below the prefix.
            if not full_key.startswith(base) or key.rpartition("/")[2].startswith(TEMPORARY_PREFIX):
                continue
            yield ObjectInfo(key, f"s3://{self.bucket}/{full_key}", size, each.get("ETag", "").strip('"'))

    def _may_read(self, client: Any, full_key: str) -> bool:
        try:
            client.head_object(Bucket=self.bucket, Key=full_key)
        except handled() as error:
            if is_denied(error):
                return False
            if not is_missing(error):
                raise storage_error(error, f"cannot read {self.location}") from error
        return True


def _require_s3(page: dict[str, Any], what: str) -> None:
    """boto3 takes any web page for an empty listing; a real one repeats the bucket's name or counts its keys."""
    if "Name" not in page and "KeyCount" not in page:
        raise not_s3(what)
