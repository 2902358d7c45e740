"""S3Options -> boto3 client: endpoint, region, addressing, retries, checksums."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raycap.errors import ConfigurationError
from raycap.storage.failures import storage_error
from raycap.storage.options import S3Options, check_endpoint_url

if TYPE_CHECKING:
    from botocore.session import Session

DEFAULT_REGION = "us-east-1"
MAX_POOL_CONNECTIONS = 128
"""Connections that one client keeps open, so threads that can fetch at once without waiting for each other."""


_making_client = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Address:
    """What S3Options, environment and config files together say."""

    endpoint_url: str | None
    region: str
    path_style: bool


def s3_client(options: S3Options) -> Any:
    """The boto3 S3 client of this process for `options`, made once and shared by all threads.

    Raises ConfigurationError for settings that contradict each other, for instance an unknown profile.
    """
    # The process id, because connections do not survive a fork; the environment, because keys are read from it once.
    environment = hash(tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))
    with _making_client:  # else every thread of a pool that starts would make its own
        return _make_client(options, os.getpid(), environment)


@functools.lru_cache(maxsize=16)
def _make_client(options: S3Options, process_id: int, environment: int) -> Any:
    import boto3
    import botocore
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    session, address = _session_and_address(options)
    config = Config(
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=MAX_POOL_CONNECTIONS,
        # "legacy" on purpose. It repeats throttled requests, 5xx answers, resets and timeouts, with random waits that
        # grow by 2. "standard" and "adaptive" take every retry from one budget for all threads of the client (500
        # tokens; a reset costs 14): of 100 fetches in flight when a server hiccups, most would fail at once and become
        # failed rows. "adaptive" also slows the whole client for one throttled prefix.
        retries={"mode": "legacy", "total_max_attempts": options.max_attempts},
        s3={"addressing_style": "path" if address.path_style else "virtual"},
        signature_version=botocore.UNSIGNED if options.anonymous else None,
        **_checksum_settings(session, address),
    )
    try:
        client = boto3.session.Session(botocore_session=session).client(
            "s3", endpoint_url=address.endpoint_url, region_name=address.region, config=config
        )
    except BotoCoreError as error:
        raise storage_error(error, "cannot use S3") from error
    except ValueError as error:
        raise ConfigurationError(f"cannot use the S3 settings: {error}") from error
    client.meta.events.register_first("needs-retry.s3.HeadBucket", _stay)
    return client


def _stay(request_dict: dict[str, Any], response: tuple[Any, dict[str, Any]] | None, **_: Any) -> None:
    """Do not ask again where a bucket is if the answer was a redirect without a region, as a web server gives: boto3
    would ask, be redirected and ask until Python's stack is full."""
    if response and "x-amz-bucket-region" not in response[1].get("ResponseMetadata", {}).get("HTTPHeaders", {}):
        request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True


@functools.cache
def _data_loader() -> Any:
    """botocore's descriptions of S3, parsed once: with them, a further client takes 10 ms instead of 75."""
    from botocore.session import Session

    return Session().get_component("data_loader")


def _session_and_address(options: S3Options) -> tuple[Session, S3Address]:
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import ConfigParseError, ProfileNotFound
    from botocore.session import Session

    from raycap.storage.pages import PageParserFactory

    try:
        session = Session(profile=options.profile)
        session.register_component("data_loader", _data_loader())
        session.register_component("response_parser_factory", PageParserFactory())
        scoped_config = session.get_scoped_config()
        endpoint_url = options.endpoint_url
        if endpoint_url is None and not session.get_config_variable("ignore_configured_endpoint_urls"):
            endpoint_url = ConfiguredEndpointProvider(
                full_config=session.full_config, scoped_config=scoped_config, client_name="s3"
            ).provide()
            if endpoint_url:
                check_endpoint_url(endpoint_url)
    except ProfileNotFound as error:
        raise ConfigurationError(f"{error}; `aws configure list-profiles` shows those there are") from error
    except ConfigParseError as error:
        raise ConfigurationError(f"the AWS config file cannot be read: {error}") from error
    # boto3 does not read AWS_REGION, which every other AWS SDK does.
    region = options.region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or DEFAULT_REGION
    path_style = options.path_style if options.path_style is not None else bool(endpoint_url)
    return session, S3Address(endpoint_url=endpoint_url or None, region=region, path_style=path_style)


def resolved(options: S3Options) -> S3Options:
    """The options with endpoint, region and addressing filled in from the environment and the config files."""
    _, address = _session_and_address(options)
    return replace(options, endpoint_url=address.endpoint_url, region=address.region, path_style=address.path_style)


def _checksum_settings(session: Session, address: S3Address) -> dict[str, str]:
    """boto3 >= 1.36 adds checksums that some other servers refuse. Off for those, unless the user's own settings say
    something."""
    if address.endpoint_url is None:
        return {}
    settings = {}
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        told = f"AWS_{name.upper()}" in os.environ or name in session.get_scoped_config()
        if not told:
            settings[name] = "when_required"
    return settings


def arrow_filesystem(options: S3Options) -> Any:
    """pyarrow's view of the same server, for libraries that want one (Ray Train's storage). Its paths are BUCKET/KEY.

    Keys that stand in the environment or in files are handed over, since pyarrow knows no profiles; those of roles it
    asks for itself, as they expire.
    """
    from pyarrow.fs import S3FileSystem

    session, address = _session_and_address(options)
    settings: dict[str, Any] = {"region": address.region, "force_virtual_addressing": not address.path_style}
    if address.endpoint_url:
        scheme, _, host = address.endpoint_url.rstrip("/").partition("://")
        settings |= {"scheme": scheme, "endpoint_override": host}
    credentials = session.get_credentials()
    if options.anonymous:
        settings["anonymous"] = True
    elif credentials is not None and credentials.method in ("env", "shared-credentials-file", "config-file"):
        keys = credentials.get_frozen_credentials()
        settings |= {"access_key": keys.access_key, "secret_key": keys.secret_key, "session_token": keys.token}
    return S3FileSystem(**settings)
