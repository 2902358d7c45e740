"""Directories and files of this machine as a store."""

# Paths are strings here: Path tidies keys ("a//b"), and costs several times as much for each of many files.
# ruff: noqa: PTH100, PTH103, PTH105, PTH108, PTH111, PTH112, PTH113, PTH116, PTH118, PTH119, PTH120

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress

from raycap.errors import (
    FetchError,
    ImageTooLargeError,
    NotFoundError,
    ObjectAccessDeniedError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    StorageError,
)
from raycap.storage.base import TEMPORARY_PREFIX, ObjectInfo, Store

_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EINVAL}
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EACCES: "permission denied; run as a user who may, or change its permissions",
    errno.EPERM: "permission denied; run as a user who may, or change its permissions",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.ENOENT: "there is no such file or directory",
    errno.ENOTDIR: "a directory was expected, but a part of this path is a file",
    errno.EISDIR: "a file was expected, but this is a directory",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}
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
        if os.path.isfile(self.location):
            yield from self._single_file(prefix)
            return
        self._require_directory()
        folder = prefix[: prefix.rfind("/") + 1]
        if _leaves_root(folder):
            return
        # A stack of open folders instead of recursion: paths can be deeper than Python's stack. The device and inode of
        # each folder on it tell a link that leads back.
        path = self._path(folder)
        stack = [(_identity(path), folder, path, self._names(path))]
        while stack:
            _, parent_key, parent_path, names = stack[-1]
            name = next(names, None)
            if name is None:
                stack.pop()
                continue
            key, path = parent_key + _printable(name), os.path.join(parent_path, name.removesuffix("/"))
            if not name.endswith("/"):
                if key.startswith(prefix) and (info := self._info(key, path)) is not None:
                    yield info
            elif key.startswith(prefix) or prefix.startswith(key):
                identity = _identity(path)
                if identity not in {entry[0] for entry in stack}:
                    stack.append((identity, key, path, self._names(path)))

    def list_level(self, prefix: str = "") -> Iterator[ObjectInfo | str]:
        if os.path.isfile(self.location):
            yield from self._single_file(prefix)
            return
        self._require_directory()
        if _leaves_root(prefix):
            return
        folder = self._path(prefix)
        for name in self._names(folder):
            key = prefix + _printable(name)
            if name.endswith("/"):
                yield key
            elif (info := self._info(key, os.path.join(folder, name))) is not None:
                yield info

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
        if _is_no_file_key(key):
            raise StorageError(f"expected the key of a file below {self.location}, got {key!r}")
        path = os.path.join(self.location, key)
        folder = os.path.dirname(path)
        try:
            os.makedirs(folder, exist_ok=True)
            temporary = _write_temporary(folder, data)
            try:
                os.replace(temporary, path)
            except OSError:
                os.unlink(temporary)
                raise
            _sync_directory(folder)
        except OSError as error:
            raise _storage_error(error, f"cannot write {path}") from error

    def exists(self, key: str) -> bool:
        return not _is_no_file_key(key) and os.path.isfile(self._path(key))

    def delete(self, key: str) -> None:
        if _is_no_file_key(key):
            return
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self._path(key))
        except OSError as error:
            raise _storage_error(error, f"cannot delete {self._path(key)}") from error

    def uri(self, key: str) -> str:
        return os.path.join(_printable(self._base()), key)

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
            raise _storage_error(error, f"cannot read {self.location}") from error

    def check_writable(self) -> None:
        # Where the directory is still to be made, what counts is the nearest parent that is there.
        folder = self.location
        while not os.path.lexists(folder) and os.path.dirname(folder) != folder:
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            raise StorageError(f"cannot write to {self.location}: expected a directory, but {folder} is a file")
        try:
            os.unlink(_write_temporary(folder, b"\0" * _PROBE_BYTES))
        except OSError as error:
            raise _storage_error(error, f"cannot write to {self.location}") from error

    def _base(self) -> str:
        """The directory that keys are relative to: of a single file, the one it is in."""
        return os.path.dirname(self.location) if os.path.isfile(self.location) else self.location

    def _path(self, key: str) -> str:
        path = os.path.join(self._base(), key)
        if "\\x" in key and not os.path.lexists(path):
            return _unprintable(path)
        return path

    def _single_file(self, prefix: str) -> Iterator[ObjectInfo]:
        name = _printable(os.path.basename(self.location))
        if name.startswith(prefix) and (info := self._info(name, self.location)) is not None:
            yield info

    def _info(self, key: str, path: str) -> ObjectInfo | None:
        """None where it vanished meanwhile."""
        try:
            status = os.stat(path)
        except OSError:
            return None
        return ObjectInfo(key, _printable(path), status.st_size, f"{status.st_size:x}-{status.st_mtime_ns:x}")

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
            raise _storage_error(error, f"cannot list {folder}") from error
        names.sort(key=os.fsencode)
        return iter(names)

    def _require_directory(self) -> None:
        if not os.path.lexists(self.location):
            raise NotFoundError(f"there is no file or directory {self.location}; check the path")
        if not os.path.isdir(self.location):
            raise StorageError(f"expected a directory or a file, but {self.location} is neither")

    def _object_error(self, error: OSError, path: str) -> FetchError | StorageError:
        if error.errno in _NO_SUCH_FILE:
            if not os.path.lexists(self.location):  # unmounted or deleted: then every file is gone
                return NotFoundError(f"there is no longer a file or directory {self.location}")
            return ObjectNotFoundError(f"{path}: {_reason(error)}")
        if isinstance(error, PermissionError):
            return ObjectAccessDeniedError(f"{path}: {_reason(error)}")
        return ObjectUnreadableError(f"{path}: {_reason(error)}")


def _write_temporary(folder: str, data: bytes) -> str:
    """A new file in `folder` that has reached the disk; on failure there is none."""
    temporary = os.path.join(folder, TEMPORARY_PREFIX + secrets.token_hex(8))
    # Not tempfile.mkstemp, whose files only their owner may read: the usual umask applies here.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


def _sync_directory(folder: str) -> None:
    """Make a rename survive a power cut. Some network file systems refuse this; then there is no more to do."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _leaves_root(key: str) -> bool:
    return key.startswith("/") or "\0" in key or ".." in key.split("/")


def _is_no_file_key(key: str) -> bool:
    return not key or key.endswith("/") or _leaves_root(key)


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _unprintable(path: str) -> str:
    """What `_printable` made such text from."""
    raw = os.fsencode(path)
    for byte in range(0x80, 0x100):
        raw = raw.replace(b"\\x%02x" % byte, bytes([byte]))
    return os.fsdecode(raw)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


def _storage_error(error: OSError, what: str) -> StorageError:
    return StorageError(f"{what}: {_reason(error)}")
