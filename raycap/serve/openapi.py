"""What OpenAPI says of bodies that FastAPI cannot read off a function: they come in several forms."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from raycap.serve.access import OPEN_PATHS
from raycap.serve.problems import PROBLEM_JSON
from raycap.serve.schemas import EXAMPLE_IMAGE, CaptionRequest, InferRequest, InferResponse, Options, ProblemDetails

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
    500: "A fault of the server's",
    503: "Too much to do, or the model is away; see Retry-After",
}
_PROBLEM = {"schema": {"$ref": _REF.format(model="ProblemDetails")}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {PROBLEM_JSON: _PROBLEM}} for status, text in _STATUSES.items()
}
"""The errors of every route, for FastAPI's `responses`."""
METRICS_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus's text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **{status: PROBLEMS[status] for status in (401, 429, 500)},
}
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
                "one image, five beams": {"value": {"images": [{"data": EXAMPLE_IMAGE}], "options": {"beam_size": 5}}},
                "drawn at random": {
                    "value": {
                        "images": [{"data": EXAMPLE_IMAGE}],
                        "options": {"temperature": 0.7, "top_p": 0.9, "alternatives": 4},
                    }
                },
            },
        },
    },
}


INFER_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": _REF.format(model="InferRequest")},
            "examples": {
                "one image, five beams": {
                    "value": {
                        "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [EXAMPLE_IMAGE]}],
                        "parameters": {"beam_size": 5},
                    }
                }
            },
        }
    },
}
INFER_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs; those asked for as bytes follow the JSON",
        "content": {
            "application/json": {"schema": {"$ref": _REF.format(model="InferResponse")}},
            "application/octet-stream": {"schema": _FILE},
        },
    }
}
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def describe(app: FastAPI, *, asks_for_keys: bool) -> None:
    """Add to the application's document the keys, and the schemas that only the constants above name."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            models = (CaptionRequest, InferRequest, InferResponse, ProblemDetails)
            named = models_json_schema([(model, "validation") for model in models], ref_template=_REF)[1]["$defs"]
            schema["components"]["schemas"] |= named
            schema["components"]["securitySchemes"] = _KEYS
            schema["security"] = [*([] if asks_for_keys else [{}]), *({name: []} for name in _KEYS)]
            for path in OPEN_PATHS & schema["paths"].keys():
                schema["paths"][path]["get"]["security"] = []
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
