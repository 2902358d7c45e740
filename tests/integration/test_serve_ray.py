"""The endpoint on real Ray Serve: `raycap serve`, asked over HTTP."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from ray import serve as ray_serve

from raycap import cli
from raycap.errors import ConfigurationError
from raycap.model.bundle import shipped_bundle
from raycap.model.captioner import Caption, Captioner
from raycap.serve.client import AnswerError, AsyncClient, Client
from raycap.serve.config import ServeConfig
from raycap.serve.on_ray import APP, build_app, start_proxies
from raycap.serve.schemas import Captioned, Options
from tests.commands import Command, check_one_line, free_port, process_title, starting_commands, wait_until
from tests.serving import JPEG, SAMPLES, picture, problem

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

KEY = "secret-of-ana"
BATCH_SIZE, MAX_QUEUE = 4, 24
PHOTOS = sorted(SAMPLES.glob("*.jpg"))


def start_endpoint(start: Callable[..., Command], *options: str) -> tuple[Command, str]:
    """Start `raycap serve`; give it, when it answers, and its address."""
    port = free_port()
    command = start("serve", "--port", str(port), *options)
    address = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            return httpx.get(f"{address}/v2/health/ready", timeout=30).is_success
        except httpx.TransportError:
            return False

    wait_until(lambda: is_ready() or command.has_ended(), "the endpoint", every_s=0.2)
    assert not command.has_ended(), command.finish()
    return command, address


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: str) -> Iterator[str]:
    """The address of an endpoint with the shipped model, a tiny one, and a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"ana {KEY}\n")
    with starting_commands() as start:
        _, address = start_endpoint(
            start,
            *("--model", f"shipped={shipped_bundle()}", f"tiny={tiny_bundle}"),
            *("--keys-file", str(keys), "--max-queue", str(MAX_QUEUE), "--batch-size", str(BATCH_SIZE)),
            *("--max-images", str(MAX_QUEUE), "--max-body-mb", "2", "--cpus-per-replica", "1", "--deadline-s", "300"),
        )
        yield address


