"""What a request must pass, and what it costs when it may not."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from raycap.serve import front
from raycap.serve.access import route_of
from raycap.serve.config import ServeConfig
from raycap.serve.room import Room
from tests.serving import JPEG, GatedCaptioner, picture, problem, running, serving, small_captioner, until

ROOT = Path(__file__).parents[1]
IMAGE = picture()


async def post(client: httpx.AsyncClient, content: Any = IMAGE, **headers: str) -> httpx.Response:
    return await client.post("/v1/caption", content=content, headers=JPEG | headers)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("ana secret-of-ana\nben secret-of-ben\n")
    return path


def test_only_known_keys_pass(keys_file: Path) -> None:
    async def main() -> None:
        async with serving(ServeConfig(keys_file=str(keys_file))) as client:
            for headers in (
                {},
                {"X-API-Key": "wrong"},
                {"Authorization": "Bearer"},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic secret-of-ana"},
            ):
                answer = await post(client, **headers)
                assert problem(answer, 401)["code"] == "unauthorized"
                assert answer.headers["www-authenticate"] == "Bearer"
            assert (await post(client, **{"X-API-Key": "secret-of-ana"})).status_code == 200
            assert (await post(client, Authorization="bearer secret-of-ben")).status_code == 200
            for path in ("/metrics", "/v2", "/v2/models/default"):
                problem(await client.get(path), 401)
            for path in ("/", "/healthz", "/openapi.json", "/v2/health/live", "/v2/health/ready"):
                assert (await client.get(path)).status_code == 200
            for path in ("/", "/healthz", "/v2/health/live", "/v2/health/ready"):  # as some load balancers ask
                assert (await client.head(path)).status_code == 200

            stamp = keys_file.stat().st_mtime_ns
            keys_file.write_text("ana another-secret\n")
            os.utime(keys_file, ns=(stamp + 1, stamp + 1))
            problem(await post(client, **{"X-API-Key": "secret-of-ana"}), 401)
            assert (await post(client, **{"X-API-Key": "another-secret"})).status_code == 200

    asyncio.run(main())


def test_a_key_that_asks_too_often_must_wait(keys_file: Path) -> None:
    async def main() -> None:
        async with serving(ServeConfig(keys_file=str(keys_file), rate_limit=0.01)) as client:
            assert (await post(client, **{"X-API-Key": "secret-of-ana"})).status_code == 200
            refused = await post(client, **{"X-API-Key": "secret-of-ana"})
            assert problem(refused, 429)["code"] == "rate_limited"
            assert 90 <= int(refused.headers["retry-after"]) <= 100
            assert (await post(client, **{"X-API-Key": "secret-of-ben"})).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/caption", "/v2/models/default/infer", "/nowhere"])
def test_a_body_that_says_it_is_too_large_is_not_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "LINGER_S", 0.0)

    async def main() -> None:
        read = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal read
            read += 1
            yield bytes(2000)

        async with serving(ServeConfig(max_body_mb=0.001)) as client:
            answer = await client.post(path, content=body(), headers=JPEG | {"Content-Length": "2000"})
        assert problem(answer, 413)["code"] == "body_too_large"
        assert read == 0

    asyncio.run(main())


def test_a_body_that_does_not_say_is_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "LINGER_S", 0.0)

    async def main() -> None:
        read = 0

        async def body(start: bytes) -> AsyncIterator[bytes]:
            nonlocal read
            read = 0
            yield start
            while True:  # without an end
                read += 1
                yield bytes(100)

        async with serving(ServeConfig(max_body_mb=0.001)) as client:
            for kind, start in (
                ("image/jpeg", b""),
                ("application/json", b""),
                (
                    "multipart/form-data; boundary=b",
                    b'--b\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n',
                ),
            ):
                answer = await post(client, body(start), **{"Content-Type": kind})
                assert problem(answer, 413)["code"] == "body_too_large"
                assert read == (1000 - len(start)) // 100 + 1

    asyncio.run(main())


@pytest.mark.parametrize("length", ["²", "9" * 5000, "-1", "many"])
def test_a_length_that_is_none_is_not_believed(length: str) -> None:
    async def main() -> None:
        async with serving() as client:
            content_length = {b"Content-Length": length.encode("latin-1")}
            headers = {b"Content-Type": b"image/jpeg", **content_length}
            assert (await client.post("/v1/caption", content=IMAGE, headers=headers)).status_code == 200

    asyncio.run(main())


def test_encoded_bodies_are_refused() -> None:
    async def main() -> None:
        async with serving() as client:
            answer = await post(client, **{"Content-Encoding": "gzip"})
            assert problem(answer, 415)["code"] == "unsupported_encoding"

    asyncio.run(main())


def test_beyond_the_room_there_is_503_at_once_and_afterwards_room_again() -> None:
    async def main() -> None:
        captioner = GatedCaptioner()
        async with serving(
            ServeConfig(max_queue=4, max_images=3, batch_size=2), captioner=captioner, batch_size=2
        ) as client:
            taken = [asyncio.create_task(post(client)) for _ in range(3)]
            await until(lambda: bool(captioner.batch_sizes), "the first batch")
            several = await client.post("/v1/caption", files=[("image", IMAGE)] * 3)
            assert problem(several, 503)["code"] == "overloaded"
            taken.append(asyncio.create_task(post(client)))
            while "raycap_queue 4.0" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0)
            for _ in range(20):
                refused = await post(client)
                assert problem(refused, 503)["code"] == "overloaded"
                assert int(refused.headers["retry-after"]) >= 1
            assert (await client.get("/v2/health/live")).status_code == 200
            captioner.gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*taken)] == [200] * 4
            assert (await client.post("/v1/caption", files=[("image", IMAGE)] * 3)).status_code == 200

    asyncio.run(main())


def test_a_server_that_ends_answers_what_came_and_refuses_what_comes() -> None:
    async def main() -> None:
        captioner, room = GatedCaptioner(), Room(8)
        async with serving(captioner=captioner, room=room) as client:
            came = [asyncio.create_task(post(client)) for _ in range(3)]
            await until(lambda: room.taken == 3, "three requests")
            closing = asyncio.create_task(room.close())
            await until(lambda: room.is_closing, "the end")
            refused = await post(client)
            assert problem(refused, 503)["code"] == "draining"
            assert int(refused.headers["retry-after"]) >= 1
            assert problem(await client.get("/v2/health/ready"), 503)["code"] == "draining"
            assert (await client.get("/v2/health/live")).status_code == 200
            assert not closing.done()
            captioner.gate.set()
            await closing
            assert [answer.status_code for answer in await asyncio.gather(*came)] == [200] * 3
        await Room(8).close()  # with nobody in it

    asyncio.run(main())


def test_an_answer_that_comes_too_late_frees_its_place() -> None:
    async def main() -> None:
        captioner = GatedCaptioner()
        async with serving(ServeConfig(deadline_s=0.2), captioner=captioner, batch_size=1) as client:
            late = await asyncio.gather(*(post(client) for _ in range(5)))
            for answer in late:
                assert problem(answer, 503)["code"] == "deadline_exceeded"
                assert "retry-after" in answer.headers
            assert "raycap_queue 0.0" in (await client.get("/metrics")).text
            captioner.gate.set()
            await until_answered(client)
        assert len(captioner.batch_sizes) < 5, "those that waited for the model are captioned no more"

    async def until_answered(client: httpx.AsyncClient) -> None:
        while (await post(client)).status_code != 200:
            pass

    asyncio.run(main())


def test_a_body_that_comes_too_slowly_is_the_clients_fault() -> None:
    async def main() -> None:
        async def body() -> AsyncIterator[bytes]:
            yield IMAGE[:10]
            await asyncio.Event().wait()

        async with serving(ServeConfig(deadline_s=0.05)) as client:
            assert problem(await post(client, body()), 408)["code"] == "body_too_slow"

    asyncio.run(main())


def test_a_client_that_goes_frees_its_place() -> None:
    async def main() -> None:
        captioner = GatedCaptioner()
        async with serving(captioner=captioner, batch_size=1) as client:
            first = asyncio.create_task(post(client))
            await until(lambda: bool(captioner.batch_sizes), "the first batch")
            gone = asyncio.create_task(post(client))
            while "raycap_queue 2.0" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait([gone])
            metrics = (await client.get("/metrics")).text
            assert "raycap_queue 1.0" in metrics
            assert 'raycap_requests_total{route="/v1/caption",status="499"} 1.0' in metrics
            captioner.gate.set()
            assert (await first).status_code == 200
        assert captioner.batch_sizes == [1]

    asyncio.run(main())


def test_every_answer_has_an_id_and_safe_headers(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving() as client:
            given = await post(client, **{"X-Request-ID": "abc-123"})
            assert given.headers["x-request-id"] == "abc-123"
            made = [await post(client), await post(client, **{"X-Request-ID": 'a"b\\'}), await client.get("/nowhere")]
            ids = {answer.headers["x-request-id"] for answer in made}
            assert len(ids) == 3
            assert all(len(each) == 32 for each in ids)
            for answer in (given, *made):
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["content-security-policy"].startswith("default-src 'none'")
                assert "access-control-allow-origin" not in answer.headers

    with caplog.at_level(logging.INFO, "raycap.serve.access"):
        asyncio.run(main())
    lines = [json.loads(record.message) for record in caplog.records if record.name == "raycap.serve.access"]
    assert [(line["route"], line["status"]) for line in lines] == [("/v1/caption", 200)] * 3 + [("other", 404)]
    assert (lines[0]["request_id"], lines[0]["bytes"], lines[0]["method"]) == ("abc-123", len(IMAGE), "POST")
    assert (lines[0]["model"], lines[0]["images"], lines[0]["code"]) == ("default", 1, None)
    assert (lines[3]["model"], lines[3]["images"], lines[3]["code"]) == (None, 0, "not_found")
    assert datetime.fromisoformat(lines[0]["time"]).tzinfo == UTC


def test_what_is_refused_has_its_route_too(keys_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> str:
        async with serving(ServeConfig(keys_file=str(keys_file))) as client:
            known = {"X-API-Key": "secret-of-ana"}
            paths = (await client.get("/openapi.json")).json()["paths"].keys()
            assert {route_of(path.replace("{model}", "some")) for path in paths} == paths
            problem(await post(client), 401)
            problem(await post(client, **known, **{"Content-Encoding": "gzip"}), 415)
            problem(await post(client, b"none", **known), 415)
            problem(await client.post("/v2/models/some/versions/1/infer"), 401)
            problem(await client.get("/wp-admin"), 401)
            return (await client.get("/metrics", headers=known)).text

    with caplog.at_level(logging.INFO, "raycap.serve.access"):
        metrics = asyncio.run(main())
    lines = [json.loads(record.message) for record in caplog.records if record.name == "raycap.serve.access"]
    assert [(line["route"], line["code"]) for line in lines] == [
        ("/openapi.json", None),
        ("/v1/caption", "unauthorized"),
        ("/v1/caption", "unsupported_encoding"),
        ("/v1/caption", "not_an_image"),
        ("/v2/models/{model}/versions/1/infer", "unauthorized"),
        ("other", "unauthorized"),
        ("/metrics", None),
    ]
    assert 'raycap_requests_total{route="/v1/caption",status="401"} 1.0' in metrics


def test_the_access_log_is_json_and_nothing_else() -> None:
    code = """if True:
        import logging
        from raycap.serve.access import log_to_stderr
        log_to_stderr()
        logging.getLogger("raycap.serve.access").info('{"status": 200}')
        logging.getLogger("raycap.serve").warning("something else")
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    line, other = result.stderr.splitlines()
    assert json.loads(line) == {"status": 200}
    assert other.endswith("raycap.serve something else")


