"""The client: what it sends is understood, what it gets is typed, and it waits as it is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from raycap.errors import ConfigurationError
from raycap.serve.api import create_app
from raycap.serve.client import LONGEST_WAIT_S, AnswerError, AsyncClient, Client
from raycap.serve.config import ServeConfig
from raycap.serve.model import ServedModel
from raycap.serve.problems import PROBLEM_JSON
from raycap.serve.schemas import Captioned, CaptionResponse, Failed, Options, Timings
from tests.serving import SAMPLES, picture, small_captioner

ROOT = Path(__file__).parents[1]
ANSWER = CaptionResponse(
    model="default",
    model_id="small",
    results=[Captioned(caption="a dog", log_prob=-1.0, probability=0.37, alternatives=[])],
    timings_ms=Timings(read=0, decode=0, queue=0, model=0, total=0),
)
Ask = Callable[[Callable[[httpx.Request], httpx.Response]], tuple[CaptionResponse, list[float]]]


def answered() -> httpx.Response:
    return httpx.Response(200, content=ANSWER.model_dump_json())


def refused(status: int, **headers: str) -> httpx.Response:
    body = {"title": "", "status": status, "code": "busy", "detail": "later"}
    return httpx.Response(status, json=body, headers={"Content-Type": PROBLEM_JSON, **headers})


def ask_blocking(answer: Callable[[httpx.Request], httpx.Response]) -> tuple[CaptionResponse, list[float]]:
    waits: list[float] = []
    with Client(transport=httpx.MockTransport(answer), sleep=waits.append) as client:
        return client.caption(b"x"), waits


def ask_async(answer: Callable[[httpx.Request], httpx.Response]) -> tuple[CaptionResponse, list[float]]:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def main() -> CaptionResponse:
        async with AsyncClient(transport=httpx.MockTransport(answer), sleep=sleep) as client:
            return await client.caption(b"x")

    return asyncio.run(main()), waits


both = pytest.mark.parametrize("ask", [ask_blocking, ask_async])


def scripted(*answers: httpx.Response | Exception) -> Callable[[httpx.Request], httpx.Response]:
    """Each in turn, made anew: a response is of one client."""
    rest: Iterator[httpx.Response | Exception] = iter(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        each = next(rest)
        if isinstance(each, Exception):
            raise each
        return httpx.Response(each.status_code, content=each.content, headers=each.headers)

    return answer


def test_is_understood_by_the_endpoint() -> None:
    async def main() -> None:
        model = ServedModel(small_captioner(), batch_size=4)
        app = create_app(ServeConfig(), {"default": model})
        async with AsyncClient(transport=httpx.ASGITransport(app)) as client:
            one = await client.caption(SAMPLES / "dog.jpg")
            (found,) = one.results
            assert isinstance(found, Captioned)
            options = Options(beam_size=2, attention=True)
            several = await client.caption([str(SAMPLES / "dog.jpg"), picture(), b"none"], options)
            dog, other, none = several.results
            assert isinstance(dog, Captioned)
            assert isinstance(other, Captioned)
            assert isinstance(none, Failed)
            assert (len(dog.alternatives), none.code) == (1, "not_an_image")
            assert dog.attention is not None
            drawn = Options(temperature=0.5, seed=3)
            assert (await client.caption(picture(), drawn)).results == (await client.caption(picture(), drawn)).results
            with pytest.raises(AnswerError, match=r"not_an_image \(HTTP status 415, request \w{32}\)") as error:
                await client.caption(b"none")
            assert (error.value.status, error.value.code) == (415, "not_an_image")
        await model.close()

    asyncio.run(main())


@both
def test_asks_again_as_long_after_as_it_is_told(ask: Ask) -> None:
    answers = refused(503, **{"Retry-After": "7"}), refused(429, **{"Retry-After": "2"}), refused(503), answered()
    found, waits = ask(scripted(*answers))
    assert found == ANSWER
    assert 7 < waits[0] <= 7.5, "and a little more: those that were refused together come back apart"
    assert 2 < waits[1] <= 3
    assert 0 < waits[2] <= 2


@both
@pytest.mark.parametrize(
    "retry_after", ["Tue, 15 Nov 1994 08:12:31 GMT", "Tue, 15 Nov 1994 08:12:31 -0000", "soon", "²"]
)
def test_what_is_no_time_to_come_is_not_waited_for(ask: Ask, retry_after: str) -> None:
    refusal = httpx.Response(503, headers=[(b"Retry-After", retry_after.encode())])
    _, (wait_s,) = ask(scripted(refusal, answered()))
    assert 0 < wait_s <= 0.5


@both
def test_waits_until_a_date(ask: Ask) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=LONGEST_WAIT_S - 1), usegmt=True)
    _, (wait_s,) = ask(scripted(refused(503, **{"Retry-After": date}), answered()))
    assert 1 < wait_s <= LONGEST_WAIT_S
    later = format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True)
    with pytest.raises(AnswerError, match="busy"):
        ask(scripted(refused(503, **{"Retry-After": later})))


@both
def test_a_repetition_has_the_same_id(ask: Ask) -> None:
    ids = []

    def answer(request: httpx.Request) -> httpx.Response:
        ids.append(request.headers["x-request-id"])
        return next(answers)

    answers = iter([refused(503), refused(401), answered()])
    with pytest.raises(AnswerError) as error:
        ask(answer)
    assert ids == [error.value.request_id] * 2
    ask(answer)
    assert ids[2] != ids[0]


@both
def test_asks_again_after_a_lost_connection(ask: Ask) -> None:
    lost = httpx.RemoteProtocolError("server disconnected"), httpx.ConnectError("refused"), httpx.ConnectTimeout("late")
    found, waits = ask(scripted(*lost, answered()))
    assert found == ANSWER
    assert len(waits) == 3


@both
@pytest.mark.parametrize(
    ("answers", "status", "code"),
    [
        ([refused(503)] * 9, 503, "busy"),
        ([refused(503, **{"Retry-After": str(int(LONGEST_WAIT_S) + 1)})], 503, "busy"),
        ([refused(401)], 401, "busy"),
        ([httpx.Response(500, text="<html>")], 500, "no_answer"),
        ([httpx.Response(502, text="<html>")] * 9, 502, "no_answer"),
        ([httpx.Response(200, text="<html>")], 200, "no_answer"),
        ([httpx.ReadTimeout("late")], 0, "no_connection"),
        ([httpx.LocalProtocolError("a key of two lines")], 0, "no_connection"),
        ([httpx.ConnectError("refused")] * 9, 0, "no_connection"),
    ],
)
def test_gives_up_where_it_must(ask: Ask, answers: list[httpx.Response | Exception], status: int, code: str) -> None:
    with pytest.raises(AnswerError) as error:
        ask(scripted(*answers))
    assert (error.value.status, error.value.code) == (status, code)


def test_sends_its_key() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer secret"
        assert request.url == "https://example.org/v1/caption"
        return answered()

    with Client("https://example.org", api_key="secret", transport=httpx.MockTransport(answer)) as client:
        assert client.caption([b"x", b"y"]) == ANSWER


def test_addresses_of_images_are_sent_as_such() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content) == {
            "images": [{"url": "https://example.org/dog.jpg"}, {"data": "eA=="}],
            "options": {"beam_size": 2},
        }
        return answered()

    with Client(transport=httpx.MockTransport(answer)) as client:
        assert client.caption(["https://example.org/dog.jpg", b"x"], Options(beam_size=2)) == ANSWER


@pytest.mark.parametrize("address", ["localhost:8000", "example.org", "ftp://example.org", ""])
def test_what_is_no_address_is_told_at_once(address: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigurationError, match="expected an address such as http://"):
            kind(address)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("dog.jpg", "cat.jpg"), TypeError, "several images are one list"),
        (("dog.jpg", {"beam_size": 3}), TypeError, "expected raycap.Options, got dict"),
        ((BytesIO(b"x"),), TypeError, "got BytesIO"),
        (([],), ValueError, "one or more images"),
    ],
)
def test_what_it_cannot_send_is_told_at_once(arguments: Any, error: type[Exception], message: str) -> None:
    with Client() as client, pytest.raises(error, match=message):
        client.caption(*arguments)


def test_needs_neither_torch_nor_ray() -> None:
    code = "import raycap.serve.client, sys; print(*{'torch', 'ray', 'timm', 'boto3'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "")


def test_the_ingress_needs_no_torch() -> None:
    code = "import raycap.serve.api, sys; print(*{'torch', 'ray', 'timm', 'boto3'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "")
