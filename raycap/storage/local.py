"""Directories and files of this machine as a store."""

# Paths are strings here: Path tidies keys ("a//b"), and costs several times as much for each of many files.
# ruff: noqa: PTH100, PTH103, PTH108, PTH111, PTH112, PTH113, PTH116, PTH118, PTH119, PTH120

from __future__ import annotations

import builtins
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from raycap.errors import (
    ConditionalWritesUnsupportedError,
    FetchError,
    ImageTooLargeError,
    NotFoundError,
    ObjectAccessDeniedError,
    ObjectError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    StorageError,
)
from raycap.storage.base import TEMPORARY_PREFIX, ObjectInfo, Span, Store
from raycap.storage.files import (
    NO_LOCKS,
    NO_SUCH_FILE,
    identity,
    locked,
    printable,
    reason,
    replace_file,
    storage_error,
    unprintable,
    write_temporary,
)

_PROBE_BYTES = 4096
"""One block of the usual file systems: an empty file can often still be made on a full disk, a block cannot."""


class LocalStore(Store):
    """A directory, or one file.

    Symbolic links are followed, except those that lead back to a directory they are in. Pipes, sockets, devices and
    dangling links are no objects. A name that is not UTF-8 is shown with its odd bytes as `\\xNN` (so that it fits into
    a table) and found again by it.
    """

    def __init__(self, path: str) -> None:
        self.location = os.path.abspath(os.path.expanduser(path))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.list_span(Span(prefix))

    def split(self, num_spans: int) -> builtins.list[Span]:
        """One span: a disk lists faster than anybody reads."""
        return [Span()]

    def list_span(self, span: Span, *, after: str = "") -> Iterator[ObjectInfo]:
        if os.path.isfile(self.location):
            infos = self._single_file()
        else:
            self._require_directory()
            infos = self._walk(span, max(span.after, after))
        for info in infos:
            if span.until is not None and info.key > span.until:
                return
            if info.key.startswith(span.prefix) and info.key > max(span.after, after):
                yield info

    def _walk(self, span: Span, after: str) -> Iterator[ObjectInfo]:
        """The files of the folder of `span.prefix` and below, in byte order, without folders that end before `after`.

        Python compares text by code points, which gives the order of its UTF-8 bytes.
        """
        folder = span.prefix[: span.prefix.rfind("/") + 1]
        if _leaves_root(folder):
            return
        # A stack of open folders instead of recursion: paths can be deeper than Python's stack. The device and inode of
        # each folder on it tell a link that leads back.
        path = self._path(folder)
        stack = [(identity(path), folder, path, self._names(path))]
        while stack:
            _, parent_key, parent_path, names = stack[-1]
            name = next(names, None)
            if name is None:
                stack.pop()
                continue
            key, path = parent_key + printable(name), os.path.join(parent_path, name.removesuffix("/"))
            if key < after and not after.startswith(key):
                continue
            if not name.endswith("/"):
                if (info := self._info(key, path)) is not None:
                    yield info
            elif not span.level and (key.startswith(span.prefix) or span.prefix.startswith(key)):
                folder_identity = identity(path)
                if folder_identity not in {entry[0] for entry in stack}:
                    stack.append((folder_identity, key, path, self._names(path)))

    def read(self, key: str, *, max_bytes: int | None = None) -> bytes:
        path = self._path(key)
        if _is_no_file_key(key):
            raise ObjectNotFoundError(f"expected the key of a file below {self.location}, got {key!r}")
        try:
            # Without O_NONBLOCK, opening a pipe would wait for its writer.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise ObjectNotFoundError(f"{path}: expected a file, found a directory, pipe or device")
                if max_bytes is not None and status.st_size > max_bytes:
                    raise ImageTooLargeError(f"{path}: {status.st_size} bytes, more than the limit of {max_bytes}")
                data = file.read()
        except OSError as error:
            raise self._object_error(error, path) from error
        if len(data) < status.st_size:
            raise ObjectUnreadableError(
                f"{path}: expected {status.st_size} bytes, got {len(data)}; it shrank while it was read"
            )
        return data

    def write(self, key: str, data: bytes) -> None:
        path = self._path_to_write(key)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            replace_file(path, data)
        except OSError as error:
            raise storage_error(error, f"cannot write {path}") from error

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        try:
            data = self.read(key)
        except (ObjectNotFoundError, NotFoundError):
            return None
        except ObjectError as error:
            raise StorageError(str(error)) from error
        return data, _version(data)

    def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
        path = self._path_to_write(key)
        folder, name = os.path.split(path)
        lock = f"{TEMPORARY_PREFIX}lock-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
        try:
            os.makedirs(folder, exist_ok=True)
            with locked(os.path.join(folder, lock)):
                found = self.read_versioned(key)
                if (found and found[1]) != version:
                    return None
                replace_file(path, data)
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise ConditionalWritesUnsupportedError(f"the file system of {folder} has no locks") from error
            raise storage_error(error, f"cannot write {path}") from error
        return _version(data)

    def exists(self, key: str) -> bool:
        return not _is_no_file_key(key) and os.path.isfile(self._path(key))

    def delete(self, key: str) -> None:
        if _is_no_file_key(key):
            return
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self._path(key))
        except OSError as error:
            raise storage_error(error, f"cannot delete {self._path(key)}") from error

    def uri(self, key: str) -> str:
        return os.path.join(printable(self._base()), key)

    def check_readable(self) -> None:
        try:
            if os.path.isfile(self.location):
                with open(self.location, "rb") as file:
                    file.read(1)
                return
            self._require_directory()
            with os.scandir(self.location) as entries:
                next(entries, None)
        except OSError as error:
            raise storage_error(error, f"cannot read {self.location}") from error

    def check_writable(self) -> None:
        # Where the directory is still to be made, what counts is the nearest parent that is there.
        folder = self.location
        while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            raise StorageError(f"cannot write to {self.location}: expected a directory, but {folder} is a file")
        try:
            os.unlink(write_temporary(folder, b"\0" * _PROBE_BYTES))
        except OSError as error:
            raise storage_error(error, f"cannot write to {self.location}") from error

    def _base(self) -> str:
        """The directory that keys are relative to: of a single file, the one it is in."""
        return os.path.dirname(self.location) if os.path.isfile(self.location) else self.location

    def _path(self, key: str) -> str:
        path = os.path.join(self._base(), key)
        if "\\x" in key and not os.path.lexists(path):
            return unprintable(path)
        return path

    def _path_to_write(self, key: str) -> str:
        if _is_no_file_key(key):
            raise StorageError(f"expected the key of a file below {self.location}, got {key!r}")
        return os.path.join(self.location, key)

    def _single_file(self) -> Iterator[ObjectInfo]:
        if (info := self._info(printable(os.path.basename(self.location)), self.location)) is not None:
            yield info

    def _info(self, key: str, path: str) -> ObjectInfo | None:
        """None where it vanished meanwhile."""
        try:
            status = os.stat(path)
        except OSError:
            return None
        return ObjectInfo(key, printable(path), status.st_size, f"{status.st_size:x}-{status.st_mtime_ns:x}")

    def _names(self, folder: str) -> Iterator[str]:
        """The names of a folder's files and, with a `/` at their end, of its folders.

        Sorted with that `/`, they give the whole walk the byte order of S3: `photos-old/1` comes before `photos/1`.
        """
        names = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    with suppress(OSError):  # a link to itself
                        if entry.is_dir():
                            names.append(f"{entry.name}/")
                        elif entry.is_file() and not entry.name.startswith(TEMPORARY_PREFIX):
                            names.append(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise storage_error(error, f"cannot list {folder}") from error
        names.sort(key=printable)
        return iter(names)

    def _require_directory(self) -> None:
        if not os.path.lexists(self.location):
            raise NotFoundError(f"there is no file or directory {self.location}; check the path")
        if not os.path.isdir(self.location):
            raise StorageError(f"expected a directory or a file, but {self.location} is neither")

    def _object_error(self, error: OSError, path: str) -> FetchError | StorageError:
        if error.errno in NO_SUCH_FILE:
            if not os.path.lexists(self.location):  # unmounted or deleted: then every file is gone
                return NotFoundError(f"there is no longer a file or directory {self.location}")
            return ObjectNotFoundError(f"{path}: {reason(error)}")
        if isinstance(error, PermissionError):
            return ObjectAccessDeniedError(f"{path}: {reason(error)}")
        return ObjectUnreadableError(f"{path}: {reason(error)}")


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _leaves_root(key: str) -> bool:
    return key.startswith("/") or "\0" in key or ".." in key.split("/")


def _is_no_file_key(key: str) -> bool:
    return not key or key.endswith("/") or _leaves_root(key)
