"""Jobs and the endpoint on a cluster as `cluster/` makes them, whose nodes crash, come back and are cut off.

A head that runs drivers alone, a node with CPUs, and one that says it has a GPU; each in a network namespace where this
machine allows it. Everything is submitted by Ray's own commands.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import httpx2 as httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raycap import cli
from raycap.serve import haproxy
from raycap.serve.client import RETRIED
from raycap.serve.config import ServeConfig
from raycap.serve.front import environment
from tests.commands import HURRY, ROOT, free_port, wait_until
from tests.integration.test_train_faults_ray import STAGES, arguments
from tests.integration.test_train_ray import write_dataset
from tests.jobs import Job, Platform
from tests.network import virtual_network
from tests.ray_cluster import RayCluster
from tests.s3 import S3Server
from tests.serving import JPEG, picture
from tests.synthetic_s3 import synthetic_image

log = logging.getLogger(__name__)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

NUM_OBJECTS = 1500
"""Six chunks."""
NUM_BEAMS = 64
"""With the 3 of the bundle all are captioned before a crash after the first chunk comes."""
CUT_S = 15.0
STALL_S = 90
CAPTIONER, FETCHER, TRAINER = "MapWorker(MapBatches(_CaptionActor))", "Read", "RayTrainWorker"
PLACED = ("--gpus-per-actor", "1", "--device", "cpu", "--num-cpus-per-fetch", "1")
"""The GPU is said, not there. Beside an actor there is no room for a whole CPU on that node: it fetches nothing."""


@pytest.fixture(scope="module")
def platform(s3_server: S3Server, tiny_bundle: str) -> Iterator[Platform]:
    bucket, client = s3_server.make_bucket(), s3_server.client()
    with ThreadPoolExecutor(4) as threads:

        def put(number: int) -> None:
            client.put_object(Bucket=bucket, Key=f"images/{number:04d}.jpg", Body=synthetic_image(number))

        list(threads.map(put, range(NUM_OBJECTS)))
    for path in Path(tiny_bundle).iterdir():
        client.put_object(Bucket=bucket, Key=f"tiny/{path.name}", Body=path.read_bytes())
    env = s3_server.env() | environment(ServeConfig().max_body_mb) | {"PYTHONPATH": str(ROOT)} | HURRY
    if program := haproxy.program():
        env |= haproxy.environment(str(program)) | haproxy.own_environment()
    with ExitStack() as stack:
        network = stack.enter_context(virtual_network())
        log.warning("nodes are %s", "network namespaces" if network else "plain processes at 127.0.0.1")
        if network:
            port = stack.enter_context(network.relay(urlsplit(s3_server.endpoint_url).port or 0))
            env |= {"AWS_ENDPOINT_URL_S3": f"http://{network.host_address}:{port}"}
        cluster = stack.enter_context(RayCluster(head_cpus=0, env=env, network=network, with_dashboard=True))
        platform = Platform(s3_server, bucket, cluster)
        stack.callback(platform.end)
        yield platform


@pytest.fixture(autouse=True)
def _whole(platform: Platform) -> None:
    """All nodes are there, whatever the test before did."""
    platform.make_whole()


def caption(platform: Platform, name: str, output: str, *more: str) -> Job:
    """Submit a job that captions the images, and takes some seconds for them."""
    bucket = f"s3://{platform.bucket}"
    options = ("--model", f"{bucket}/tiny", "--beam-size", str(NUM_BEAMS), "--read-timeout-s", "3", *PLACED)
    return platform.job(name, "caption", f"{bucket}/images", f"{bucket}/{output}", *options, *more)


def wait_for_chunk(platform: Platform, job: Job, output: str) -> None:
    """Until the first one is committed; there are more."""
    job.wait_until(lambda: bool(platform.keys(f"{output}/_raycap/0000/chunks/")), "a chunk")


def rows_of(platform: Platform, output: str) -> pa.Table:
    """All rows of an output, once it was seen that there is one for each image."""
    parts = [BytesIO(platform.read(key)) for key in platform.keys(f"{output}/captions/")]
    rows = pa.concat_tables([pq.read_table(part) for part in parts])
    assert sorted(rows["key"].to_pylist()) == [f"{number:04d}.jpg" for number in range(NUM_OBJECTS)]
    assert set(rows["status"].to_pylist()) == {"ok"}
    return rows


def test_bulk_job_places_its_work_and_survives_a_crash(platform: Platform) -> None:
    job = caption(platform, "bulk", "bulk")
    wait_for_chunk(platform, job, "bulk")
    before = platform.gpu.node_id()
    assert job.nodes("actors", CAPTIONER) == {before}
    platform.gpu.crash()
    assert not job.has_ended()
    platform.gpu = platform.cluster.bring_back(platform.gpu)
    code, said = job.finish()
    assert code == 0, said
    rows_of(platform, "bulk")
    after = platform.gpu.node_id()
    assert job.nodes("actors", CAPTIONER) == {after} != {before}
    assert job.nodes("tasks", FETCHER) == {platform.cpu.node_id()}


def test_training_on_two_nodes_goes_on_when_one_comes_back(platform: Platform, tmp_path: Path) -> None:
    write_dataset(tmp_path)
    for path in (tmp_path / "captions.json", *(tmp_path / "images").iterdir()):
        platform.write(f"train/{path.relative_to(tmp_path)}", path.read_bytes())
    bucket, seen = f"s3://{platform.bucket}", set()
    job = platform.job(
        *("train", "train", *arguments(tmp_path, f"{bucket}/train", f"{bucket}/models/tiny", f"{bucket}/runs")[1:]),
        *(*STAGES, "--cache-dir", str(tmp_path / "cache")),
    )

    def num_checkpoints() -> int:
        seen.update(key.split("/")[2] for key in platform.keys("runs/tiny/checkpoint_"))
        return len(seen)

    job.wait_until(lambda: num_checkpoints() >= 2, "two checkpoints")
    for node in (platform.cpu, platform.gpu):
        job.process(node, TRAINER)
    platform.cpu.crash()
    platform.cpu = platform.cluster.bring_back(platform.cpu)
    code, said = job.finish()
    assert code == 0, said
    assert "a worker failed" in said
    assert "resuming" in said
    assert "wrote bundle" in said
    assert "models/tiny/model.safetensors" in platform.keys("models/tiny/")


@contextmanager
def asking(address: str) -> Iterator[list[int]]:
    """The statuses of answers to requests for captions, two at a time and one after another, until the block ends."""
    statuses: list[int] = []
    stop = Event()

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                statuses.append(client.post("/v1/caption", content=picture(), headers=JPEG).status_code)

    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask) for _ in range(2)]
        try:
            yield statuses
        finally:
            stop.set()
    for each in asked:
        each.result()


def test_endpoint_answers_on_with_one_of_two_nodes(platform: Platform, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "cluster" / "kuberay" / "serve" / "serve.yaml").read_text())
    config["applications"][0]["args"] = {
        "model": [f"s3://{platform.bucket}/tiny"], "num_replicas": 2, "num_ingress": 2,
        "gpus_per_replica": 0, "cpus_per_replica": 1,
    }  # fmt: skip
    port = free_port()
    config["http_options"] = {"host": "0.0.0.0", "port": port}
    config["proxy_location"] = "EveryNode" if platform.cpu.port else "HeadOnly"  # at one address, one has the port
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    applications = "/api/serve/applications/"

    def places() -> list[set[str]]:
        """For each deployment, the nodes of its replicas."""
        app = platform.ask(applications).json()["applications"].get("raycap", {})
        assert app.get("status") != "DEPLOY_FAILED", app
        running = (
            [each for each in deployment["replicas"] if each["state"] == "RUNNING"]
            for deployment in app.get("deployments", {}).values()
        )
        return [{each["node_id"] for each in replicas} for replicas in running]

    def on_both() -> bool:
        return places() == [{platform.cpu.node_id(), platform.gpu.node_id()}] * 2

    platform.run("serve", "deploy", str(tmp_path / "serve.yaml"), "--address", platform.cluster.dashboard)
    wait_until(on_both, "replicas on both nodes", every_s=0.5)
    with asking(f"http://{platform.head.address}:{port}") as statuses:
        wait_until(lambda: len(statuses) >= 20, "answers")
        assert set(statuses) == {200}
        platform.gpu.crash()
        crashed_at = len(statuses)
        wait_until(lambda: statuses[crashed_at:].count(200) >= 50, "answers of the other node")
        platform.gpu = platform.cluster.bring_back(platform.gpu)
        wait_until(on_both, "replicas on both nodes", every_s=0.5)
        back_at = len(statuses)
        wait_until(lambda: len(statuses) >= back_at + 50, "answers of both")
    log.warning("answers with statuses %s", Counter(statuses))
    assert set(statuses) <= {200, *RETRIED}
    assert set(statuses[back_at:]) == {200}
    platform.ask(applications, "DELETE").raise_for_status()
    wait_until(lambda: not platform.ask(applications).json()["applications"], "the end of the endpoint", every_s=0.5)


def test_node_that_is_cut_off_in_a_bulk_job(platform: Platform) -> None:
    job = caption(platform, "cut", "cut", "--max-stall-s", str(STALL_S))
    job.process(platform.cpu, FETCHER)
    platform.cpu.cut()
    time.sleep(CUT_S)
    assert not job.has_ended()
    platform.cpu.heal()

    def has_ended() -> bool:
        platform.make_whole()  # if Ray gave the node up
        return job.has_ended()

    wait_until(has_ended, "the end of the job", every_s=0.5)
    code, said = job.finish()
    if code:  # now and then Ray waits for a worker of that node without an end
        log.warning("Ray lost something: %s", said)
        assert f"nothing was captioned for {STALL_S} s" in said
        assert job.info()["driver_exit_code"] == cli.EXIT_OTHER
        code, said = caption(platform, "again", "cut").finish()
    assert code == 0, said
    rows_of(platform, "cut")


def test_job_ends_as_told_goes_on_and_says_no_secrets(platform: Platform) -> None:
    first = caption(platform, "first", "told")
    wait_for_chunk(platform, first, "told")
    os.kill(first.process(platform.gpu, CAPTIONER), signal.SIGSTOP)  # so that it does not end

    second = caption(platform, "second", "told")
    code, said = second.finish()
    assert code == 1
    assert "is being written by another run" in said
    assert second.info()["driver_exit_code"] == cli.EXIT_USAGE

    os.kill(first.driver(), signal.SIGTERM)
    code, said = first.finish()
    assert code == 1
    assert "raycap: terminated; what was written stays" in said
    assert first.info()["driver_exit_code"] == cli.EXIT_TERMINATED
    told = platform.run("ray", "job", "status", first.name, "--address", platform.cluster.dashboard)
    assert f"Job '{first.name}' failed" in told
    assert f"exit code {cli.EXIT_TERMINATED}" in told
    ended_at = datetime.now(UTC)

    code, said = caption(platform, "third", "told").finish()
    assert code == 0, said
    captioned_at = rows_of(platform, "told")["captioned_at"].to_pylist()
    assert min(captioned_at) < ended_at < max(captioned_at), "it went on"

    written = {path: path.read_bytes() for path in platform.cluster.logs().rglob("*") if path.is_file()}
    written |= {key: platform.read(key) for key in platform.keys("told/")}
    written |= {name: platform.ask(f"/api/jobs/{name}/logs").content for name in ("first", "second", "third")}
    assert "told/report.html" in written
    secrets = (platform.server.secret_key, platform.cluster.env["RAY_AUTH_TOKEN"])
    assert [name for name, content in written.items() for secret in secrets if secret.encode() in content] == []
