"""/v1/caption and what stands beside it: three forms of a request, one answer."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from raycap.images import Preprocessing
from raycap.model.captioner import Captioner
from raycap.serve.config import ServeConfig
from raycap.serve.model import OnlineCaptioner
from raycap.serve.problems import ProblemError
from raycap.serve.room import Room
from raycap.serve.schemas import CaptionResponse
from tests.serving import JPEG, SAMPLES, GatedCaptioner, picture, problem, serving, small_captioner
from tests.small import small_bundle

Ask = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]
DOG = (SAMPLES / "dog.jpg").read_bytes()


def asking(ask: Ask, config: ServeConfig | None = None, **settings: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with serving(config, **settings) as client:
            return await ask(client)

    return asyncio.run(main())


def raw(data: bytes, **options: Any) -> Ask:
    return lambda client: client.post("/v1/caption", content=data, headers=JPEG, params=options)


def form(*files: bytes, **options: Any) -> Ask:
    return lambda client: client.post("/v1/caption", files=[("image", data) for data in files], data=options)


def in_json(*images: dict[str, Any], **options: Any) -> Ask:
    return lambda client: client.post("/v1/caption", json={"images": list(images), "options": options})


def in_base64(data: bytes) -> dict[str, str]:
    return {"data": base64.b64encode(data).decode()}


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [each["caption"] for each in CaptionResponse.model_validate_json(answer.content).model_dump()["results"]]


@pytest.mark.parametrize("ask", [raw(DOG), form(DOG), in_json(in_base64(DOG))], ids=["raw", "form", "json"])
def test_every_form_gets_what_a_captioner_says(ask: Ask) -> None:
    captioner = Captioner(small_bundle(), device="cpu")
    (wanted,) = captioner.caption([captioner.prepare(DOG)])
    answer = asking(ask)
    assert texts(answer) == [wanted.text]
    found = answer.json()
    (result,) = found["results"]
    assert (found["model"], found["model_id"], result["status"]) == ("default", "small", "ok")
    assert result["log_prob"] == pytest.approx(wanted.log_prob, abs=1e-4)
    assert result["probability"] == pytest.approx(math.exp(wanted.log_prob), rel=1e-3)
    assert [each["caption"] for each in result["alternatives"]] == [each.text for each in wanted.alternatives]
    stages = [stage.split(";dur=") for stage in answer.headers["server-timing"].split(", ")]
    assert {stage: float(ms) for stage, ms in stages} == found["timings_ms"]
    assert found["timings_ms"]["total"] >= found["timings_ms"]["model"] > 0


@pytest.mark.parametrize(
    "ask",
    [
        raw(DOG, beam_size=2, attention="true"),
        form(DOG, beam_size="2", attention="true"),
        in_json(in_base64(DOG), beam_size=2, attention=True),
    ],
    ids=["raw", "form", "json"],
)
def test_every_form_has_options(ask: Ask) -> None:
    (result,) = asking(ask).json()["results"]
    assert len(result["alternatives"]) == 1
    assert result["attention"]["words"] == result["caption"].split()
    grids = result["attention"]["weights"]
    assert len(grids) == len(result["attention"]["words"])
    assert all(sum(map(sum, grid)) == pytest.approx(1, abs=1e-3) for grid in grids)


def test_attention_says_what_of_the_picture_the_model_saw() -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        files = [("image", b"none"), ("image", picture()), ("image", picture())]  # 24 x 16 pixels
        return await client.post("/v1/caption?attention=true", files=files)

    crops = OnlineCaptioner(
        replace(small_bundle(), preprocessing=Preprocessing(size_px=16, resize="crop")), device="cpu"
    )
    failed, *seen = asking(ask, captioner=crops).json()["results"]
    assert failed["status"] == "failed"
    assert [each["attention"]["box"] for each in seen] == [[0.1667, 0.0, 0.8333, 1.0]] * 2


def test_options_of_the_body_go_before_those_of_the_query() -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        files = [("image", DOG)]
        return await client.post("/v1/caption?beam_size=4&max_length=2", files=files, data={"beam_size": "2"})

    (result,) = asking(ask).json()["results"]
    assert len(result["alternatives"]) == 1
    assert len(result["caption"].split()) <= 2


def test_images_keep_their_order_and_one_that_is_none_its_place() -> None:
    captioner = Captioner(small_bundle(), device="cpu")
    data = [picture(number) for number in range(5)]
    wanted = [each.text for each in captioner.caption([captioner.prepare(each) for each in data])]
    answer = asking(form(*data[:2], b"no picture", *data[2:], b""), captioner=small_captioner(), batch_size=2)
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [each.get("caption") for each in results] == [*wanted[:2], None, *wanted[2:], None]
    assert [(each["status"], each.get("code")) for each in (results[2], results[6])] == [
        ("failed", "not_an_image"),
        ("failed", "empty"),
    ]


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 422, "empty"),
        (b"GIF89a", 422, "truncated"),
        (DOG[:2000], 422, "truncated"),
        (b"no picture", 415, "not_an_image"),
        (b"8BPS" + bytes(20), 415, "unsupported_format"),
    ],
)
def test_a_single_image_that_is_none_is_a_problem(data: bytes, status: int, code: str) -> None:
    assert problem(asking(raw(data)), status)["code"] == code


def test_images_of_too_many_pixels_are_refused() -> None:
    assert problem(asking(raw(DOG), ServeConfig(max_pixels=100)), 413)["code"] == "too_large"


@pytest.mark.parametrize(
    ("ask", "status", "code", "field"),
    [
        (raw(DOG, beam_size=0), 422, "invalid_request", "beam_size"),
        (raw(DOG, beam_size="many"), 422, "invalid_request", "beam_size"),
        (raw(DOG, sharpness=1), 422, "invalid_request", "sharpness"),
        (raw(DOG, temperature="nan"), 422, "invalid_request", "temperature"),
        (raw(DOG, temperature=1, beam_size=2), 422, "invalid_request", ""),
        (raw(DOG, seed=1), 422, "invalid_request", ""),
        (raw(DOG, beam_size=2, alternatives=2), 422, "invalid_request", ""),
        (raw(DOG, alternatives=3), 422, "invalid_options", None),
        (raw(DOG, model="none"), 404, "unknown_model", None),
        (form(DOG, beam_size="x"), 422, "invalid_request", "beam_size"),
        (lambda client: client.post("/v1/caption", files=[("photo", DOG)]), 422, "no_image", None),
        (form(*[b"x"] * 4), 413, "too_many_images", None),
        (in_json(), 422, "invalid_request", "images"),
        (in_json({"data": "%%%"}), 422, "invalid_base64", None),
        (in_json({"data": "data:image/jpeg;base64,AAAA"}), 422, "invalid_base64", None),
        (in_json({"data": "AAAA", "url": "https://a"}), 422, "invalid_request", None),
        (in_json(*[in_base64(b"x")] * 4), 413, "too_many_images", None),
        (in_json({"url": "https://example.org/dog.jpg"}), 403, "urls_not_allowed", None),
        (in_json(in_base64(DOG), beam_size=[1]), 422, "invalid_request", "options.beam_size"),
        (raw(DOG, model="m" * 65), 422, "invalid_request", "model"),
        (raw(DOG, **{"n" * 1000: 1}), 422, "invalid_request", "n" * 64),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(ask: Ask, status: int, code: str, field: str | None) -> None:
    found = problem(asking(ask, ServeConfig(max_images=3)), status)
    assert found["code"] == code
    if field is not None:
        assert found["errors"][0]["field"].removeprefix("query.").removeprefix("query") == field


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b"\xff", "application/json", 400, "invalid_json"),
        (b"3", "application/json", 422, "invalid_request"),
        (b"x", "text/plain", 415, "unsupported_media_type"),
        (b"x", "", 415, "unsupported_media_type"),
        (b"x", "multipart/form-data", 400, "bad_request"),
        (b"x", "multipart/form-data; boundary=b", 400, "bad_request"),
    ],
)
def test_bodies_that_are_damaged_are_problems(content: bytes, kind: str, status: int, code: str) -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/caption", content=content, headers={"Content-Type": kind})

    assert problem(asking(ask), status)["code"] == code


@pytest.mark.parametrize(
    "body", [{"images": [1] * 20_000}, {"images": [], **{f"more {number}": 1 for number in range(20_000)}}]
)
def test_json_of_very_many_values_is_not_even_read(body: dict[str, Any]) -> None:
    found = problem(asking(lambda client: client.post("/v1/caption", json=body)), 422)
    assert found["detail"] == "expected JSON of at most 10,000 values"


def test_of_many_wrong_images_the_first_is_told_of() -> None:
    found = problem(asking(lambda client: client.post("/v1/caption", json={"images": [1] * 5000})), 422)
    assert found["errors"] == [
        {"field": "images.0", "detail": 'expected {"data": the file in base64} or {"url": its address}'}
    ]


@pytest.mark.parametrize("body", [[], {"images": [{"data": "aGk="}], "options": []}, {"images": [{"data": {}}]}])
def test_what_is_wrong_is_told_in_the_callers_terms(body: Any) -> None:
    found = problem(asking(lambda client: client.post("/v1/caption", json=body)), 422)
    assert not any(name in json.dumps(found) for name in ("CaptionRequest", "Options", "Base64Image", "dictionary"))


def test_images_are_fetched_where_that_is_allowed() -> None:
    async def fetch(urls: Sequence[str]) -> list[bytes]:
        if any(url not in data for url in urls):
            raise ProblemError(403, "url_not_allowed", "not from there")
        return [data[url] for url in urls]

    data = {"https://example.org/dog.jpg": DOG, "https://example.org/other.jpg": picture()}
    images = [in_base64(DOG), *({"url": url} for url in data), in_base64(picture())]
    first, second, third, fourth = texts(asking(in_json(*images), fetch=fetch))
    assert first == second
    assert third == fourth
    refused = asking(in_json(in_base64(DOG), {"url": "https://example.org/cat.jpg"}), fetch=fetch)
    assert problem(refused, 403)["code"] == "url_not_allowed"


def test_images_have_their_room_before_they_are_fetched() -> None:
    async def main() -> None:
        fetching, room = asyncio.Event(), Room(4)

        async def fetch(urls: Sequence[str]) -> list[bytes]:
            fetching.set()
            await asyncio.Event().wait()
            return []

        async with serving(room=room, fetch=fetch) as client:
            taken = asyncio.create_task(in_json(*[{"url": "https://example.org/dog.jpg"}] * 3)(client))
            await fetching.wait()
            assert room.taken == 3
            for ask in (form(DOG, DOG), in_json(in_base64(DOG), in_base64(DOG))):
                assert problem(await ask(client), 503)["code"] == "overloaded"
            assert (await raw(DOG)(client)).status_code == 200
            taken.cancel()
            await asyncio.wait([taken])
            assert room.taken == 0

    asyncio.run(main())


def test_requests_choose_among_models() -> None:
    config = ServeConfig(model=("first=a", "second=b"))
    assert asking(raw(DOG), config).json()["model"] == "first"
    assert asking(raw(DOG, model="second"), config).json()["model"] == "second"


def test_a_canary_gets_its_share_of_the_requests_that_name_no_model() -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        async def model_for(request_id: str, **options: str) -> str:
            headers = JPEG | {"X-Request-ID": request_id}
            answer = await client.post("/v1/caption", content=picture(), headers=headers, params=options)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["model"])

        first = [await model_for(f"request-{number}") for number in range(200)]
        assert [await model_for(f"request-{number}") for number in range(50)] == first[:50]
        assert set(first) == {"old", "new"}
        assert 20 <= first.count("new") <= 60, "about 20% of 200"
        assert {await model_for(f"request-{number}", model="old") for number in range(50)} == {"old"}
        return await client.get("/metrics")

    config = ServeConfig(model=("old=a", "new=b"), canary="new=0.2")
    assert 'raycap_images_total{model="new"}' in asking(ask, config).text
    assert asking(raw(DOG), ServeConfig(model=("old=a", "new=b"), canary="new=1")).json()["model"] == "new"


def test_unknown_routes_and_methods_are_problems() -> None:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get(path) for path in ("/v1/caption", "/v1/nothing", "/v1/caption/", "/v2/")]

    wrong, *unknown = asking(ask)  # type: ignore[arg-type]
    for answer in unknown:
        assert problem(answer, 404)["code"] == "not_found"
    assert problem(wrong, 405)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


def test_an_error_of_ours_tells_nothing_of_the_server() -> None:
    class Broken(GatedCaptioner):
        def caption_with(self, *_: object) -> Any:
            raise RuntimeError("/etc/secret")

    found = problem(asking(raw(DOG), captioner=Broken()), 500)
    assert found["code"] == "internal"
    assert "secret" not in json.dumps(found)
    assert "raycap" not in json.dumps(found)


def test_metrics_tell_what_happened() -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        await form(DOG, picture(), b"none")(client)
        await raw(b"none")(client)
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [in_base64(b"none")["data"]]}
        await client.post("/v2/models/default/infer", json={"inputs": [tensor]})
        await client.get("/nowhere/%0a")
        return await client.get("/metrics")

    answer = asking(ask)
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    for name, value in {
        'raycap_requests_total{route="/v1/caption",status="200"}': 1,
        'raycap_requests_total{route="/v1/caption",status="415"}': 1,
        'raycap_requests_total{route="/v2/models/{model}/infer",status="415"}': 1,
        'raycap_requests_total{route="other",status="404"}': 1,
        'raycap_images_total{model="default"}': 2,
        'raycap_failures_total{code="not_an_image"}': 3,
        'raycap_batch_size_sum{model="default"}': 4,
        'raycap_stage_seconds_count{stage="model"}': 2,
        'raycap_caption_words_count{model="default"}': 2,
        'raycap_caption_log_prob_count{model="default"}': 2,
        "raycap_queue": 0,
    }.items():
        assert float(lines[name]) == value, name


def test_openapi_describes_requests_and_problems() -> None:
    document = asking(lambda client: client.get("/openapi.json")).json()
    post = document["paths"]["/v1/caption"]["post"]
    assert post["requestBody"]["content"].keys() == {
        *("multipart/form-data", "image/*", "application/octet-stream", "application/json")
    }
    assert {"200", "413", "422", "429", "503"} <= post["responses"].keys()
    schemas = document["components"]["schemas"]
    references = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert references <= schemas.keys()
    assert "CaptionRequest" in references


def test_the_examples_are_answered() -> None:
    async def ask(client: httpx.AsyncClient) -> int:
        document = (await client.get("/openapi.json")).json()
        operations = [(path, each["post"]) for path, each in document["paths"].items() if "post" in each]
        image = document["components"]["schemas"]["Base64Image"]["properties"]["data"]["examples"][0]
        bodies = [("/v1/caption", {"images": [{"data": image}]})]
        for path, operation in operations:
            content = operation["requestBody"]["content"]["application/json"]
            assert content["examples"], path
            bodies += [(path.replace("{model}", "default"), each["value"]) for each in content["examples"].values()]
        for path, body in bodies:
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
        return len(bodies)

    assert asking(ask) == 4  # type: ignore[arg-type, comparison-overlap]


def test_openapi_says_which_keys_are_asked_for(tmp_path: Path) -> None:
    def document(config: ServeConfig) -> Any:
        return asking(lambda client: client.get("/openapi.json"), config).json()

    (tmp_path / "keys").write_text("ana secret-of-ana\n")
    with_keys = document(ServeConfig(keys_file=str(tmp_path / "keys")))
    assert with_keys["components"]["securitySchemes"].keys() == {"bearer", "key"}
    assert with_keys["security"] == [{"bearer": []}, {"key": []}]
    assert document(ServeConfig())["security"] == [{}, *with_keys["security"]]
    open_paths = {path for path, each in with_keys["paths"].items() if each.get("get", {}).get("security") == []}
    assert open_paths == {"/healthz", "/v2/health/live", "/v2/health/ready"}
    for path, operations in with_keys["paths"].items():
        for operation in operations.values():
            assert path in open_paths or {"401", "429"} <= operation["responses"].keys(), path
