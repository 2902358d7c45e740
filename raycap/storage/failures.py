"""What boto3 raises -> one of raycap's errors.

Messages are our own words, the server's error code and the address. What the server or boto3 wrote beside it is left
out: it may repeat headers or parts of a key.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from raycap.errors import (
    CredentialsError,
    EndpointError,
    FetchError,
    NotFoundError,
    ObjectAccessDeniedError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    StorageError,
)

# Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_BAD_KEYS = {
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID, profile and endpoint",
    "SignatureDoesNotMatch": "the secret key does not belong to this access key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; get new temporary keys",
    "TokenRefreshRequired": "the session token has expired; get new temporary keys",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN, or unset it if the keys need none",
    "RequestTimeTooSkewed": "the clock of this machine differs too much from the server's; set it right",
    "NotSignedUp": "the account of these keys is not signed up for S3",
    "InvalidSecurity": "the server does not accept these keys",
}
_OTHER_REGION = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "UnauthorizedAccess", "403", "401"}
_NO_KEY = {"NoSuchKey", "NoSuchVersion", "404"}
_ARCHIVED = "InvalidObjectState"
_LASTING = {501, 505, 507}
"""Not implemented, HTTP version not supported, insufficient storage: these do not pass by themselves."""


def object_error(error: Exception, uri: str) -> FetchError | StorageError:
    """The error for reading one object: FetchError if another object may fare better, else StorageError."""
    from botocore.exceptions import (
        ClientError,
        ConnectTimeoutError,
        EndpointConnectionError,
        HTTPClientError,
        ProxyConnectionError,
        ResponseStreamingError,
        SSLError,
    )

    if isinstance(error, ClientError):
        code, status = _code(error), _status(error)
        if code in _BAD_KEYS or code in _OTHER_REGION or code == "NoSuchBucket":
            return storage_error(error, f"cannot read {uri}")
        if code in _NO_KEY or status == 404:
            return ObjectNotFoundError(f"{uri}: there is no such object (any more)")
        if code == _ARCHIVED:
            return ObjectUnreadableError(f"{uri}: the object is in an archive class; restore it first")
        if code in _DENIED or status in (401, 403):
            return ObjectAccessDeniedError(
                f"{uri}: access denied ({code or status}); the keys may not read this object"
            )
        return ObjectUnreadableError(
            f"{uri}: the server answered {code or 'an error'} (HTTP {status}), also after retries"
        )
    unreachable = (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError, SSLError)
    if isinstance(error, unreachable) or not _is_transfer_failure(error, HTTPClientError, ResponseStreamingError):
        return storage_error(error, f"cannot read {uri}")
    return ObjectUnreadableError(f"{uri}: the transfer broke off ({type(error).__name__}), also after retries")


def storage_error(error: Exception, what: str) -> StorageError:
    """The error for everything but reading one object. `what` says what could not be done."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        return _answered(error, what)
    if isinstance(error, boto.NoCredentialsError):
        return CredentialsError(
            f"{what}: no S3 keys found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile, "
            "or ask for anonymous access if the bucket is public"
        )
    if isinstance(error, boto.PartialCredentialsError):
        missing = error.kwargs.get("cred_var", "a part")
        return CredentialsError(f"{what}: the S3 keys are incomplete: {missing} is missing")
    if isinstance(
        error,
        boto.CredentialRetrievalError
        | boto.MetadataRetrievalError
        | boto.TokenRetrievalError
        | boto.NoAuthTokenError
        | boto.SSOError
        | boto.UnknownCredentialError
        | boto.InvalidConfigError,
    ):
        return CredentialsError(
            f"{what}: the S3 keys could not be had ({type(error).__name__}); log in again or check the profile"
        )
    if isinstance(error, boto.SSLError):
        return EndpointError(
            f"{what}: no TLS connection to {_host(error)}; check http:// against https:// "
            "and the server's certificate (AWS_CA_BUNDLE)"
        )
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return EndpointError(f"{what}: {_host(error)} did not answer in time; check the endpoint URL and the network")
    if isinstance(error, boto.ProxyConnectionError):
        return EndpointError(f"{what}: the HTTP proxy cannot be reached; check HTTPS_PROXY and NO_PROXY")
    if isinstance(error, boto.EndpointConnectionError):
        return EndpointError(f"{what}: {_why_not_connected(error)}; check the endpoint URL and the network")
    if isinstance(error, boto.HTTPClientError | boto.ResponseStreamingError | boto.IncompleteReadError):
        return EndpointError(
            f"{what}: {_host(error)} closed the connection; check http:// against https:// and the port"
        )
    if isinstance(error, boto.ParamValidationError):
        return StorageError(f"{what}: the bucket name or key is not valid for S3")
    if isinstance(error, _parser_error()):
        return not_s3(what)
    return StorageError(f"{what}: {type(error).__name__}")


