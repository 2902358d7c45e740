"""Every error that raycap raises on purpose.

The tree::

    RaycapError
    ├── ConfigurationError          what the user asked for cannot be done; exit code 2
    │   └── BundleError             a model bundle is missing, damaged or does not fit its config
    ├── StorageError                storage that will not get better by itself; stops a run, exit code 2
    │   ├── CredentialsError        keys missing, unknown, expired, or not allowed to do this at all
    │   ├── NotFoundError           no such bucket, prefix, directory or file
    │   ├── EndpointError           the S3 endpoint cannot be reached or does not speak S3
    │   └── ConditionalWritesUnsupportedError   the S3 server or file system cannot write on a condition
    ├── StalledError                nothing happens any more in a run; exit code 70
    ├── ProblemError                (raycap.serve) a request to the endpoint that gets a problem as its answer
    ├── AnswerError                 (raycap.serve.client) what a client got instead of captions
    └── ObjectError                 one object failed: it becomes a row with `code`, never a dead job
        ├── FetchError              its bytes could not be had
        │   ├── ObjectNotFoundError         code "not_found"
        │   ├── ObjectAccessDeniedError     code "access_denied"
        │   └── ObjectUnreadableError       code "fetch_failed": retries ran out, or the body was cut short
        └── ImageError              its bytes are not a picture that can be captioned
            ├── EmptyImageError             code "empty"
            ├── NotAnImageError             code "not_an_image"
            ├── UnsupportedImageError       code "unsupported_format": a picture, of a format we do not read
            ├── TruncatedImageError         code "truncated"
            ├── CorruptImageError           code "corrupt"
            └── ImageTooLargeError          code "too_large": past the pixel or byte limit

A message says what was expected, what came, and what to do. It never holds a credential.
"""

from __future__ import annotations

from typing import ClassVar


class RaycapError(Exception):
    """Base of all errors raised on purpose. The command line prints its message alone, without a traceback."""


class ConfigurationError(RaycapError):
    """What was asked for cannot be done: a bad option, a missing file, settings that contradict each other."""


class BundleError(ConfigurationError):
    """A model bundle is missing, damaged, too new, or does not match its own config."""


class StorageError(RaycapError):
    """Storage fails in a way that will not pass by itself."""


class CredentialsError(StorageError):
    """Keys are missing, unknown or expired, or may not touch this bucket at all."""


class NotFoundError(StorageError):
    """There is no such bucket, prefix, directory or file."""


class EndpointError(StorageError):
    """The S3 endpoint cannot be reached, or what answers there does not speak S3."""


class ConditionalWritesUnsupportedError(StorageError):
    """The S3 server does not know conditional writes (If-Match, If-None-Match), or the file system has no locks."""


class StalledError(RaycapError):
    """Nothing happens any more in a run, which may go on when it is started again."""


class ObjectError(RaycapError):
    """One object could not be captioned. `code` goes into the output column `error_code`."""

    code: ClassVar[str] = "failed"


def object_error_codes() -> set[str]:
    """All error codes that failed rows can have."""
    pending, codes = [ObjectError], set()
    while pending:
        each = pending.pop()
        codes.add(each.code)
        pending += each.__subclasses__()
    return codes


class FetchError(ObjectError):
    """The bytes of one object could not be had."""

    code = "fetch_failed"


class ObjectNotFoundError(FetchError):
    """The object was listed but is gone."""

    code = "not_found"


class ObjectAccessDeniedError(FetchError):
    """This one object may not be read, though others of its bucket may."""

    code = "access_denied"


class ObjectUnreadableError(FetchError):
    """Retries ran out, or the body was shorter than the server said."""

    code = "fetch_failed"


class ImageError(ObjectError):
    """The bytes are not a picture that can be captioned."""

    code = "image_error"


class EmptyImageError(ImageError):
    """Zero bytes."""

    code = "empty"


class NotAnImageError(ImageError):
    """The bytes are of no image format at all, whatever the name says."""

    code = "not_an_image"


class UnsupportedImageError(ImageError):
    """A picture, but of a format that raycap does not read."""

    code = "unsupported_format"


class TruncatedImageError(ImageError):
    """The picture ends before its data does."""

    code = "truncated"


class CorruptImageError(ImageError):
    """The header is good, the pixels are not."""

    code = "corrupt"


class ImageTooLargeError(ImageError):
    """More pixels or bytes than the limit. Raised before any pixel is decoded."""

    code = "too_large"
