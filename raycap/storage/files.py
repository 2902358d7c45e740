"""Local files: written whole, locked between processes, named in text, and what their errors mean."""

# Paths are strings here, as in local.py.
# ruff: noqa: PTH105, PTH108, PTH116, PTH118, PTH120

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from raycap.errors import StorageError
from raycap.storage.base import TEMPORARY_PREFIX

NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EINVAL}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What `locked` raises on network file systems that are mounted without locks."""
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


def replace_file(path: str, data: bytes) -> None:
    """Make `data` the content of `path`, whole or not at all. The folder must be there. Raises OSError."""
    folder = os.path.dirname(path)
    temporary = write_temporary(folder, data)
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    _sync_directory(folder)


def write_temporary(folder: str, data: bytes) -> str:
    """A new file in `folder` that has reached the disk; on failure there is none. Raises OSError."""
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


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock file `path`, which no other process or thread does meanwhile; wait for it. Raises OSError.

    The lock ends with the process that holds it, however that ends; then the file may stay, and locks nothing.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever held it before has deleted the file: then this lock is on a file that nobody else will find.
            if identity(path) != _identity_of(os.fstat(descriptor)):
                continue
            try:
                yield
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(path)
            return
        finally:
            os.close(descriptor)


def _sync_directory(folder: str) -> None:
    """Make a rename survive a power cut. Some network file systems refuse this; then there is no more to do."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def identity(path: str) -> tuple[int, int] | None:
    """What tells files and folders apart, whatever links lead to them. None: there is nothing."""
    try:
        return _identity_of(os.stat(path))
    except OSError:
        return None


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def printable(path: str) -> str:
    """The path as text that fits into a table: bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def unprintable(path: str) -> str:
    """What `printable` made such text from."""
    raw = os.fsencode(path)
    for byte in range(0x80, 0x100):
        raw = raw.replace(b"\\x%02x" % byte, bytes([byte]))
    return os.fsdecode(raw)


def reason(error: OSError) -> str:
    """What went wrong and what to do, in our words."""
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


def storage_error(error: OSError, what: str) -> StorageError:
    """The error for what could not be done."""
    return StorageError(f"{what}: {reason(error)}")
