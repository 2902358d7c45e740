"""Errors as answers: application/problem+json (RFC 9457), with a `code` for programs and a `detail` for people.

Nothing of the server's files, code or addresses is ever in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from raycap.errors import ImageError, RaycapError

PROBLEM_JSON = "application/problem+json"
REQUEST_ID = "[A-Za-z0-9._:/+=-]{1,128}"
"""A regular expression for ids of requests that fit into a line of a log."""
RETRY_AFTER_S = 1.0
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Of every problem, whoever says it, and of the application's other answers where they do not say otherwise."""
IMAGE_STATUS = {"too_large": 413, "not_an_image": 415, "unsupported_format": 415}
"""HTTP status of a request whose only image failed; 422 for other codes."""


class ProblemError(RaycapError):
    """A request that cannot be answered, and the answer that it gets instead."""

    def __init__(
        self, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        """`more` are further members of the answer."""
        super().__init__(status, code, detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = SECURITY_HEADERS | dict(headers or {})
        self.more = more

    def response(self, request_id: str | None = None) -> Response:
        """The answer."""
        body = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **({"request_id": request_id} if request_id else {}),
            **self.more,
            "error": self.detail,  # where clients of the Open Inference Protocol look
        }
        return Response(json.dumps(body), self.status, self.headers, PROBLEM_JSON)


def invalid_fields(errors: Sequence[Any]) -> ProblemError:
    """Of what pydantic says is wrong. It repeats no value that was sent, and of names only the start."""
    wrong = [{"field": ".".join(str(part)[:64] for part in each["loc"]), "detail": _said(each)} for each in errors[:20]]
    summary = "; ".join(": ".join(filter(None, each.values())) for each in wrong[:3])
    return ProblemError(422, "invalid_request", summary, errors=wrong)


def _said(error: Any) -> str:
    # pydantic names our class.
    return "Input should be an object" if error["type"] == "model_type" else error["msg"]


def retry_later(status: int, code: str, detail: str, *, after_s: float = RETRY_AFTER_S) -> ProblemError:
    """A problem that may pass: its Retry-After says when to ask again, in whole seconds."""
    return ProblemError(status, code, detail, headers={"Retry-After": str(max(1, math.ceil(after_s)))})


def overloaded() -> ProblemError:
    """There is no room for the request now."""
    return retry_later(503, "overloaded", "the server has as many images as it can answer in time; try again")


def draining() -> ProblemError:
    """The server ends; behind a load balancer, another one answers."""
    return retry_later(503, "draining", "this server is about to end; try again")


def unavailable() -> ProblemError:
    """The model's process has gone; another takes its place."""
    return retry_later(503, "unavailable", "the model is not there at the moment; try again")


def internal() -> ProblemError:
    """An error of ours."""
    return ProblemError(500, "internal", "the server failed; its log says why")


def body_too_large(max_bytes: int) -> ProblemError:
    """The limit is of a request's whole body."""
    return ProblemError(413, "body_too_large", f"expected a body of at most {max_bytes:,} bytes")


def image_problem(error: ImageError) -> ProblemError:
    """Of a request whose only image cannot be captioned."""
    return ProblemError(IMAGE_STATUS.get(error.code, 422), error.code, str(error))
