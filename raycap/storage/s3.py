"""Buckets and prefixes of an S3 server as a store."""

from __future__ import annotations

import builtins
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from raycap.errors import (
    ConditionalWritesUnsupportedError,
    ConfigurationError,
    CredentialsError,
    NotFoundError,
    ObjectAccessDeniedError,
    ObjectError,
    ObjectNotFoundError,
    StorageError,
)
from raycap.storage.base import TEMPORARY_PREFIX, ObjectInfo, Span, Store
from raycap.storage.client import resolved
from raycap.storage.failures import handled, is_denied, is_unmet, is_unsupported, not_s3, num_retries
from raycap.storage.fetch import fetch, head
from raycap.storage.listing import MAX_KEY_BYTES, Listing, require_s3
from raycap.storage.options import S3Options, refuse_secrets
from raycap.storage.patience import ask

MULTIPART_BYTES = 64 * 1024 * 1024
"""Above this, an upload goes in parts, several at once; it still appears whole."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}|arn:.+")
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
        if not is_bucket(bucket):
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
        return self.list_span(Span(prefix))

    def split(self, num_spans: int) -> builtins.list[Span]:
        """By ranges of keys where the server lists in their order (`S3Options.byte_ordered`), else by folders.

        One request if all fits into a page of 1,000; else some hundreds at most.
        """
        base = self._resolve()
        return [Span()] if self._single is not None else Listing(self.options, self.bucket, base).split(num_spans)

    def list_span(self, span: Span, *, after: str = "") -> Iterator[ObjectInfo]:
        base = self._resolve()
        if self._single is None:
            yield from Listing(self.options, self.bucket, base).objects(span, after)
        elif self._single.startswith(span.prefix) and not after:
            yield self._single_object(self._single)

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        return self._read(key, max_bytes)[0]

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        try:
            return self._read(key)
        except ObjectNotFoundError:
            return None
        except ObjectAccessDeniedError as error:
            raise CredentialsError(str(error)) from error
        except ObjectError as error:
            raise StorageError(str(error)) from error

    def _read(self, key: str, max_bytes: int | None = None) -> tuple[bytes, str]:
        uri = self.uri(key)
        full_key = self._full_key(key)
        if full_key is None:
            raise ObjectNotFoundError(f"{uri!r} is no possible S3 key")
        return fetch(self.options, self.bucket, full_key, max_bytes=max_bytes)

    def write(self, key: str, data: bytes) -> None:
        full_key, what = self._key_to_write(key)
        ask(self.options, what, lambda client: self._put(client, full_key, data, what))

    def _put(self, client: Any, full_key: str, data: bytes, what: str) -> None:
        if len(data) > MULTIPART_BYTES:
            from boto3.s3.transfer import TransferConfig

            config = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 4)
            client.upload_fileobj(io.BytesIO(data), self.bucket, full_key, Config=config)
        elif "ETag" not in client.put_object(Bucket=self.bucket, Key=full_key, Body=data):
            raise not_s3(what)

    def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
        full_key, what = self._key_to_write(key)
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}
        num_tries = 0

        def put(client: Any) -> dict[str, Any] | None:
            nonlocal num_tries
            num_tries += 1
            try:
                answer: dict[str, Any] = client.put_object(Bucket=self.bucket, Key=full_key, Body=data, **condition)
            except handled() as error:
                if is_unsupported(error):
                    raise ConditionalWritesUnsupportedError(
                        f"{what}: the server does not know conditional writes (If-Match); use one that does"
                    ) from error
                if not is_unmet(error):
                    raise
                num_tries += num_retries(error)
                return None
            return answer

        answer = ask(self.options, what, put)
        if answer is None:
            # If an earlier try was carried out and only its answer was lost, what is there is ours.
            found = self.read_versioned(key) if num_tries > 1 else None
            return found[1] if found and found[0] == data else None
        if "ETag" not in answer:
            raise not_s3(what)
        return str(answer["ETag"]).strip('"')

    def exists(self, key: str) -> bool:
        full_key, what = self._full_key(key), f"cannot look up {self.uri(key)}"
        try:
            return full_key is not None and bool(head(self.options, self.bucket, full_key, what))
        except ObjectNotFoundError:
            return False
        except ObjectAccessDeniedError as error:
            raise CredentialsError(str(error)) from error

    def delete(self, key: str) -> None:
        if (full_key := self._full_key(key)) is not None:
            what = f"cannot delete {self.uri(key)}"
            ask(self.options, what, lambda client: client.delete_object(Bucket=self.bucket, Key=full_key))

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._resolve()}{key}"

    def check_readable(self) -> None:
        options = self._impatient_options()
        base = self._resolve(options)
        if self._single is not None:
            return  # a HEAD request found it
        what = f"cannot read {self.location}"
        page = ask(
            options,
            what,
            lambda client: client.list_objects_v2(Bucket=self.bucket, Prefix=base, MaxKeys=_NUM_READ_SAMPLES),
        )
        require_s3(page, what)
        keys = [each["Key"] for each in page.get("Contents", ())]
        if not keys and self.prefix:
            raise NotFoundError(f"{what}: there is nothing below this prefix; check it for a typing error")
        if keys and not any(self._may_read(options, key) for key in keys):
            raise CredentialsError(f"{what}: these keys may list the objects but not read them; allow s3:GetObject")

    def check_writable(self) -> None:
        options = self._impatient_options()
        base = self._resolve(options)
        probe = f"{TEMPORARY_PREFIX}check"  # one name: where deleting is not allowed, at most this one is left
        full_key, what = self._key_to_write(probe)
        self._require_bucket(options)
        ask(
            options, what, lambda client: self._put(client, full_key, b"raycap looks whether it may write here\n", what)
        )
        ask(
            options,
            f"cannot delete below {self.location}",
            lambda client: self._delete_if_allowed(client, base + probe),
        )

    def _delete_if_allowed(self, client: Any, full_key: str) -> None:
        try:
            client.delete_object(Bucket=self.bucket, Key=full_key)
        except handled() as error:
            if not is_denied(error):
                raise

    def _require_bucket(self, options: S3Options) -> None:
        """Some servers (SeaweedFS) make a missing bucket when they are written to: a typing error would go unseen."""
        what = f"cannot write to {self.location}"

        def list_one(client: Any) -> None:
            try:
                page = client.list_objects_v2(Bucket=self.bucket, Prefix=self._resolve(), MaxKeys=1)
            except handled() as error:
                if not is_denied(error):  # keys that may write need not be allowed to list
                    raise
            else:
                require_s3(page, what)

        ask(options, what, list_one)

    def _impatient_options(self) -> S3Options:
        """For the checks: an answer now, not after the patience that a run of hours has."""
        return replace(
            self.options,
            connect_timeout_s=min(self.options.connect_timeout_s, 5.0),
            read_timeout_s=min(self.options.read_timeout_s, 10.0),
            max_attempts=min(self.options.max_attempts, 2),
            max_outage_s=0.0,
        )

    def _resolve(self, options: S3Options | None = None) -> str:
        """What every full key here starts with: "" or a folder with its "/". Asks the server at most once."""
        if self._base is None:
            single = False
            # Keys that may only list, or only write, are refused here. Bad keys are too, but what comes next says it
            # better.
            with suppress(ObjectNotFoundError, ObjectAccessDeniedError):
                head(options or self.options, self.bucket, self.prefix, f"cannot look up {self.location}")
                single = True
            folder, _, name = self.prefix.rpartition("/")
            if single:
                self._single = name
            # Last, since other threads look at it: when it is set, all is.
            self._base = (f"{folder}/" if "/" in self.prefix else "") if single else f"{self.prefix}/"
        return self._base

    def _full_key(self, key: str) -> str | None:
        """None where S3 cannot have such a key."""
        full_key = self._resolve() + key
        return full_key if key and is_key(full_key) else None

    def _key_to_write(self, key: str) -> tuple[str, str]:
        """The full key, and what to say if it cannot be written."""
        full_key, what = self._full_key(key), f"cannot write {self.uri(key)!r}"
        if self._single is not None:
            raise StorageError(f"cannot write below {self.location}: there is an object with this name, not a folder")
        if full_key is None:
            raise StorageError(f"{what}: this is no possible S3 key")
        return full_key, what

    def _single_object(self, name: str) -> ObjectInfo:
        what = f"cannot look up {self.location}"
        try:
            found = head(self.options, self.bucket, self.prefix, what)
        except ObjectNotFoundError as error:
            raise NotFoundError(str(error)) from error
        except ObjectAccessDeniedError as error:
            raise CredentialsError(str(error)) from error
        return ObjectInfo(
            name,
            self.location,
            found["ContentLength"],
            found.get("ETag", "").strip('"'),
            found.get("StorageClass", ""),
        )

    def _may_read(self, options: S3Options, full_key: str) -> bool:
        try:
            head(options, self.bucket, full_key, f"cannot read {self.location}")
        except ObjectAccessDeniedError:
            return False
        except ObjectNotFoundError:  # deleted meanwhile
            pass
        return True


def is_bucket(name: str) -> bool:
    """Whether a bucket can have this name."""
    return _BUCKET.fullmatch(name) is not None


def is_key(name: str) -> bool:
    """Whether an object can have this key."""
    try:
        return 0 < len(name.encode()) <= MAX_KEY_BYTES
    except UnicodeEncodeError:
        return False
