"""s3:// and local paths behind one small interface. The only S3 code of raycap.

    store = open_store("s3://photos/2024/", S3Options(endpoint_url="http://minio:9000"))
    store.check_readable()                 # one clear error before anything starts
    for info in store.list():              # streamed, in key order
        data = store.read(info.key)

Knows nothing of images, Ray or torch. boto3 is imported when first needed, not with this package.

    base.py      ObjectInfo, Span, and Store: what every store can do
    local.py     LocalStore: directories and files of this machine
    files.py     local files: written whole, locked, named in text
    options.py   S3Options: how to reach an S3 server
    client.py    S3Options -> boto3 client: endpoint, region, retries, checksums; the same for pyarrow
    failures.py  what boto3 raises -> one of raycap's errors, free of secrets
    patience.py  waits for a server that is away for a while
    fetch.py     the content of one object
    listing.py   what is in a bucket, page by page
    spans.py     cuts a listing into parts that can be listed at the same time
    s3.py        S3Store: buckets and prefixes
    anywhere.py  Anywhere: objects by their full address
    lock.py      one run on one output at a time
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from urllib.parse import unquote, urlsplit

from raycap.errors import (
    ConfigurationError,
    CredentialsError,
    ObjectAccessDeniedError,
    ObjectError,
    ObjectNotFoundError,
    StorageError,
)
from raycap.errors import NotFoundError as _NotFoundError
from raycap.storage.anywhere import Anywhere
from raycap.storage.base import ObjectInfo, Span, Store
from raycap.storage.client import arrow_filesystem
from raycap.storage.local import LocalStore
from raycap.storage.options import S3Options, refuse_secrets
from raycap.storage.s3 import S3Store

__all__ = [
    "Anywhere",
    "LocalStore",
    "ObjectInfo",
    "S3Options",
    "S3Store",
    "Span",
    "Store",
    "arrow_filesystem",
    "check_file_writable",
    "is_s3",
    "open_store",
    "read_bytes",
    "write_bytes",
]

_DEFAULT_S3 = S3Options()
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MISTYPED_S3 = re.compile(r"s3[an]?:", re.IGNORECASE)


def is_s3(location: str | os.PathLike[str]) -> bool:
    """Whether `location` is an s3:// address. Asks nobody."""
    return os.fspath(location).startswith("s3://")


def open_store(location: str | os.PathLike[str], s3: S3Options = _DEFAULT_S3) -> Store:
    """The store at an `s3://bucket/prefix`, a `file:///` address or a local path. Reaches no server and needs no keys
    yet.

    An s3:// address is taken as it is, without percent-decoding: `s3://bucket/a%20b` is the key `a%20b`.

    Raises ConfigurationError for anything else, with what to type instead.
    """
    text = os.fspath(location)
    if not text:
        raise ConfigurationError("expected a directory or s3://bucket/prefix, got an empty location")
    if "\0" in text:
        raise ConfigurationError(f"a location cannot hold a NUL character: {text!r}")
    if is_s3(text):
        return S3Store(text, s3)
    return LocalStore(_local_path(text))


def read_bytes(location: str | os.PathLike[str], s3: S3Options = _DEFAULT_S3) -> bytes:
    """The content of the one file or object at `location`. Commands begin with it, so it does not wait for a server
    that is away.

    Raises StorageError (NotFoundError, CredentialsError, EndpointError) or ConfigurationError, never an ObjectError: a
    file that is asked for by its full path is needed.
    """
    store, name = _parent_store(location, replace(s3, max_outage_s=0.0))
    try:
        return store.read(name)
    except ObjectNotFoundError as error:
        raise _NotFoundError(str(error)) from error
    except ObjectAccessDeniedError as error:
        raise (CredentialsError if is_s3(location) else StorageError)(str(error)) from error
    except ObjectError as error:
        raise StorageError(str(error)) from error


def write_bytes(location: str | os.PathLike[str], data: bytes, s3: S3Options = _DEFAULT_S3) -> None:
    """Make `data` the content of the one file or object at `location`: whole or not at all. Creates missing parents."""
    store, name = _parent_store(location, s3)
    store.write(name, data)


def check_file_writable(location: str | os.PathLike[str], s3: S3Options = _DEFAULT_S3) -> None:
    """Return if `write_bytes` can write there, else raise the error that says why. Leaves everything as it is."""
    store, name = _parent_store(location, s3)
    if isinstance(store, LocalStore) and os.path.isdir(store.uri(name)):  # noqa: PTH112
        raise ConfigurationError(f"expected the full path of one file, got the folder {location}")
    store.check_writable()


def _parent_store(location: str | os.PathLike[str], s3: S3Options) -> tuple[Store, str]:
    text = os.fspath(location)
    store = open_store(text, s3)  # refuses what is no location
    parent, _, name = store.location.rpartition("/")
    if text.endswith("/") or not name or (isinstance(store, S3Store) and not store.prefix):
        raise ConfigurationError(f"expected the full path of one file, got the folder {text}")
    return open_store(f"{parent}/", s3), name


def _local_path(text: str) -> str:
    if text.startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise ConfigurationError(f"expected file:///absolute/path, got {text}")
        return unquote(parts.path)
    if _MISTYPED_S3.match(text):
        rest = _MISTYPED_S3.sub("", text, count=1).lstrip("/")
        refuse_secrets(rest)
        raise ConfigurationError(f"expected s3://bucket/prefix, got {text!r}; type s3://{rest or 'BUCKET/PREFIX'}")
    if scheme := _SCHEME.match(text):
        hint = "type s3://BUCKET/PREFIX or the path of a directory"
        if scheme[1] in ("http", "https"):
            hint = "type s3://BUCKET/PREFIX, and give the server's address as the S3 endpoint URL"
        elif scheme[1] == "gs":
            hint = "for Google Cloud Storage type s3://BUCKET/PREFIX with the endpoint https://storage.googleapis.com"
        refuse_secrets(text)
        raise ConfigurationError(f"{scheme[1]}:// locations are not supported: {text.partition('?')[0]}; {hint}")
    return text
