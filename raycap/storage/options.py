"""How to reach an S3 server."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from raycap.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Options:
    """How to reach an S3 server. Holds no keys: those come from the usual AWS chain (environment, profile, role)."""

    endpoint_url: str | None = None
    """Server other than AWS, `http://host:port`. None: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the AWS config."""

    region: str | None = None
    """None: AWS_REGION, AWS_DEFAULT_REGION or the AWS config file; else us-east-1, which most other servers accept."""

    path_style: bool | None = None
    """True: `endpoint/bucket/key`. False: `bucket.endpoint/key`. None: True where there is an endpoint, else False."""

    profile: str | None = None
    """Profile of the AWS config files. None: AWS_PROFILE, else the default one."""

    anonymous: bool = False
    """Sign no request, for public buckets."""

    connect_timeout_s: float = 10.0
    """Seconds to wait for a connection, for each attempt."""

    read_timeout_s: float = 15.0
    """Seconds without a byte before an attempt is given up."""

    max_attempts: int = 6
    """Attempts for each request, the first included. The waits between 6 are 15 s together on average, 31 s at most."""

    max_outage_s: float = 300.0
    """How long the server may be unreachable, or answer every request with an error that usually passes, before a run
    is given up; seconds. 0: no longer than `max_attempts` take."""

    byte_ordered: bool | None = None
    """Whether the server lists keys in the order of their UTF-8 bytes, as AWS does and SeaweedFS does not: then folders
    with many objects are listed in parallel too. True for a server that does not would lose objects. None: True without
    an endpoint (AWS), else False."""

    def __post_init__(self) -> None:
        if self.endpoint_url is not None:
            check_endpoint_url(self.endpoint_url)
        for name in ("connect_timeout_s", "read_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        if not self.max_outage_s >= 0:
            raise ConfigurationError(f"max_outage_s must be at least 0 seconds, got {self.max_outage_s}")
        if self.max_attempts < 1:
            raise ConfigurationError(f"max_attempts must be at least 1, got {self.max_attempts}")


def refuse_secrets(address: str) -> None:
    """Raise ConfigurationError, without repeating it, if a wrong address may hold keys (KEY:SECRET@host)."""
    if "@" in address:
        raise ConfigurationError(
            "expected an address without '@' (it is not repeated here, since it may hold keys); "
            "give keys as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def check_endpoint_url(url: str) -> None:
    """Raise ConfigurationError unless `url` is http(s)://host[:port]. The message never repeats a password in it."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # a bad port raises ValueError when it is looked at
    except ValueError as error:
        raise ConfigurationError("expected an S3 endpoint like http://host:port; this one does not parse") from error
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            "the S3 endpoint URL holds a user or password; give keys as AWS_ACCESS_KEY_ID and so on"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        refuse_secrets(url)
        raise ConfigurationError(f"expected an S3 endpoint like http://host:port, got {url!r}")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigurationError(
            "expected an S3 endpoint like http://host:port, without a path; the bucket belongs into s3://BUCKET"
        )
