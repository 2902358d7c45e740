"""The Open Inference Protocol, byte for byte: what its clients send, and what they want back."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Sequence
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from raycap.model.captioner import Captioner
from raycap.serve.health import Readiness
from raycap.serve.v2 import JSON_LENGTH
from tests.serving import picture, problem, serving
from tests.small import small_bundle

IMAGES = [picture(0), picture(1)]


def asking(method: str, path: str, **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with serving() as client:
            return await client.request(method, path, **request)

    return asyncio.run(main())


def infer(content: bytes | dict[str, Any], **headers: str) -> httpx.Response:
    data = json.dumps(content).encode() if isinstance(content, dict) else content
    sent = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    return asking("POST", "/v2/models/default/infer", content=data, headers=sent)


def in_binary(images: Sequence[bytes], **more: Any) -> httpx.Response:
    tail = b"".join(struct.pack("<I", len(image)) + image for image in images)
    tensor = {"name": "image", "shape": [len(images)], "datatype": "BYTES"}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(tail)}}], **more}).encode()
    return infer(head + tail, **{JSON_LENGTH: str(len(head))})


def in_json(data: list[Any], shape: list[int], **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "image", "shape": shape, "datatype": "BYTES", "data": data}], **more}


def in_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.fixture(scope="module")
def wanted() -> list[tuple[str, float]]:
    captioner = Captioner(small_bundle(), device="cpu")
    return [(each.text, each.log_prob) for each in captioner.caption([captioner.prepare(image) for image in IMAGES])]


@pytest.mark.parametrize("nested", [False, True])
def test_json_in_and_out(nested: bool, wanted: list[tuple[str, float]]) -> None:
    texts = [in_base64(image) for image in IMAGES]
    data, shape = ([[text] for text in texts], [2, 1]) if nested else (texts, [2])
    answer = infer(in_json(data, shape, id="42"))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["id"], found["model_name"], found["parameters"]) == ("42", "default", {"model_id": "small"})
    captions, log_probs = found["outputs"]
    assert captions == {"name": "caption", "datatype": "BYTES", "shape": shape, "data": [text for text, _ in wanted]}
    assert (log_probs["name"], log_probs["datatype"], log_probs["shape"]) == ("log_prob", "FP32", shape)
    assert log_probs["data"] == pytest.approx([log_prob for _, log_prob in wanted], abs=1e-4)


def test_bytes_in_and_out(wanted: list[tuple[str, float]]) -> None:
    answer = in_binary(IMAGES, parameters={"binary_data_output": True})
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[JSON_LENGTH])
    captions, log_probs = json.loads(answer.content[:length])["outputs"]
    size = captions["parameters"]["binary_data_size"]
    tail = answer.content[length:]
    assert len(tail) == size + log_probs["parameters"]["binary_data_size"]
    expected = b"".join(struct.pack("<I", len(text)) + text.encode() for text, _ in wanted)
    assert tail[:size] == expected
    np.testing.assert_allclose(np.frombuffer(tail[size:], "<f4"), [each for _, each in wanted], atol=1e-4)


def test_outputs_are_those_that_were_asked_for() -> None:
    outputs = [{"name": "log_prob", "parameters": {"binary_data": True}}, {"name": "caption"}]
    answer = in_binary(IMAGES, outputs=outputs)
    log_probs, captions = json.loads(answer.content[: int(answer.headers[JSON_LENGTH])])["outputs"]
    assert (log_probs["parameters"], len(captions["data"])) == ({"binary_data_size": 8}, 2)
    assert [each["name"] for each in in_binary(IMAGES, outputs=[{"name": "caption"}]).json()["outputs"]] == ["caption"]


def test_parameters_are_options() -> None:
    answer = in_binary(IMAGES, parameters={"max_length": 1, "priority": 3})
    assert all(len(text.split()) == 1 for text in answer.json()["outputs"][0]["data"])
    assert problem(in_binary(IMAGES, parameters={"max_length": 0}), 422)["errors"][0]["field"] == "max_length"


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid_json"),
        (b"{}", {JSON_LENGTH: "3"}, 400, "invalid_request"),
        (b"{}", {JSON_LENGTH: "-1"}, 400, "invalid_request"),
        (b"{}", {JSON_LENGTH: "²"}, 400, "invalid_request"),
        (b"{}", {JSON_LENGTH: "9" * 5000}, 400, "invalid_request"),
        ({}, {}, 422, "invalid_request"),
        ({"inputs": []}, {}, 422, "invalid_request"),
        ({"inputs": [{"name": "picture", "shape": [1], "datatype": "BYTES"}]}, {}, 422, "invalid_request"),
        ({"inputs": [{"name": "image", "shape": [1], "datatype": "UINT8"}]}, {}, 422, "invalid_request"),
        (in_json([], [0]), {}, 400, "invalid_tensor"),
        (in_json(["AAAA"], [2]), {}, 400, "invalid_tensor"),
        (in_json(["AAAA"], [-1]), {}, 400, "invalid_tensor"),
        (in_json(["AAAA", "AAAA"], [1, 2]), {}, 400, "invalid_tensor"),
        (in_json([1], [1]), {}, 400, "invalid_tensor"),
        (in_json(["%"], [1]), {}, 422, "invalid_base64"),
        (in_json(["AAAA"], [1]), {}, 415, "not_an_image"),
        (in_json(["AAAA"] * 17, [17]), {}, 413, "too_many_images"),
        (in_json(["AAAA"], [10**4000]), {}, 422, "invalid_request"),
        (in_json(["AAAA"], [1], parameters={"beams": 5}), {}, 422, "invalid_request"),
        (in_json(["AAAA"], [1], parameters={"alternatives": 5}), {}, 422, "invalid_request"),
        (in_json(["AAAA"], [1], outputs=[{"name": "text"}]), {}, 422, "invalid_request"),
        (in_json(["AAAA"], [1], outputs=[{"name": "caption"}] * 3), {}, 422, "invalid_request"),
        (in_json(["AAAA"], [1], parameters={"x": [0] * 20_000}), {}, 422, "invalid_request"),
        (in_json(["AAAA"] * 17, [1]), {}, 400, "invalid_tensor"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(
    content: bytes | dict[str, Any], headers: dict[str, str], status: int, code: str
) -> None:
    found = problem(infer(content, **headers), status)
    assert found["code"] == code
    assert found["error"] == found["detail"], "where the protocol's clients look"
    assert len(found["detail"]) < 500


@pytest.mark.parametrize("tail", [b"\x01", b"\x01\0\0", b"\x05\0\0\0abcd", b"\xff\xff\xff\xff", b"\x01\0\0\0a\x09"])
def test_elements_that_are_cut_off_are_refused(tail: bytes) -> None:
    head = b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}]}'
    assert problem(infer(head + tail, **{JSON_LENGTH: str(len(head))}), 400)["code"] == "invalid_tensor"


def test_elements_beyond_the_shape_are_not_read() -> None:
    head = b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}]}'
    cut_off = bytes(8) + b"\x01"
    found = problem(infer(head + cut_off, **{JSON_LENGTH: str(len(head))}), 400)
    assert found["detail"] == "expected as many elements of image as its shape says"


def test_parameters_that_clients_send_everywhere_are_let_pass() -> None:
    given = {"beam_size": 2, "timeout": 1_000_000, "priority": 1, "sequence_id": 0}
    assert infer(in_json([base64.b64encode(picture()).decode()], [1], parameters=given)).status_code == 200


def test_names_the_models_as_triton_does() -> None:
    assert asking("POST", "/v2/repository/index").json() == [
        {"name": "default", "version": "1", "state": "READY", "reason": ""}
    ]


def test_says_of_a_model_that_does_not_answer_that_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def is_ready(_: Readiness) -> bool:
        return False

    monkeypatch.setattr(Readiness, "is_ready", is_ready)
    assert [each["state"] for each in asking("POST", "/v2/repository/index").json()] == ["UNAVAILABLE"]


def test_the_version_may_be_named(wanted: list[tuple[str, float]]) -> None:
    path = "/v2/models/default/versions/1"
    assert asking("GET", path).json() == asking("GET", "/v2/models/default").json()
    assert asking("GET", f"{path}/ready").json() == {"name": "default", "ready": True}
    body = in_json([in_base64(image) for image in IMAGES], [2])
    answer = asking("POST", f"{path}/infer", json=body).json()
    assert answer["outputs"][0]["data"] == [text for text, _ in wanted]
    assert asking("GET", "/v2/models/default").json()["versions"] == [answer["model_version"]] == ["1"]
    assert problem(asking("GET", "/v2/models/default/versions/2"), 404)["code"] == "not_found"


def test_tells_what_it_serves() -> None:
    assert asking("GET", "/v2").json()["extensions"] == ["binary_tensor_data"]
    metadata = asking("GET", "/v2/models/default").json()
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert {output["name"]: output["datatype"] for output in metadata["outputs"]} == {
        "caption": "BYTES",
        "log_prob": "FP32",
    }
    assert metadata["parameters"] == {"model_id": "small"}
    for path in ("/v2/models/none", "/v2/models/none/ready"):
        assert problem(asking("GET", path), 404)["code"] == "unknown_model"
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/default/ready"):
        assert asking("GET", path).status_code == 200