def test_a_client_that_goes_while_it_sends_is_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    def metrics() -> str:
        return httpx.get(f"{address}metrics").text

    head = "POST /v1/caption HTTP/1.1\r\nHost: a\r\nContent-Type: {}\r\nContent-Length: 1000\r\n\r\n"
    with running(ServeConfig(), small_captioner()) as address:
        url = httpx.URL(address)
        for kind in ("image/jpeg", "application/json", "multipart/form-data; boundary=b"):
            with socket.create_connection((url.host, url.port or 0)) as sender:
                sender.sendall(head.format(kind).encode() + b"--b")
                while "raycap_queue 1.0" not in metrics():
                    pass
            while "raycap_queue 0.0" not in metrics():
                pass
        found = metrics()
    assert 'raycap_requests_total{route="/v1/caption",status="499"} 3.0' in found
    assert "raycap_failures_total{" not in found
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_pages_of_other_origins_may_call_where_they_are_named(keys_file: Path) -> None:
    async def main() -> None:
        config = ServeConfig(cors_origins=("https://example.org",), keys_file=str(keys_file))
        async with serving(config) as client:
            asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
            allowed = await client.options("/v1/caption", headers=asked)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == "https://example.org"
            refused = await post(client, Origin="https://example.org")
            problem(refused, 401)
            assert refused.headers["access-control-allow-origin"] == "https://example.org", "so the page can read why"
            other = await client.options("/v1/caption", headers=asked | {"Origin": "https://example.com"})
            assert "access-control-allow-origin" not in other.headers

    asyncio.run(main())