@pytest.fixture
def client(endpoint: str) -> Iterator[Client]:
    with Client(endpoint, api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def wanted() -> list[Caption]:
    """What a captioner says of the sample photos."""
    captioner = Captioner.load(device="cpu")
    return captioner.caption([captioner.prepare(path.read_bytes()) for path in PHOTOS])


def test_says_what_a_captioner_says(client: Client, wanted: list[Caption]) -> None:
    answer = client.caption(PHOTOS, Options(attention=True))
    assert answer.model == "shipped"
    for result, caption in zip(answer.results, wanted, strict=True):
        assert isinstance(result, Captioned)
        assert result.caption == caption.text
        assert [each.caption for each in result.alternatives] == [each.text for each in caption.alternatives]
        assert result.log_prob == pytest.approx(caption.log_prob, abs=1e-3)
        assert result.attention is not None
        assert result.attention.words == caption.text.split()


def test_says_the_same_when_asked_by_many_and_batches_them(endpoint: str, wanted: list[Caption]) -> None:
    async def main() -> list[str]:
        async with AsyncClient(endpoint, api_key=KEY) as client:
            answers = await asyncio.gather(*(client.caption(path) for path in PHOTOS))
        return [answer.results[0].caption for answer in answers if isinstance(answer.results[0], Captioned)]

    before = batches(endpoint)
    assert asyncio.run(main()) == [caption.text for caption in wanted]
    num_images, sum_of_sizes = (after - earlier for after, earlier in zip(batches(endpoint), before, strict=True))
    assert num_images == len(PHOTOS)
    assert num_images < sum_of_sizes <= BATCH_SIZE * num_images


def test_says_of_200_images_what_the_bulk_job_says(
    start: Callable[..., Command], client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    photos = [Image.open(path) for path in PHOTOS]
    for number in range(200):  # parts of the sample photos, of many sizes and shapes
        photo, dice = photos[number % len(photos)], random.Random(number)
        left, top = (dice.uniform(0, 0.5) for _ in range(2))
        right, bottom = (dice.uniform(0.6, 1) for _ in range(2))
        box = (left * photo.width, top * photo.height, right * photo.width, bottom * photo.height)
        photo.crop(box).save(folder / f"{number:03d}.jpg")
    code, _, err = start("caption", str(folder), str(tmp_path / "out"), "--no-report").finish()
    assert code == cli.EXIT_OK, err
    rows = sorted(pq.read_table(tmp_path / "out" / "captions").to_pylist(), key=lambda row: row["key"])
    files = sorted(folder.iterdir())
    answers = [client.caption(files[first : first + 20]) for first in range(0, len(files), 20)]
    results = [result for answer in answers for result in answer.results]
    assert [result.caption for result in results if isinstance(result, Captioned)] == [row["caption"] for row in rows]
    assert len({row["caption"] for row in rows}) > 50


def batches(endpoint: str) -> tuple[float, float]:
    """Images captioned, and the sum over them of their batches' sizes."""
    count, total = (metric(endpoint, f"raycap_batch_size_{name}", model="shipped") for name in ("count", "sum"))
    return count, total


def metric(endpoint: str, name: str, **labels: str) -> float:
    """The sum of all series of this name that have these labels."""
    answer = httpx.get(f"{endpoint}/metrics", headers={"X-API-Key": KEY}, timeout=60)
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())


def test_models_are_chosen_by_name(client: Client, tiny_bundle: str) -> None:
    captioner = Captioner.load(tiny_bundle, device="cpu")
    (caption,) = captioner.caption([captioner.prepare(PHOTOS[0].read_bytes())])
    answer = client.caption(PHOTOS[0], Options(model="tiny"))
    assert (answer.model, answer.model_id) == ("tiny", captioner.model_id)
    assert [each.caption for each in answer.results if isinstance(each, Captioned)] == [caption.text]
    with pytest.raises(AnswerError) as error:
        client.caption(PHOTOS[0], Options(model="none"))
    assert (error.value.status, error.value.code) == (404, "unknown_model")


def test_refuses_what_it_must(endpoint: str, client: Client) -> None:
    with pytest.raises(AnswerError) as error, Client(endpoint, api_key="wrong") as stranger:
        stranger.caption(PHOTOS[0])
    assert error.value.status == 401
    with pytest.raises(AnswerError) as error:
        client.caption(bytes(3_000_000))
    assert (error.value.status, error.value.code) == (413, "body_too_large")
    with pytest.raises(AnswerError) as error:
        client.caption(b"no picture")
    assert (error.value.status, error.value.code) == (415, "not_an_image")
    answer = httpx.post(f"{endpoint}/v1/caption", headers={"X-Request-ID": "abc-1"}, timeout=60)
    assert answer.headers.get_list("x-request-id") == ["abc-1"]
    assert answer.json()["request_id"] == "abc-1"


def test_what_rays_proxy_says_itself_is_the_endpoints_too(endpoint: str) -> None:
    assert problem(httpx.get(f"{endpoint}/-/routes", timeout=60), 404)["code"] == "not_found"
    assert httpx.get(f"{endpoint}/-/healthz", timeout=60).text == "success"
    for unfit in (b"\xff", b'a"b'):
        answer = httpx.get(f"{endpoint}/healthz/none", headers={b"X-Request-ID": unfit}, timeout=60)
        assert len(problem(answer, 401)["request_id"]) == 32


@pytest.mark.parametrize(("key", "status"), [(KEY, 413), ("wrong", 401)])
def test_who_still_sends_is_answered_too(endpoint: str, key: str, status: int) -> None:
    headers = JPEG | {"X-API-Key": key}
    for _ in range(5):
        endless = (bytes(65_536) for _ in range(1000))
        problem(httpx.post(f"{endpoint}/v1/caption", content=endless, headers=headers, timeout=60), status)


def test_a_client_that_goes_frees_its_place(endpoint: str, client: Client) -> None:
    async def main() -> None:
        images = [("image", PHOTOS[0].read_bytes()) for _ in range(MAX_QUEUE)]
        async with httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=300) as asking:
            request = asyncio.create_task(asking.post("/v1/caption?beam_size=16", files=images))
            while not await asyncio.to_thread(metric, endpoint, "raycap_queue"):
                assert not request.done()
            request.cancel()

    headers = {"X-API-Key": KEY, "X-Request-Disconnect-Disabled": "?1"}  # which Ray would follow
    before = metric(endpoint, "raycap_requests_total", status="499")
    asyncio.run(main())
    wait_until(lambda: metric(endpoint, "raycap_requests_total", status="499") == before + 1, "the end of the request")
    assert metric(endpoint, "raycap_queue") == 0
    assert client.caption(PHOTOS[0]).results[0].status == "ok"


