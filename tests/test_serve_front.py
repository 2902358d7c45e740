"""What stands before Ray's proxy: how its answers look then, and what it is not told."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raycap.serve import front, haproxy
from raycap.serve.config import ServeConfig
from raycap.serve.front import BODY, Front
from tests.serving import problem

MAX_BODY = 100
TEXT = [(b"content-type", b"text/plain; charset=utf-8")]


class Proxy:
    """Ray's, as far as `Front` sees it: it reads on and on, until the client goes or there is an answer."""

    def __init__(self, *answer: Message) -> None:
        self.answer = answer
        self.scope: Scope = {}
        self.received: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        while not self.received or self.received[-1].get("more_body", False):
            self.received.append(await receive())
        await self.answer_with(send)

    async def answer_with(self, send: Send) -> None:
        for message in self.answer:
            await send(message)

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.scope["headers"]}

    @property
    def num_bytes(self) -> int:
        return len(self.scope.get(BODY, b"")) + sum(len(message.get("body", b"")) for message in self.received)


def answering(status: int, body: bytes, *headers: tuple[bytes, bytes]) -> Proxy:
    return Proxy(
        {"type": "http.response.start", "status": status, "headers": [*TEXT, *headers]},
        {"type": "http.response.body", "body": body},
    )


async def exchange(app: ASGIApp, receive: Receive, path: str = "/v1/caption", **headers: str) -> list[Message]:
    """What is sent to a client from which `receive` reads."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    await Front(app, max_body_bytes=10 * front.BODY_AT_ONCE)(scope, receive, send)
    return sent


def ask(app: ASGIApp, path: str = "/v1/caption", **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(Front(app, max_body_bytes=MAX_BODY))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await client.post(path, **request)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("proxy", "code"),
    [
        (Proxy(), "unavailable"),
        (
            answering(404, b"Path '/v1/caption' not found. Ping http://.../-/routes for available routes."),
            "unavailable",
        ),
        (answering(408, b"Request 7f timed out after 40.0s."), "deadline_exceeded"),
        (answering(503, b"too many", (b"retry-after", b"1")), "overloaded"),
        (answering(503, b"the deployment is unavailable"), "unavailable"),
    ],
)
def test_what_the_proxy_says_itself_may_be_asked_again(
    proxy: Proxy, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raycap.serve.access")
    answer = ask(proxy, headers={"X-Request-ID": "abc-1"}, content=b"12345")
    (line,) = (json.loads(record.message) for record in caplog.records)
    assert (line["request_id"], line["status"], line["code"], line["bytes"]) == ("abc-1", 503, code, 5)
    assert (line["method"], line["route"]) == ("POST", "/v1/caption")
    found = problem(answer, 503)
    assert (found["code"], found["request_id"]) == (code, "abc-1")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_client_that_goes_has_no_answer_and_no_line(caplog: pytest.LogCaptureFixture) -> None:
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    caplog.set_level("INFO", "raycap.serve.access")
    assert asyncio.run(exchange(Proxy(), receive)) == []
    assert caplog.records == []


def test_an_application_that_was_there_and_is_not_has_ended() -> None:
    async def main() -> None:
        proxy = answering(200, b"a caption")
        transport = httpx.ASGITransport(Front(lambda *channel: proxy(*channel), max_body_bytes=MAX_BODY))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            assert (await client.get("/")).text == "a caption"
            proxy = answering(404, b"Path '/' not found.")
            assert problem(await client.get("/"), 503)["code"] == "draining"

    asyncio.run(main())


@pytest.mark.parametrize(
    "proxy", [answering(200, b"captions"), answering(404, b"of another application"), answering(422, b"wrong")]
)
def test_what_an_application_says_stays_as_it_is(proxy: Proxy) -> None:
    answer = ask(proxy)
    assert (answer.status_code, answer.content) == (proxy.answer[0]["status"], proxy.answer[1]["body"])


def test_a_proxy_that_fails_is_an_error_of_ours() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("a path of the server's")

    assert problem(ask(fails), 500)["code"] == "internal"


def test_an_answer_that_breaks_off_is_not_taken_for_whole() -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ConnectionError("the ingress has gone")

    with pytest.raises(ConnectionError):
        ask(breaks)


def test_of_the_proxys_own_paths_kuberays_alone_is_open() -> None:
    assert ask(answering(200, b"success"), "/-/healthz").text == "success"
    assert ask(answering(503, b"This node is being drained."), "/-/healthz").text == "This node is being drained."
    assert problem(ask(answering(200, b'{"/": "raycap"}'), "/-/routes"), 404)["code"] == "not_found"


def test_clients_do_not_tell_ray_how_to_treat_them() -> None:
    proxy = answering(200, b"")
    ask(
        proxy,
        headers={
            "X-Request-Disconnect-Disabled": "?1",
            "X-Request-Timeout-Seconds": "-1",
            "X-Session-ID": "1",
            "serve_multiplexed_model_id": "x",
            "X-API-Key": "kept",
        },
    )
    assert proxy.headers["x-api-key"] == "kept"
    assert not {each for each in proxy.headers if each.startswith(("x-request-d", "x-request-t", "x-s", "serve"))}


@pytest.mark.parametrize("given", [b"\xff", b'a"b', b"x" * 129, b""])
def test_an_id_that_fits_no_log_is_replaced_before_ray_sees_it(given: bytes) -> None:
    proxy = Proxy()
    answer = ask(proxy, headers=[(b"X-Request-ID", given), (b"X-Request-ID", b"second")])
    assert proxy.headers["x-request-id"] == answer.headers["x-request-id"] == problem(answer, 503)["request_id"]
    assert re.fullmatch("[0-9a-f]{32}", proxy.headers["x-request-id"])


async def chunks(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(num_bytes):
        yield b"x"


@pytest.mark.parametrize("body", [b"x" * MAX_BODY, chunks(MAX_BODY)])
def test_bodies_up_to_the_limit_pass(body: Any) -> None:
    proxy = answering(200, b"")
    assert ask(proxy, content=body).status_code == 200
    assert proxy.num_bytes == MAX_BODY


def test_a_body_that_is_there_goes_with_the_request() -> None:
    proxy = answering(200, b"")
    ask(proxy, content=b"12345")
    assert proxy.scope[BODY] == b"12345"
    assert proxy.received == [{"type": "http.request", "body": b"", "more_body": False}]


@pytest.mark.parametrize(
    ("headers", "parts"),
    [
        ({"content_length": "5", "expect": "100-continue"}, [b"12345"]),
        ({"content_length": str(front.BODY_AT_ONCE + 1)}, [b"x" * (front.BODY_AT_ONCE + 1)]),
        ({"content_length": "5"}, [b"12", b"345"]),  # the rest comes when the proxy has the first part
        ({"transfer_encoding": "chunked"}, [b"12345"]),
    ],
)
def test_others_pass_as_they_come(headers: dict[str, str], parts: list[bytes]) -> None:
    async def main() -> None:
        left = [{"type": "http.request", "body": part, "more_body": part != parts[-1]} for part in parts]
        rest = asyncio.Event()

        async def receive() -> Message:
            if len(left) < len(parts):
                await rest.wait()
            return left.pop(0)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            assert BODY not in scope
            found = [await receive()]
            rest.set()
            while found[-1]["more_body"]:
                found.append(await receive())
            assert [message["body"] for message in found] == parts
            await answering(200, b"").answer_with(send)

        sent = await exchange(app, receive, **headers)
        assert sent[0]["status"] == 200

    asyncio.run(main())


@pytest.mark.parametrize(("body", "num_passed"), [(b"x" * (MAX_BODY + 1), 0), (chunks(5 * MAX_BODY), MAX_BODY + 1)])
def test_of_larger_ones_the_ingress_sees_no_more_than_it_needs_to_refuse(
    body: Any, num_passed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "REFUSAL_S", 0.0)  # there is no ingress
    proxy = Proxy()
    assert problem(ask(proxy, content=body), 413)["code"] == "body_too_large"
    assert proxy.received[-1]["type"] == "http.disconnect"
    assert proxy.num_bytes == num_passed


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    await answering(401, b"who?").answer_with(send)


async def refuse_while_reading(scope: Scope, receive: Receive, send: Send) -> None:
    """As Ray does, which has its own task for what comes."""
    reading = asyncio.ensure_future(receive())
    await asyncio.sleep(0)
    await refuse(scope, receive, send)
    reading.cancel()


async def say_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """As Ray's proxy does when the ingress has died."""


