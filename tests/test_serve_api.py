"""/v1/caption and what stands beside it: three forms of a request, one answer."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2 as httpx
import pytest

from raycap.images import Preprocessing
from raycap.model.captioner import Captioner
from raycap.serve.backend import Array, ModelInfo, Result
from raycap.serve.captions import Captions, Room
from raycap.serve.config import ServeConfig
from raycap.serve.metrics import Metrics
from raycap.serve.model import OnlineCaptioner, ServedModel
from raycap.serve.problems import ProblemError
from raycap.serve.schemas import CaptionResponse, Options
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


def test_images_are_fetched_where_that_is_allowed() -> None:
    async def fetch(url: str) -> bytes:
        if url.endswith("/dog.jpg"):
            return DOG
        raise ProblemError(403, "url_not_allowed", "not from there")

    images = [{"url": "https://example.org/dog.jpg"}, in_base64(DOG)]
    first, second = texts(asking(in_json(*images), fetch=fetch))
    assert first == second
    refused = asking(in_json(in_base64(DOG), {"url": "https://example.org/cat.jpg"}), fetch=fetch)
    assert problem(refused, 403)["code"] == "url_not_allowed"


def test_requests_choose_among_models() -> None:
    config = ServeConfig(model=("first=a", "second=b"))
    assert asking(raw(DOG), config).json()["model"] == "first"
    assert asking(raw(DOG, model="second"), config).json()["model"] == "second"


def test_a_canary_gets_its_share_of_the_requests_that_name_no_model() -> None:
    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        async def model_for(request_id: str, **options: str) -> str:
            headers = JPEG | {"X-Request-ID": request_id}
            answer = await client.post("/v1/caption", content=picture(), headers=headers, params=options)
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


def test_pixels_are_prepared_again_for_a_model_that_took_anothers_place() -> None:
    class Place:
        """Where one model is, and then another."""

        async def info(self) -> ModelInfo:
            return await model.info()

        async def caption(self, pixels_BHWC: Array, preprocessing: Preprocessing, options: Options) -> list[Result]:
            return await model.caption(pixels_BHWC, preprocessing, options)

    async def main() -> str:
        nonlocal model
        captions = Captions(ServeConfig(), {"default": Place()}, Room(8), Metrics())
        await captions.caption("default", [DOG], Options())
        await model.close()
        model = ServedModel(another, batch_size=4, batch_wait_s=0.0)
        answer = await captions.caption("default", [DOG], Options())
        await model.close()
        return answer.done[0].captions[0][0]

    another = OnlineCaptioner(small_bundle(size_px=8), device="cpu")
    model = ServedModel(small_captioner(), batch_size=4, batch_wait_s=0.0)
    assert asyncio.run(main()) == another.caption([another.prepare(DOG)])[0].text


def test_unknown_routes_and_methods_are_problems() -> None:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/v1/nothing"), await client.get("/v1/caption")]

    unknown, wrong = asking(ask)  # type: ignore[arg-type]
    assert problem(unknown, 404)["code"] == "not_found"
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
        await client.get("/nowhere/%0a")
        return await client.get("/metrics")

    answer = asking(ask)
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    for name, value in {
        'raycap_requests_total{route="/v1/caption",status="200"}': 1,
        'raycap_requests_total{route="/v1/caption",status="415"}': 1,
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
    assert post["requestBody"]["content"].keys() == {"multipart/form-data", "image/*", "application/json"}
    assert {"200", "413", "422", "429", "503"} <= post["responses"].keys()
    schemas = document["components"]["schemas"]
    references = {part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert references <= schemas.keys()
    assert "CaptionRequest" in references
