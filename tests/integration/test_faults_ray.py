"""`raycap caption` through a network and a server that fail: every object captioned, none wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from raycap import cli
from tests.commands import Command, starting_commands, wait_until
from tests.faulty_s3 import Faults, FaultyS3
from tests.integration.chaos import Expected, expected_of, faults_of
from tests.ray_cluster import RayCluster
from tests.s3 import S3Server
from tests.synthetic_s3 import synthetic_image

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

NUM_OBJECTS = 600
OUTAGE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Images:
    """A bucket of images, and a cluster to caption them with."""

    server: S3Server
    bucket: str
    cluster: RayCluster
    model: str

    def caption(self, start: Callable[..., Command], proxy: FaultyS3, output: Path | str, *options: str) -> Command:
        """Start `raycap caption` of them through a proxy."""
        arguments = ("caption", f"s3://{self.bucket}/images", str(output), "--model", self.model, "--no-report")
        env = self.server.env() | self.cluster.env | {"AWS_ENDPOINT_URL_S3": proxy.endpoint_url}
        return start(*arguments, "--ray-address", self.cluster.address, "--read-timeout-s", "3", *options, env=env)

    def lose_endpoint(self, start: Callable[..., Command], proxy: FaultyS3, output: Path, *options: str) -> Command:
        """Start it, and take the proxy away when it has asked for a quarter of them."""
        command = self.caption(start, proxy, output, *options)
        wait_until(lambda: self.num_gets(proxy) >= NUM_OBJECTS // 4, "a quarter of the images")
        proxy.down()
        return command

    def num_gets(self, proxy: FaultyS3) -> int:
        """Requests for images that came to the proxy."""
        return sum(proxy.gets(f"/{self.bucket}/images/"))

    def download(self, prefix: str, folder: Path) -> Path:
        """The objects below a prefix, as files of a folder."""
        client = self.server.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{prefix}/"):
            for each in page["Contents"]:
                path = folder / each["Key"].removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(client.get_object(Bucket=self.bucket, Key=each["Key"])["Body"].read())
        return folder


@pytest.fixture(scope="module")
def images(s3_server: S3Server, tiny_bundle: str) -> Iterator[Images]:
    bucket, client = s3_server.make_bucket(), s3_server.client()
    for number in range(NUM_OBJECTS):
        client.put_object(Bucket=bucket, Key=f"images/{number:04d}.jpg", Body=synthetic_image(number))
    with RayCluster(head_cpus=2, env=s3_server.env()) as cluster:
        yield Images(server=s3_server, bucket=bucket, cluster=cluster, model=tiny_bundle)


@pytest.fixture(scope="module")
def expected(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What a run without faults gives; it asks for each image once."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    with FaultyS3(images.server.endpoint_url, faults=Faults()) as proxy, starting_commands() as starter:
        code, _, err = images.caption(starter, proxy, output).finish()
        assert code == cli.EXIT_OK, err
        assert images.num_gets(proxy) == NUM_OBJECTS
    expected = expected_of(output)
    assert set(expected.rows["status"].to_pylist()) == {"ok"}
    return expected


def test_faulty_network_costs_no_row_and_changes_none(
    images: Images, expected: Expected, tmp_path: Path, start: Callable[..., Command]
) -> None:
    faults, started = Faults(slow_down=0.05, reset=0.02, truncate=0.02, stall=0.01), datetime.now(UTC)
    kinds = frozenset({"get", "put"})
    with FaultyS3(images.server.endpoint_url, faults=faults, kinds=kinds) as proxy:
        code, _, err = images.caption(start, proxy, f"s3://{images.bucket}/out").finish()
    assert code == cli.EXIT_OK, err
    assert faults_of(images.download("out", tmp_path), expected, started) == []
    assert min(proxy.injected[fault] for fault in ("slow_down", "reset", "truncate", "stall")) >= 3
    assert images.num_gets(proxy) < 1.3 * NUM_OBJECTS


def test_endpoint_down_for_a_while_is_survived(
    images: Images, expected: Expected, tmp_path: Path, start: Callable[..., Command]
) -> None:
    output, started = tmp_path / "out", datetime.now(UTC)
    with FaultyS3(images.server.endpoint_url, faults=Faults()) as proxy:
        command = images.lose_endpoint(start, proxy, output)
        time.sleep(OUTAGE_S)
        assert not command.has_ended()
        proxy.up()
        code, _, err = command.finish()
    assert code == cli.EXIT_OK, err
    assert faults_of(output, expected, started) == []


def test_endpoint_down_for_good_is_one_message_and_the_run_goes_on_later(
    images: Images, expected: Expected, tmp_path: Path, start: Callable[..., Command]
) -> None:
    output, started = tmp_path / "out", datetime.now(UTC)
    with FaultyS3(images.server.endpoint_url, faults=Faults()) as proxy:
        command = images.lose_endpoint(start, proxy, output, "--max-outage-s", "5")
        code, out, err = command.finish()
        assert code == cli.EXIT_USAGE
        assert out == ""
        assert "Traceback" not in err, err
        errors = [line for line in err.splitlines() if line.startswith("raycap: error: ")]
        assert errors == err.splitlines()[-1:]
        assert f"{proxy.endpoint_url} refuses the connection" in errors[0]
        proxy.up()
        code, _, err = images.caption(start, proxy, output, "--max-outage-s", "5").finish()
    assert code == cli.EXIT_OK, err
    assert faults_of(output, expected, started) == []


def test_run_in_which_nothing_happens_ends_and_goes_on_later(
    images: Images, expected: Expected, tmp_path: Path, start: Callable[..., Command]
) -> None:
    output, started = tmp_path / "out", datetime.now(UTC)
    with FaultyS3(images.server.endpoint_url, faults=Faults()) as proxy:
        command = images.lose_endpoint(start, proxy, output, "--max-stall-s", "40")
        code, _, err = command.finish()
        assert code == cli.EXIT_OTHER
        assert "Traceback" not in err, err
        assert err.splitlines()[-1].startswith("raycap: error: nothing was captioned for 40 s, so this run ends")
        proxy.up()
        code, _, err = images.caption(start, proxy, output).finish()
    assert code == cli.EXIT_OK, err
    assert faults_of(output, expected, started) == []