def ends_of(sent: list[Message]) -> list[bool]:
    """Whether each message is the last one."""
    return [message["type"] == "http.response.body" and not message.get("more_body", False) for message in sent]


@pytest.mark.parametrize(
    ("app", "path", "headers"),
    [
        (refuse, "/v1/caption", {"transfer_encoding": "chunked"}),
        (refuse, "/v1/caption", {"content_length": str(2 * front.BODY_AT_ONCE)}),
        (refuse_while_reading, "/v1/caption", {"transfer_encoding": "chunked", "expect": "100-continue"}),
        (say_nothing, "/v1/caption", {"transfer_encoding": "chunked"}),
        (say_nothing, "/-/routes", {"transfer_encoding": "chunked"}),
    ],
)
@pytest.mark.parametrize("num_parts", [3, None])
def test_an_early_answer_ends_with_the_body_or_after_a_while(
    app: ASGIApp, path: str, headers: dict[str, str], num_parts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "LINGER_S", 0.1)
    num_read = 0

    async def receive() -> Message:
        nonlocal num_read
        await asyncio.sleep(0)
        num_read += 1
        return {"type": "http.request", "body": b"12345", "more_body": num_read != num_parts}

    sent = asyncio.run(exchange(app, receive, path, **headers))
    assert (b"connection", b"close") in [(name.lower(), value) for name, value in sent[0]["headers"]]
    assert ends_of(sent) == [False, False, True]
    assert sent[1]["body"]
    assert sent[2]["body"] == b""
    assert num_read == num_parts or num_parts is None


