"""The endpoint under load while its replicas are killed, and while another bundle takes the place of its own."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2 as httpx
import pytest
import ray
from ray import serve as ray_serve

from raycap.images import Preprocessing
from raycap.model.bundle import Bundle
from raycap.model.captioner import Captioner
from raycap.serve.config import ServeConfig
from raycap.serve.on_ray import APP, build_app, start_proxies
from tests.bundles import SIZE_PX, random_bundle
from tests.commands import Command, free_port, process_title, wait_until
from tests.integration.test_serve_ray import start_endpoint
from tests.serving import JPEG, SAMPLES

CHAOS_S = float(os.environ.get("RAYCAP_CHAOS_S", "20"))
"""How long replicas are killed."""
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600 + 2 * CHAOS_S),
    pytest.mark.skipif("RAYCAP_CHAOS_S" not in os.environ, reason="wants an idle machine: RAYCAP_CHAOS_S=20"),
]

NUM_SENDERS = 6
DEADLINE_S = 60.0
PHOTOS = [path.read_bytes() for path in sorted(SAMPLES.glob("*.jpg"))]


@dataclass
class Answers:
    """What came back so far."""

    captions: Counter[tuple[int, str]] = field(default_factory=Counter)
    """By number of the photo and text."""
    failures: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def wait_for(self, num_captions: int) -> None:
        """Return when so many more have come."""
        enough = self.captions.total() + num_captions
        wait_until(lambda: self.captions.total() >= enough, f"{num_captions} captions")


@contextmanager
def load(address: str) -> Iterator[Answers]:
    """Senders that ask for captions until the block ends."""
    answers, ends = Answers(), threading.Event()

    def send(number: int) -> None:
        with httpx.Client(base_url=address, headers=JPEG, timeout=2 * DEADLINE_S) as client:
            while not ends.is_set():
                number = (number + 1) % len(PHOTOS)
                start_s = time.perf_counter()
                try:
                    answer = client.post("/v1/caption", content=PHOTOS[number])
                except httpx.TransportError as error:
                    answers.failures[type(error).__name__] += 1
                    continue
                finally:
                    answers.slowest_s = max(answers.slowest_s, time.perf_counter() - start_s)
                if answer.status_code == 200:
                    answers.captions[number, answer.json()["results"][0]["caption"]] += 1
                else:
                    answers.failures[f"{answer.status_code} {answer.text[:200]}"] += 1

    with ThreadPoolExecutor(NUM_SENDERS) as threads:
        senders = [threads.submit(send, number) for number in range(NUM_SENDERS)]
        try:
            yield answers
        finally:
            ends.set()
    for sender in senders:
        sender.result()


def captions_of(bundle: Bundle) -> set[tuple[int, str]]:
    """Number of each photo and what the bundle says of it."""
    captioner = Captioner(bundle, device="cpu")
    found = captioner.caption([captioner.prepare(photo) for photo in PHOTOS])
    return {(number, caption.text) for number, caption in enumerate(found)}


def replicas(command: Command, deployment: str) -> list[int]:
    """Process ids of what serves."""
    title = f"ray::ServeReplica:raycap:{deployment}"
    return [pid for pid in command.others() if process_title(pid).startswith(title)]


def ingresses(address: str) -> set[str]:
    """Names of those whose numbers /metrics has."""
    return set(re.findall(r'ingress="(\w+)"', httpx.get(f"{address}/metrics", timeout=DEADLINE_S).text))


def kill(pid: int) -> None:
    """As the kernel does; return when it has ended."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not process_title(pid), "the end of what was killed")


@pytest.mark.parametrize("deployment", ["model-default", "Ingress"])
def test_replicas_that_die_cost_retries_and_nothing_else(
    start: Callable[..., Command], tiny_bundle: str, deployment: str
) -> None:
    settings = ("--num-replicas", "2", "--num-ingress", "2", "--cpus-per-replica", "1", "--batch-size", "4")
    command, address = start_endpoint(start, "--model", tiny_bundle, "--deadline-s", str(DEADLINE_S), *settings)
    dice, num_killed = random.Random(0), 0
    end_s = time.monotonic() + CHAOS_S
    with load(address) as answers:
        while time.monotonic() < end_s:
            answers.wait_for(dice.randint(1, 60))
            wait_until(lambda: bool(replicas(command, deployment)), "a replica to kill")
            kill(dice.choice(replicas(command, deployment)))
            num_killed += 1
        wait_until(lambda: len(replicas(command, deployment)) == 2, "what takes the place of what was killed")
        answers.wait_for(20)
        wait_until(lambda: len(ingresses(address)) == 2, "the numbers of both ingresses")
    assert num_killed >= 2
    assert set(answers.captions) <= captions_of(Bundle.load(tiny_bundle))
    assert answers.slowest_s <= DEADLINE_S + 10
    unexpected = {each: count for each, count in answers.failures.items() if not is_retryable(each)}
    assert not unexpected


def is_retryable(failure: str) -> bool:
    """Whether a client may ask again: 503, or a connection that was lost."""
    return failure.startswith("503 ") or failure in ("ReadError", "RemoteProtocolError", "ConnectError")


def test_replicas_come_with_the_load(start: Callable[..., Command], tiny_bundle: str) -> None:
    """Ray looks at the last 30 s, and waits as long before it starts one."""
    settings = ("--max-replicas", "2", "--cpus-per-replica", "1", "--batch-size", "1")
    command, address = start_endpoint(start, "--model", tiny_bundle, "--deadline-s", str(DEADLINE_S), *settings)
    assert len(replicas(command, "model-default")) == 1
    with load(address) as answers:
        wait_until(lambda: len(replicas(command, "model-default")) == 2, "a second replica", every_s=1)
        answers.wait_for(20)
    assert not answers.failures


@pytest.fixture
def roomy_ray() -> Iterator[None]:
    """Ray on this machine with room for the replicas that an upgrade has for a while."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(("num_processes", "size_px"), [(1, SIZE_PX), (2, 96)])
def test_a_bundle_takes_the_place_of_another_without_a_failed_request(
    roomy_ray: None, tiny_bundle: str, tmp_path: Path, num_processes: int, size_px: int
) -> None:
    other = str(tmp_path / "other")
    replace(random_bundle(seed=1), preprocessing=Preprocessing(size_px=size_px)).save(other)
    old, new = captions_of(Bundle.load(tiny_bundle)), captions_of(Bundle.load(other))
    assert old != new
    settings = {"num_replicas": num_processes, "num_ingress": num_processes, "cpus_per_replica": 1, "batch_size": 4}
    config = ServeConfig(port=free_port(), deadline_s=DEADLINE_S)

    def deploy(location: str) -> None:
        app = build_app({**settings, "model": [location], "device": "cpu", "deadline_s": DEADLINE_S})
        ray_serve.run(app, name=APP, route_prefix="/")

    start_proxies(config)
    try:
        deploy(tiny_bundle)
        with load(f"http://127.0.0.1:{config.port}") as answers:
            answers.wait_for(20)
            assert set(answers.captions) <= old
            deploy(other)
            answers.wait_for(20)
            wait_until(lambda: bool(set(answers.captions) - old), "captions of the new bundle")
        assert answers.failures == {}
        assert set(answers.captions) <= old | new
    finally:
        ray_serve.shutdown()
