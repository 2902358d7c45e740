"""The Open Inference Protocol, version 2, as the clients of KServe and Triton speak it over HTTP.

A model has one input, `image`, BYTES [N] or [N, 1]: encoded image files (in JSON, as base64). Its outputs, of the same
shape, are `caption`, BYTES, and `log_prob`, FP32. Parameters of a request are the options of /v1/caption. Tensors may
follow the JSON as bytes (Triton's binary tensor data extension).
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

import raycap
from raycap.errors import ImageError
from raycap.serve.body import admit, checked, checked_json, decode_base64
from raycap.serve.captions import Answer, Captions
from raycap.serve.health import Readiness
from raycap.serve.openapi import INFER_ANSWER, INFER_BODY
from raycap.serve.problems import ProblemError, image_problem, unavailable
from raycap.serve.schemas import InferRequest, InputTensor, Options, RequestedOutput

INPUT = "image"
OUTPUTS = {"caption": "BYTES", "log_prob": "FP32"}
JSON_LENGTH = "Inference-Header-Content-Length"
VERSION = "1"
OPTIONS = Options.model_fields.keys() - {"model", "alternatives", "attention"}
"""Which a request may have as parameters; the others' answers would have no place."""
OF_CLIENTS = {
    *("binary_data_output", "content_type", "headers", "priority", "timeout"),
    *("sequence_id", "sequence_start", "sequence_end"),
}
"""Parameters of the protocol, of Triton's clients and of MLServer's, which change no caption."""
_MODEL = "/models/{model}"
_MODEL_VERSION = f"{_MODEL}/versions/{VERSION}"
"""Clients may name the only version that there is; the document describes the routes without."""


def router(captions: Captions, readiness: Mapping[str, Readiness]) -> APIRouter:
    """The routes under /v2."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])
    _add_health(routes, captions, readiness)
    _add_models(routes, captions)
    return routes


def _add_health(routes: APIRouter, captions: Captions, readiness: Mapping[str, Readiness]) -> None:
    """Whether the server and its models answer."""

    async def is_ready(model: str) -> bool:
        return not captions.room.is_leaving and await readiness[model].is_ready()

    async def check_ready(model: str) -> None:
        if not await is_ready(model):
            captions.room.check_stays()
            raise unavailable()

    @routes.head("/health/live", include_in_schema=False)
    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @routes.head("/health/ready", include_in_schema=False)
    @routes.get("/health/ready")
    async def ready() -> dict[str, bool]:
        await asyncio.gather(*map(check_ready, captions.models))
        return {"ready": True}

    @routes.get(f"{_MODEL_VERSION}/ready", include_in_schema=False)
    @routes.get(f"{_MODEL}/ready")
    async def model_ready(model: str) -> dict[str, Any]:
        await captions.info(model)  # of a model that is not there, 404
        await check_ready(model)
        return {"name": model, "ready": True}

    @routes.post("/repository/index", include_in_schema=False)
    async def index() -> list[dict[str, str]]:
        """The models, as Triton's clients ask for them."""
        are_ready = await asyncio.gather(*map(is_ready, captions.models))
        return [
            {"name": name, "version": VERSION, "state": "READY" if is_up else "UNAVAILABLE", "reason": ""}
            for name, is_up in zip(captions.models, are_ready, strict=True)
        ]


def _add_models(routes: APIRouter, captions: Captions) -> None:
    """What the server and its models are, and their captions."""

    @routes.get("")
    async def server() -> dict[str, Any]:
        return {"name": "raycap", "version": raycap.__version__, "extensions": ["binary_tensor_data"]}

    @routes.get(_MODEL_VERSION, include_in_schema=False)
    @routes.get(_MODEL)
    async def metadata(model: str) -> dict[str, Any]:
        info = await captions.info(model, again=True)
        return {
            "name": model,
            "versions": [VERSION],
            "platform": "raycap",
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in OUTPUTS.items()],
            "parameters": {"model_id": info.model_id},
        }

    @routes.post(f"{_MODEL_VERSION}/infer", include_in_schema=False)
    @routes.post(f"{_MODEL}/infer", responses=INFER_ANSWER, openapi_extra={"requestBody": INFER_BODY})
    async def infer(model: str, request: Request) -> Response:
        asked, tail = _split(await request.body(), request.headers.get(JSON_LENGTH))
        (tensor,) = asked.inputs
        request.state.model = model[:64]
        num_images = _num_images(tensor)
        admit(request, captions, num_images)
        images = _images(tensor, num_images, tail)
        answer = await captions.caption(model, images, _options(asked.parameters))
        for each in answer.results:
            if isinstance(each, ImageError):
                raise image_problem(each) from each  # the protocol has no place for one image's error
        return _write(model, asked, answer)