def test_an_early_answer_waits_no_longer_for_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "LINGER_S", 0.1)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    assert ends_of(asyncio.run(exchange(refuse, receive, content_length="5"))) == [False, False, True]


def test_nor_for_a_client_that_goes() -> None:
    num_read = 0

    async def receive() -> Message:
        nonlocal num_read
        num_read += 1
        return {"type": "http.disconnect"}

    asyncio.run(exchange(refuse, receive, transfer_encoding="chunked"))
    assert num_read == 1


def test_who_waits_to_be_asked_for_a_body_is_not_asked_after_the_answer() -> None:
    async def receive() -> Message:
        raise AssertionError

    assert ends_of(asyncio.run(exchange(refuse, receive, content_length="5", expect="100-continue"))) == [False, True]


def test_an_answer_to_a_whole_request_keeps_the_connection() -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"12345", "more_body": False}

    for headers in ({"content_length": "5"}, {}):
        sent = asyncio.run(exchange(refuse, receive, **headers))
        assert sent == list(answering(401, b"who?").answer)


def test_the_environment_says_how_to_put_it_there(monkeypatch: pytest.MonkeyPatch) -> None:
    env = front.environment(7.5)
    module, _, name = env[front.CALLBACK].partition(":")
    assert (module, name) == (front.__name__, "middlewares")
    assert front.max_body_mb(env) == 7.5
    monkeypatch.setattr(front, "log_to_stderr", lambda: None)
    (middleware,) = front.middlewares()
    assert middleware.kwargs == {"max_body_bytes": 20_000_000}


def test_kuberays_nodes_have_the_same_environment() -> None:
    text = (Path(__file__).parents[1] / "cluster" / "kuberay" / "serve" / "kustomization.yaml").read_text()
    (variables,) = re.findall(r"value: &front\n((?: +- \{name: .*\n)+)", text)
    found = {each["name"]: each["value"] for each in yaml.safe_load(variables)}
    wanted = front.environment(ServeConfig().max_body_mb) | haproxy.environment("/usr/local/bin/raycap-haproxy")
    assert float(found.pop(front.MAX_BODY_MB)) == float(wanted.pop(front.MAX_BODY_MB))
    assert found == wanted
