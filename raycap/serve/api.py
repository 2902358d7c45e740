"""The application: its routes, and how an answer looks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

import raycap
from raycap.errors import ImageError
from raycap.images import Box
from raycap.model.vocabulary import tokenize
from raycap.serve import page, v2
from raycap.serve.backend import Array, Backend, Result
from raycap.serve.body import Fetch, read_body
from raycap.serve.captions import Answer, Captions
from raycap.serve.config import ServeConfig
from raycap.serve.guard import Guard
from raycap.serve.health import Readiness
from raycap.serve.metrics import Metrics
from raycap.serve.openapi import CAPTION_BODY, METRICS_ANSWERS, PROBLEMS, describe
from raycap.serve.problems import ProblemError, image_problem, internal, invalid_fields
from raycap.serve.room import Room, room_for
from raycap.serve.schemas import Alternative, Attention, Captioned, CaptionResponse, Failed, Options, Timings
from raycap.serve.urls import UrlFetcher


def create_app(
    config: ServeConfig,
    backends: Mapping[str, Backend],
    *,
    fetch: Fetch | None = None,
    room: Room | None = None,
    metrics: Metrics | None = None,
    names_answers: bool = True,
) -> ASGIApp:
    """The endpoint over `backends`, which are by name, the default one first.

    Args:
        fetch: gives the bytes of an image by its address; by default a `UrlFetcher` if the settings allow any host,
            else requests with addresses are refused.
        room: of `max_queue` images; given by who closes it to end the server.
        metrics: to count in.
        names_answers: put X-Request-ID on answers. The proxy of Ray Serve does that itself.

    Raises ConfigurationError for a file of API keys or names of hosts that are not as they should be.
    """
    if fetch is None and config.allow_urls:
        fetch = UrlFetcher(config.allow_urls, max_bytes=config.max_body_bytes)
    room = room or room_for(config)
    metrics = metrics or Metrics()
    metrics.queue(lambda: room.taken)
    models = {name: Readiness(backend) for name, backend in backends.items()}
    captions = Captions(config, models, room, metrics)
    app = _routes(captions, models, metrics, fetch, asks_for_keys=config.keys_file is not None)
    guarded: ASGIApp = Guard(app, config=config, room=room, metrics=metrics, names_answers=names_answers)
    if config.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["Retry-After", "Server-Timing", "X-Request-ID"],
        )
    return guarded


def _routes(
    captions: Captions, models: Mapping[str, Readiness], metrics: Metrics, fetch: Fetch | None, *, asks_for_keys: bool
) -> FastAPI:
    # No /docs: FastAPI's page loads its scripts from elsewhere.
    app = FastAPI(
        title="raycap",
        version=raycap.__version__,
        summary="Image captioning",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # such an answer has no problem, and names a scheme that may not be the balancer's
        generate_unique_id_function=lambda route: route.name,  # what generated clients call their functions
    )
    _answer_with_problems(app, metrics)
    app.include_router(v2.router(captions, models), responses=PROBLEMS)
    app.include_router(page.router())

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["Health"])
    async def healthz() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/metrics", tags=["Health"], response_class=Response, responses=METRICS_ANSWERS)
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(await metrics.told(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post(
        "/v1/caption",
        tags=["Captions"],
        response_model=CaptionResponse,
        responses=PROBLEMS,
        openapi_extra={"requestBody": CAPTION_BODY},
    )
    async def caption(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Caption one image or several.

        Of several images, one that cannot be captioned has an error in its place; a single one is an error of the
        request.
        """
        start_s = time.perf_counter()
        body = await read_body(request, options, captions, fetch)
        metrics.stage("read", body.read_s)
        model = request.state.model = body.options.model or captions.model_for(request.state.request_id)
        answer = await captions.caption(model, body.images, body.options)
        first = answer.results[0]
        if len(answer.results) == 1 and isinstance(first, ImageError):
            raise image_problem(first) from first
        return _write(answer, _timings(answer, body.read_s, time.perf_counter() - start_s))

    describe(app, asks_for_keys=asks_for_keys)
    return app


def _answer_with_problems(app: FastAPI, metrics: Metrics) -> None:
    async def problem(request: Request, error: Exception) -> Response:
        found = _as_problem(error)
        request.state.code = found.code
        if not isinstance(error.__cause__, ImageError):  # that one is counted among the images
            metrics.failure(found.code)
        return found.response(request.state.request_id)

    for kind in (ProblemError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, problem)


def _as_problem(error: Exception) -> ProblemError:
    match error:
        case ProblemError():
            return error
        case HTTPException():  # what Starlette refuses: unknown routes, other methods, broken forms
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
            return ProblemError(error.status_code, code, str(error.detail), headers=error.headers)
        case RequestValidationError():  # what FastAPI refuses: options in the query
            return invalid_fields(error.errors())
        case _:
            return internal()


def _write(answer: Answer, timings: Timings) -> Response:
    content = CaptionResponse(
        model=answer.model,
        model_id=answer.model_id,
        results=[_result(each) for each in answer.results],
        timings_ms=timings,
    )
    stages = ", ".join(f"{stage};dur={ms:g}" for stage, ms in timings.model_dump().items())
    return JSONResponse(content.model_dump(), headers={"Server-Timing": stages})


def _result(each: Result | ImageError) -> Captioned | Failed:
    if isinstance(each, ImageError):
        return Failed(code=each.code, detail=str(each))
    best, *others = (Alternative(caption=text, log_prob=lp, probability=math.exp(lp)) for text, lp in each.captions)
    attention = None if each.attention_TRC is None else _attention(best.caption, each.attention_TRC, each.box)
    return Captioned(**best.model_dump(), alternatives=others, attention=attention)


def _attention(caption: str, attention_TRC: Array, box: Box) -> Attention:
    # 4 digits: a grid of 49 cells has weights of about 0.02, and a picture shows no more.
    return Attention(
        words=tokenize(caption),
        weights=attention_TRC.round(4).astype(float).round(4).tolist(),
        box=[round(edge, 4) for edge in box],
    )


def _timings(answer: Answer, read_s: float, total_s: float) -> Timings:
    seconds = {
        "read": read_s,
        "decode": answer.decode_s,
        "queue": max((each.queue_s for each in answer.done), default=0.0),
        "model": max((each.model_s for each in answer.done), default=0.0),
        "total": total_s,
    }
    return Timings(**{stage: round(1000 * each, 2) for stage, each in seconds.items()})