def test_beyond_its_queue_refuses_at_once_and_answers_again_afterwards(endpoint: str, client: Client) -> None:
    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=endpoint, headers=JPEG | {"X-API-Key": KEY}, timeout=300) as asking:
            photo = PHOTOS[0].read_bytes()
            return await asyncio.gather(
                *(asking.post("/v1/caption", content=photo, params={"beam_size": 16}) for _ in range(4 * MAX_QUEUE))
            )

    answers = asyncio.run(main())
    accepted = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(accepted) + len(refused) == len(answers)
    assert len(accepted) >= MAX_QUEUE
    assert refused
    assert {answer.json()["code"] for answer in refused} == {"overloaded"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    slowest_refusal = max(answer.elapsed for answer in refused)
    assert slowest_refusal < max(answer.elapsed for answer in accepted)
    assert client.caption(PHOTOS[0]).results[0].status == "ok"


def test_triton_clients_work_unchanged(endpoint: str, wanted: list[Caption]) -> None:
    triton = pytest.importorskip("tritonclient.http")
    headers = {"X-API-Key": KEY}
    photos = np.array([[path.read_bytes()] for path in PHOTOS[:3]], dtype=object)
    with closing(triton.InferenceServerClient(endpoint.removeprefix("http://"), network_timeout=300)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("shipped", "1", headers=headers)
        assert client.get_server_metadata(headers=headers)["name"] == "raycap"
        metadata = client.get_model_metadata("shipped", headers=headers)
        assert [tensor["name"] for tensor in metadata["outputs"]] == ["caption", "log_prob"]
        image = triton.InferInput("image", list(photos.shape), "BYTES")
        image.set_data_from_numpy(photos)
        found = client.infer("shipped", [image], headers=headers, request_id="7")
        assert [[text.decode()] for text in found.as_numpy("caption").flat] == [[each.text] for each in wanted[:3]]
        assert found.as_numpy("caption").shape == photos.shape
        np.testing.assert_allclose(
            found.as_numpy("log_prob").flat, [each.log_prob for each in wanted[:3]], rtol=0, atol=1e-3
        )
        assert found.get_response()["id"] == "7"
        outputs = [triton.InferRequestedOutput("caption", binary_data=False)]
        found = client.infer("shipped", [image], "1", outputs=outputs, headers=headers, parameters={"beam_size": 1})
        assert len(found.as_numpy("caption")) == 3
        image.set_data_from_numpy(np.array([[b"no picture"]] * 3, dtype=object))
        with pytest.raises(triton.InferenceServerException, match="expected JPEG"):
            client.infer("shipped", [image], headers=headers)


def test_sigterm_answers_what_came_in_and_ends_all(start: Callable[..., Command]) -> None:
    num_requests, num_images = 8, 16  # work enough to see what happens meanwhile
    settings = ("--batch-size", "1", "--cpus-per-replica", "1", "--deadline-s", "300", "--drain-s", "1")
    command, address = start_endpoint(start, *settings)
    images = [("image", picture(number)) for number in range(num_images)]

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{address}/v1/caption?beam_size=16", files=images, timeout=300)

    def num_come() -> float:
        answered = metric(address, "raycap_requests_total", route="/v1/caption", status="200")
        return answered + metric(address, "raycap_queue") / num_images

    late: list[tuple[int, str]] = []

    def has_gone() -> bool:
        try:
            answer = httpx.post(f"{address}/v1/caption", content=picture(), headers=JPEG, timeout=300)
        except httpx.TransportError:
            return True
        late.append((answer.status_code, answer.json().get("code", "")))
        return False

    with ThreadPoolExecutor(num_requests) as threads:
        pending = [threads.submit(ask, number) for number in range(num_requests)]
        wait_until(lambda: num_come() == num_requests, "all requests", every_s=0.1)
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{address}/v2/health/ready", timeout=60).status_code == 503, "its word")
        wait_until(has_gone, "its end", every_s=0.1)
        answers = [each.result() for each in pending]
    assert (503, "draining") in late
    assert set(late) <= {(200, ""), (503, "overloaded"), (503, "draining"), (503, "unavailable")}
    assert {answer.status_code for answer in answers} == {200}
    assert all(len(answer.json()["results"]) == num_images for answer in answers)
    code, _, err = command.finish()
    assert code == cli.EXIT_OK, err
    wait_until(lambda: not command.others(), "the end of all processes")


def test_a_signal_ends_it_while_it_starts(start: Callable[..., Command]) -> None:
    command = start("serve", "--port", str(free_port()))
    wait_until(lambda: any("ServeReplica" in process_title(pid) for pid in command.others()), "replicas")
    command.process.send_signal(signal.SIGTERM)
    code, _, err = command.finish()
    assert code == cli.EXIT_OK, err
    assert "answering at" not in err
    wait_until(lambda: not command.others(), "the end of all processes")


def test_what_cannot_be_is_told_in_a_line(start: Callable[..., Command], tmp_path: Path, tiny_bundle: str) -> None:
    code, _, err = start("serve", "--model", str(tmp_path)).finish()
    assert code == cli.EXIT_USAGE
    check_one_line(err, "not a model bundle")
    for options, message in (
        (("--keys-file", str(tmp_path / "none")), "--keys-file: cannot read"),
        (("--allow-urls", "https://example.org/"), "--allow-urls: expected names of hosts"),
    ):
        code, _, err = start("serve", "--model", tiny_bundle, *options).finish()
        assert code == cli.EXIT_USAGE
        check_one_line(err, message)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, err = start("serve", "--model", tiny_bundle, "--port", port).finish()
    assert code == cli.EXIT_USAGE
    check_one_line(err, f"--port {port}: another program listens there")


def test_config_files_of_serve_give_the_same_settings(local_ray: None, tiny_bundle: str) -> None:
    app = build_app({"model": [f"tiny={tiny_bundle}"], "num_replicas": 1, "s3": {"region": "eu-west-1"}})
    assert app is not None
    with pytest.raises(ConfigurationError, match="num_replica is no setting"):
        build_app({"num_replica": 2})
    with pytest.raises(ConfigurationError, match="batch_size"):
        build_app({"batch_size": "many"})
    with pytest.raises(ConfigurationError, match="--batch-size must be at least 1"):
        build_app({"batch_size": 0})
    with pytest.raises(ConfigurationError, match="max_body_mb is 21, but Ray's proxies let 20 MB through"):
        build_app({"max_body_mb": 21})


def test_an_endpoint_whose_driver_was_killed_ends_by_itself(local_ray: None, tiny_bundle: str) -> None:
    config = ServeConfig(port=free_port(), deadline_s=1)
    start_proxies(config)
    try:
        for other in (replace(config, port=1), replace(config, deadline_s=2)):
            with pytest.raises(ConfigurationError, match=r"listens at 127.0.0.1:.* a --deadline-s of at most 1, or"):
                start_proxies(other)
        app = build_app({"model": [tiny_bundle], "deadline_s": 1, "cpus_per_replica": 1, "device": "cpu"})
        ingress = ray_serve.run(app, name=APP, route_prefix="/")
        assert ingress.broadcast("close", 0.0).results() == [None]
        wait_until(lambda: APP not in ray_serve.status().applications, "the end of the application")
        answer = httpx.get(f"http://127.0.0.1:{config.port}/v2/health/ready", timeout=60)
        assert problem(answer, 503)["code"] in ("draining", "unavailable")
    finally:
        ray_serve.shutdown()