def not_s3(what: str) -> EndpointError:
    """The error for an answer that is no S3 answer, for instance a web page."""
    return EndpointError(f"{what}: what answers at the endpoint does not speak S3; check the endpoint URL and its port")


def handled() -> tuple[type[Exception], ...]:
    """The exceptions that may come out of a boto3 call or of reading a body."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    return (BotoCoreError, ClientError, Boto3Error, HTTPError, _parser_error(), OSError)


def is_missing(error: Exception) -> bool:
    """Whether a HEAD request was answered: no such object."""
    return _status(error) == 404


def is_denied(error: Exception) -> bool:
    """Whether a HEAD request was refused. Without a body, the server cannot say why."""
    return _status(error) in (401, 403)


def is_unmet(error: Exception) -> bool:
    """Whether a conditional write was refused because its condition does not hold. AWS says 409 where another writer
    was at it at the same moment, and 404 where the object is gone."""
    code, status = _code(error), _status(error)
    return code in ("PreconditionFailed", "ConditionalRequestConflict") or status == 412 or code in _NO_KEY


def is_unsupported(error: Exception) -> bool:
    """Whether the server says that it does not know such requests."""
    return _status(error) == 501


def num_retries(error: Exception) -> int:
    """How often boto3 repeated the request before this answer came."""
    return int(getattr(error, "response", {}).get("ResponseMetadata", {}).get("RetryAttempts", 0))


def is_unreachable(error: Exception) -> bool:
    """Whether no connection to the server came about."""
    from botocore import exceptions as boto

    unreachable = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)
    return isinstance(error, unreachable)


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later: no connection, a broken transfer, throttling, a server in trouble."""
    from botocore.exceptions import ClientError, HTTPClientError, ResponseStreamingError, SSLError

    if isinstance(error, ClientError):
        status = _status(error)
        return status == 429 or _code(error) == "RequestTimeout" or (status >= 500 and status not in _LASTING)
    if isinstance(error, SSLError):  # a certificate that is not trusted stays so; a handshake that breaks off does not
        return "EOF" in str(error)
    return is_unreachable(error) or _is_transfer_failure(error, HTTPClientError, ResponseStreamingError)


def _answered(error: Exception, what: str) -> StorageError:
    code, status = _code(error), _status(error)
    if code in _BAD_KEYS:
        return CredentialsError(f"{what}: {_BAD_KEYS[code]} ({code})")
    if code == "NoSuchBucket":
        return NotFoundError(f"{what}: there is no such bucket; check its name and the endpoint")
    if code in _OTHER_REGION or status in (301, 307):
        region = _region(error)
        return EndpointError(
            f"{what}: the bucket is in another region{f', {region}' if region else ''} ({code}); "
            "set AWS_REGION to the bucket's region"
        )
    if code in _DENIED or (code and status in (401, 403)):
        return CredentialsError(
            f"{what}: access denied ({code}); these keys may not do this, check the policy of user and bucket"
        )
    if not code or code.isdigit():  # no S3 error document in the answer
        if status >= 500:
            return EndpointError(
                f"{what}: no S3 answer came, also after retries (HTTP {status}); "
                "check the endpoint URL, or try again later"
            )
        return not_s3(f"{what} (HTTP {status})")
    if status >= 500:
        return EndpointError(f"{what}: the server answered {code} (HTTP {status}), also after retries; try again later")
    return StorageError(f"{what}: the server answered {code} (HTTP {status})")


def _is_transfer_failure(error: Exception, *boto_errors: type[Exception]) -> bool:
    from botocore.exceptions import FlexibleChecksumError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    return isinstance(error, (*boto_errors, IncompleteReadError, FlexibleChecksumError, HTTPError, OSError))


def _why_not_connected(error: Any) -> str:
    cause = error.kwargs.get("error")
    if type(cause).__name__ == "NameResolutionError":
        return f"the name {urlsplit(str(error.kwargs.get('endpoint_url'))).hostname} does not resolve"
    if "refused" in str(cause):
        return f"{_host(error)} refuses the connection"
    return f"no connection to {_host(error)}"


def _host(error: Any) -> str:
    """Scheme, host and port alone: the rest of the URL may be signed."""
    parts = urlsplit(str(error.kwargs.get("endpoint_url", "")))
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if host else "the S3 endpoint"


def _code(error: Any) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _region(error: Any) -> str | None:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region: str | None = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
    return region


def _parser_error() -> type[Exception]:
    from botocore.parsers import ResponseParserError

    error: type[Exception] = ResponseParserError
    return error
