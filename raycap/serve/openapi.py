"""What OpenAPI says of bodies that FastAPI cannot read off a function: they come in several forms."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from raycap.serve.problems import PROBLEM_JSON
from raycap.serve.schemas import CaptionRequest, InferRequest, Options, ProblemDetails

_REF = "#/components/schemas/{model}"
_STATUSES = {
    400: "The request is damaged",
    401: "No API key, or an unknown one",
    403: "Addresses of images are not allowed",
    404: "No such model",
    408: "The body came too slowly",
    413: "Too many bytes, pixels or images",
    415: "Not an image, or of a format that is not read",
    422: "Wrong options, or a damaged image",
    429: "The API key sends too many requests; see Retry-After",
    503: "Too much to do, or the model is away; see Retry-After",
}
_PROBLEM = {"schema": {"$ref": _REF.format(model="ProblemDetails")}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {PROBLEM_JSON: _PROBLEM}} for status, text in _STATUSES.items()
}
"""The errors of every route, for FastAPI's `responses`."""
_FILE = {"type": "string", "format": "binary"}


def _form() -> dict[str, Any]:
    options = Options.model_json_schema()["properties"]
    return {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": _FILE, "minItems": 1}, **options},
    }


CAPTION_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": _form()},
        "image/*": {"schema": _FILE},
        "application/octet-stream": {"schema": _FILE},
        "application/json": {
            "schema": {"$ref": _REF.format(model="CaptionRequest")},
            "examples": {
                "one image, five beams": {
                    "value": {"images": [{"data": "/9j/4AAQSkZJRg..."}], "options": {"beam_size": 5}}
                },
                "drawn at random": {
                    "value": {
                        "images": [{"data": "/9j/4AAQSkZJRg..."}],
                        "options": {"temperature": 0.7, "top_p": 0.9, "alternatives": 4},
                    }
                },
            },
        },
    },
}


INFER_BODY: dict[str, Any] = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": _REF.format(model="InferRequest")}}},
}
INFER_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs; those asked for as bytes follow the JSON",
        "content": {"application/json": {}, "application/octet-stream": {}},
    }
}


def add_request_schemas(app: FastAPI) -> None:
    """Put the schemas that only `CAPTION_BODY`, `INFER_BODY` and `PROBLEMS` name among those of the application."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            named = models_json_schema(
                [(model, "validation") for model in (CaptionRequest, InferRequest, ProblemDetails)], ref_template=_REF
            )[1]["$defs"]
            schema["components"]["schemas"] |= named
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
