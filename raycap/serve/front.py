"""What stands before the ingresses, so that Ray Serve's own answers look like the endpoint's, and memory is bounded.

Ray takes bodies in before any ingress sees them, and answers for itself where no ingress does: in plain text, or with
nothing at all when the ingress dies. Each process with an HTTP server of Ray Serve calls `middlewares`, where its
environment has `environment()`: those of ingresses, and Ray's Python proxies. HAProxy (see haproxy.py) is none of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raycap.serve.access import log_to_stderr, route_of, tell
from raycap.serve.config import ServeConfig
from raycap.serve.problems import (
    REQUEST_ID,
    ProblemError,
    body_too_large,
    draining,
    internal,
    overloaded,
    retry_later,
    unavailable,
)

log = logging.getLogger(__name__)

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""By which Ray Serve finds `middlewares`; what HTTPOptions takes of them, Ray 2.60 refuses."""
MAX_BODY_MB = "RAYCAP_MAX_BODY_MB"
"""As --max-body-mb, which is of the ingress."""
PROXY_HEALTH = "/-/healthz"
"""Of the proxy itself. KubeRay asks for it, and gives a node no requests without it."""
BODY = "raycap.body"
"""Of a scope: the body, where it came with the request. The ingress asks Ray for others, which takes 3 ms."""
BODY_AT_ONCE = 2**20
"""Bytes of the largest body that goes to the ingress with the request, before its sender is known."""
AT_ONCE_S = 0.005
"""After a request's headers its body has so long to come at once."""
REFUSAL_S = 5.0
"""So long the ingress has to refuse a body that is too large, with its own log and counters."""
LINGER_S = 10.0
"""So long the rest of a body is read, and thrown away, that was answered before it was all there. Bytes left unread
when a connection is closed reset it, and the answer may be lost with it; hence the lingering close of web servers,
https://nginx.org/en/docs/http/ngx_http_core_module.html#lingering_close."""
_RAYS_OWN = {
    b"x_request_timeout_seconds",
    b"x_request_disconnect_disabled",
    b"serve_multiplexed_model_id",
    b"x_session_id",
}
"""Headers by which a client would tell Ray when to give its request up, and where to send it."""


def environment(max_body_mb: float) -> dict[str, str]:
    """What the environment of Ray Serve's processes must have: for the proxies to be behind this, and for requests to
    go from process to process by gRPC, which costs less than calls of actors."""
    return {
        CALLBACK: f"{__name__}:{middlewares.__name__}",
        MAX_BODY_MB: str(max_body_mb),
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    }


def max_body_mb(env: Mapping[str, str] = os.environ) -> float:
    """The largest body that a proxy with this environment lets through."""
    return float(env.get(MAX_BODY_MB, ServeConfig().max_body_mb))


def middlewares() -> list[Middleware]:
    """For Ray Serve."""
    log_to_stderr()
    return [Middleware(Front, max_body_bytes=int(max_body_mb() * 1e6))]


