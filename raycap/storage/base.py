"""What every store can do."""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

TEMPORARY_PREFIX = ".raycap-tmp-"
"""Names that start so are raycap's own, half written or about to be deleted: no listing shows them."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    """Path relative to the store's root, with `/` between its parts. What `Store.read` takes."""

    uri: str
    """Where it is, in full: `s3://bucket/key` with the key as it is (not percent-encoded), or an absolute local path.
    `open_store(uri)` and `read_bytes(uri)` find it again."""

    size: int
    """Bytes."""

    etag: str
    """Changes when the content changes: the S3 ETag without its quotes, or size and modification time of a local
    file."""

    storage_class: str = ""
    """S3's storage class, such as STANDARD or GLACIER. "" for a local file, and where the server names none."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a listing. The spans that `Store.split` gives are disjoint and together the whole listing.

    A span holds the objects that have all that is said here. Keys are relative to the store's root.
    """

    prefix: str = ""
    """The key starts with it."""

    after: str = ""
    """The key sorts after it, or all do where it is "". Need not be a key."""

    until: str | None = None
    """The key is not after it, in byte order. Need not be a key. None: no end."""

    level: bool = False
    """The object is directly in the folder `prefix`, which is "" or ends in `/`, not in a folder below."""


class Store(ABC):
    """Objects under one root: a folder, or a single object (then its name is the only key).

    Stores are small, can be pickled, and may be used by many threads. A key never escapes the root.
    """

    location: str
    """The root: `s3://bucket/prefix`, or an absolute local path."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, recursively, streamed in key order (UTF-8 bytes).

        An S3 server that sorts otherwise (SeaweedFS: folder by folder) keeps its own order. Raises NotFoundError,
        CredentialsError, EndpointError or StorageError, then or while it is consumed.
        """

    @abstractmethod
    def split(self, num_spans: int) -> builtins.list[Span]:
        """The listing in about `num_spans` parts that can be listed at the same time: disjoint and together the whole.

        There may be fewer where the store cannot be divided cheaply, and more where it has many folders.
        """

    @abstractmethod
    def list_span(self, span: Span, *, after: str = "") -> Iterator[ObjectInfo]:
        """The objects of one span, streamed in the order of `list`.

        `after` is the key that an earlier listing of this span gave last: goes on behind it, in the store's own order.
        Raises what `list` raises.
        """

    @abstractmethod
    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole content of one object.

        Raises ObjectNotFoundError, ObjectAccessDeniedError or ObjectUnreadableError where this object is at fault,
        ImageTooLargeError, before anything is downloaded, where it is bigger than `max_bytes`, and StorageError where
        no other object would fare better.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Make `data` the content of `key`: readers see the old content or the new, never a part. Raises
        StorageError."""

    @abstractmethod
    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        """Content and version of one object, for `write_if`. None: there is no such object. Raises StorageError."""

    @abstractmethod
    def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
        """Write only if the object is still at `version`; None: only if there is none. Of several writers one succeeds.

        Returns the new version, or None if the condition does not hold. Should two writers want to write the same
        bytes, both may be told that they did: put something of each one's own into them. Raises StorageError, and
        ConditionalWritesUnsupportedError where the server refuses such writes.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object with exactly this key. Raises StorageError."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete one object; none there is no error. Raises StorageError."""

    @abstractmethod
    def uri(self, key: str) -> str:
        """The full address of `key`, as in `ObjectInfo.uri`."""

    @abstractmethod
    def check_readable(self) -> None:
        """Return if objects here can be listed and read, else raise the one StorageError that says why. Answers
        fast."""

    @abstractmethod
    def check_writable(self) -> None:
        """Return if objects can be written here, else raise the one StorageError that says why. Leaves nothing
        behind."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.location!r})"