def _options(parameters: Mapping[str, Any]) -> Options:
    """Raises ProblemError for parameters that are none of ours, and none of those that clients send everywhere."""
    wrong = sorted(parameters.keys() - OPTIONS - OF_CLIENTS)
    if wrong:
        raise ProblemError(
            422,
            "invalid_request",
            f"{wrong[0][:64]!r} is no parameter here; expected some of {', '.join(sorted(OPTIONS))}",
        )
    return checked(Options, {name: value for name, value in parameters.items() if name in OPTIONS})


def _split(body: bytes, json_length: str | None) -> tuple[InferRequest, bytes]:
    """The request, and what follows its JSON. Raises ProblemError for what is not of the protocol."""
    length = len(body)
    if json_length is not None:
        if not re.fullmatch("[0-9]{1,10}", json_length) or int(json_length) > length:
            raise ProblemError(400, "invalid_request", f"expected {JSON_LENGTH} to be of the body's first part")
        length = int(json_length)
    return checked_json(InferRequest, body[:length]), body[length:]


def _num_images(tensor: InputTensor) -> int:
    """As its shape says. Raises ProblemError for shapes that are not a model's."""
    num_images = math.prod(tensor.shape)
    if tensor.shape[1:] not in ([], [1]) or num_images < 1:
        raise ProblemError(400, "invalid_tensor", f"expected {INPUT} of shape [N] or [N, 1]")
    return num_images


def _images(tensor: InputTensor, num_images: int, tail: bytes) -> list[bytes]:
    """The tensor's elements. Raises ProblemError if they are not so many."""
    elements = _elements(tail) if tensor.data is None else map(decode_base64, _texts(tensor.data))
    images = list(islice(elements, num_images + 1))
    if len(images) != num_images:
        raise ProblemError(400, "invalid_tensor", f"expected as many elements of {INPUT} as its shape says")
    return images


def _elements(data: bytes) -> Iterator[bytes]:
    """Of a BYTES tensor: each is its length in 4 bytes, little-endian, and then itself."""
    place = 0
    while place < len(data):
        end = place + 4
        if end <= len(data):
            end += struct.unpack_from("<I", data, place)[0]
        if end > len(data) or end < place + 4:
            raise ProblemError(400, "invalid_tensor", "the bytes after the JSON end in the middle of an element")
        yield data[place + 4 : end]
        place = end


def _texts(data: list[Any]) -> Iterator[str]:
    """The elements of a tensor [N] or [N, 1] in JSON."""
    for each in data:
        element = each[0] if isinstance(each, list) and len(each) == 1 else each
        if not isinstance(element, str):
            raise ProblemError(400, "invalid_tensor", "expected each element of data to be a text: a file in base64")
        yield element


def _write(model: str, asked: InferRequest, answer: Answer) -> Response:
    texts, log_probs = zip(*(each.captions[0] for each in answer.done), strict=True)
    values: dict[str, list[Any]] = {"caption": list(texts), "log_prob": list(log_probs)}
    all_binary = bool(asked.parameters.get("binary_data_output"))
    wanted = asked.outputs or [RequestedOutput(name=name) for name in values]  # type: ignore[arg-type]
    outputs: list[dict[str, Any]] = []
    tail = b""
    for output in wanted:
        tensor = {"name": output.name, "datatype": OUTPUTS[output.name], "shape": asked.inputs[0].shape}
        if output.parameters.get("binary_data", all_binary):
            data = _binary(values[output.name])
            tail += data
            outputs.append({**tensor, "parameters": {"binary_data_size": len(data)}})
        else:
            outputs.append({**tensor, "data": values[output.name]})
    parameters = {"model_id": answer.model_id}
    parts = {"model_name": model, "model_version": VERSION, "parameters": parameters, "outputs": outputs}
    head = json.dumps({"id": asked.id, **parts} if asked.id else parts).encode()
    if not tail:
        return Response(head, media_type="application/json")
    return Response(head + tail, media_type="application/octet-stream", headers={JSON_LENGTH: str(len(head))})


def _binary(values: list[Any]) -> bytes:
    if isinstance(values[0], str):
        return b"".join(struct.pack("<I", len(data)) + data for data in map(str.encode, values))
    return np.array(values, "<f4").tobytes()