def request_id(headers: Headers) -> str:
    """The request's own, if it has one that fits into a line of a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(REQUEST_ID, given) else uuid.uuid4().hex


def content_length(headers: Headers) -> int:
    """As the request says; 0 if it says none, or no number."""
    length = headers.get("content-length", "")
    return int(length) if re.fullmatch("[0-9]{1,19}", length) else 0


class Front:
    """Wraps Ray's HTTP server of a proxy or an ingress."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.has_answered = False
        """Whether an application was there."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != PROXY_HEALTH:
            await _Exchange(self, scope, receive, send).answer()
        else:
            await self.app(scope, receive, send)


class _Exchange:
    """One request and its answer."""

    def __init__(self, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self.front, self.receive, self.send = front, receive, send
        self.id = request_id(headers)
        kept = [
            (name, value)
            for name, value in scope["headers"]
            if name != b"x-request-id" and name.replace(b"-", b"_") not in _RAYS_OWN
        ]
        self.scope = {**scope, "headers": [*kept, (b"x-request-id", self.id.encode())]}
        length = content_length(headers)
        self.is_too_large = length > front.max_body_bytes
        # Who expects a 100 sends no body before it is asked for one.
        self.waits_to_be_asked = "expect" in headers
        self.may_read_ahead = 0 < length <= BODY_AT_ONCE and not self.is_too_large and not self.waits_to_be_asked
        self.start_s = time.perf_counter()
        self.num_bytes = 0
        self.is_read = length == 0 and "transfer-encoding" not in headers
        """Whether all of the body has come."""
        self.ahead: deque[Message] = deque()
        """What was read before the proxy asked for it."""
        self.held: Message | None = None
        """The beginning of an answer that may be the proxy's own."""
        self.is_answered = False
        self.is_refused = False
        self.is_gone = False
        """Whether the client went."""
        self.is_early = False
        """Whether the answer came before the end of the body, and is all sent but for its end."""

    async def answer(self) -> None:
        if self.scope["path"].startswith("/-/"):
            await self._refuse(ProblemError(404, "not_found", "Not Found"))
        else:
            await self._pass_on()
        if self.is_early:
            await self._linger()

    async def _pass_on(self) -> None:
        if self.may_read_ahead:
            await self._read_ahead()
        try:
            await self.front.app(self.scope, self._receive, self._send)
            # The proxy sends nothing when the ingress has died, and when it was told that the client went.
            problem = body_too_large(self.front.max_body_bytes) if self.is_too_large else unavailable()
        except Exception:
            if self.is_answered:
                raise
            log.exception("Ray's proxy failed")
            problem = internal()
        if not (self.is_answered or self.is_gone):
            await self._refuse(problem)

    async def _read_ahead(self) -> None:
        """Put a small body into the scope, if all of it is there."""
        with suppress(TimeoutError):
            async with asyncio.timeout(AT_ONCE_S):
                while not self.ahead or self.ahead[-1].get("more_body", False):
                    self.ahead.append(await self._read())
                if self.ahead[-1]["type"] == "http.request":
                    self.scope[BODY] = b"".join(message["body"] for message in self.ahead)
                    self.num_bytes = len(self.scope[BODY])
                    self.ahead = deque([{"type": "http.request", "body": b"", "more_body": False}])

    async def _receive(self) -> Message:
        if self.is_too_large:
            await asyncio.sleep(REFUSAL_S)
            return {"type": "http.disconnect"}
        message = self.ahead.popleft() if self.ahead else await self._read()
        self.num_bytes += len(message.get("body", b""))
        # What goes beyond the limit is passed on once: by that the ingress knows.
        self.is_too_large = self.num_bytes > self.front.max_body_bytes
        return message

    async def _read(self) -> Message:
        self.waits_to_be_asked = False  # the server asks when it is asked
        message = await self.receive()
        self.is_gone = message["type"] == "http.disconnect"
        self.is_read = not message.get("more_body", False)
        return message

    async def _linger(self) -> None:
        """End an early answer when the body has ended, or after a while. By that the server closes the connection."""
        end_s = time.perf_counter() + LINGER_S
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self.is_read and time.perf_counter() < end_s:
                    await self._read()
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_on(self, message: Message) -> None:
        if not self.is_read:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif not (message.get("more_body", False) or self.waits_to_be_asked):
                self.is_early = True
                message = {**message, "more_body": True}
        await self.send(message)

    async def _send(self, message: Message) -> None:
        if self.is_refused:
            return
        if message["type"] == "http.response.start":
            if message["status"] in (404, 408, 503) and _is_text(message):
                self.held = message
                return
            self.front.has_answered = True
        elif self.held is not None:
            start, self.held = self.held, None
            problem = self._said_better(start, message.get("body", b""))
            if problem is not None:
                await self._refuse(problem)
                return
            self.is_answered = True
            await self._send_on(start)
        self.is_answered = True
        await self._send_on(message)

    def _said_better(self, start: Message, text: bytes) -> ProblemError | None:
        """What the proxy says in plain text; None if another application said it."""
        match start["status"]:
            case 404 if text.startswith(b"Path '"):  # no application has the route
                return draining() if self.front.has_answered else unavailable()
            case 408 if text.startswith(b"Request "):
                return retry_later(503, "deadline_exceeded", "no answer in time; try again")
            case 503:
                return overloaded() if "retry-after" in MutableHeaders(raw=start["headers"]) else unavailable()
        return None

    async def _refuse(self, problem: ProblemError) -> None:
        """Answer with the problem, and write the line for it: no ingress will."""
        self.is_answered = self.is_refused = True
        tell(
            request_id=self.id,
            method=self.scope["method"],
            route=route_of(self.scope["path"]),
            status=problem.status,
            code=problem.code,
            seconds=time.perf_counter() - self.start_s,
            num_bytes=self.num_bytes,
        )
        response = problem.response(self.id)
        response.headers["X-Request-ID"] = self.id
        await response(self.scope, self.receive, self._send_on)


def _is_text(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/plain") for name, value in start["headers"])
