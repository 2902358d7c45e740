"""What every store can do."""

from __future__ import annotations

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
    def list_level(self, prefix: str = "") -> Iterator[ObjectInfo | str]:
        """One level only: the objects and, as keys that end in `/`, the folders directly below the folder `prefix`.

        `prefix` is "" or ends in `/`. With it, folders can be listed in parallel.
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
