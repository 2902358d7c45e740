"""The content of one S3 object, whatever the network does."""

from __future__ import annotations

import random
import time
from typing import Any

from raycap.errors import ImageTooLargeError, ObjectAccessDeniedError, ObjectNotFoundError
from raycap.storage.client import s3_client
from raycap.storage.failures import handled, is_denied, is_missing, object_error
from raycap.storage.options import S3Options
from raycap.storage.patience import ask, server_of

_BODY_BACKOFF_S = 0.2


def fetch(options: S3Options, bucket: str, key: str, *, max_bytes: int | None = None) -> tuple[bytes, str]:
    """Content and ETag of one object. Raises what `Store.read` raises."""
    uri = f"s3://{bucket}/{key}"
    server = server_of(options)
    try:
        answer = server.call(
            lambda: _get(options, bucket, key, max_bytes),
            f"cannot read {uri}",
            max_outage_s=options.max_outage_s,
            other_request=lambda: _ask_for_another(s3_client(options), bucket, server.last_read),
        )
    except handled() as error:
        raise object_error(error, uri) from error
    server.last_read = (bucket, key)
    return answer


def head(options: S3Options, bucket: str, key: str, what: str) -> dict[str, Any]:
    """What the server says of one object without its content.

    Raises ObjectNotFoundError, ObjectAccessDeniedError or StorageError; `what` says what could not be done.
    """

    def request(client: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = client.head_object(Bucket=bucket, Key=key)
        except handled() as error:
            if is_missing(error):
                raise ObjectNotFoundError(f"{what}: there is no such object") from error
            if is_denied(error):
                raise ObjectAccessDeniedError(f"{what}: access denied; these keys may not do this") from error
            raise
        return answer

    return ask(options, what, request)


def _get(options: S3Options, bucket: str, key: str, max_bytes: int | None) -> tuple[bytes, str]:
    """botocore repeats requests, but not the reading of a body that breaks off or stalls: that is repeated here."""
    from botocore.exceptions import ClientError

    for attempt in range(1, options.max_attempts + 1):
        answered = False
        try:
            answer = s3_client(options).get_object(Bucket=bucket, Key=key)
            answered = True
            return _body(answer, f"s3://{bucket}/{key}", max_bytes), answer.get("ETag", "").strip('"')
        except handled() as error:
            if not answered or isinstance(error, ClientError) or attempt == options.max_attempts:
                raise
            time.sleep(random.uniform(0, _BODY_BACKOFF_S * 2**attempt))
    raise AssertionError("the last attempt returns or raises")


def _body(answer: dict[str, Any], uri: str, max_bytes: int | None) -> bytes:
    with answer["Body"] as body:
        size = answer.get("ContentLength")
        if max_bytes is not None and size is not None and size > max_bytes:
            raise ImageTooLargeError(f"{uri}: {size} bytes, more than the limit of {max_bytes}")
        if max_bytes is None or size is not None:
            data: bytes = body.read()  # raises if it is shorter than Content-Length
            return data
        data = body.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ImageTooLargeError(f"{uri}: more than the limit of {max_bytes} bytes")
        return data


def _ask_for_another(client: Any, bucket: str, last_read: tuple[str, str] | None) -> None:
    """Look whether the server can do anything: a byte of an object that it could give before, else one key."""
    if last_read is None:
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        return
    with client.get_object(Bucket=last_read[0], Key=last_read[1], Range="bytes=0-0")["Body"] as body:
        body.read()
