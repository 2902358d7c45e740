"""What every request passes before it is answered: id, key, rate, size, room and deadline; and its line in the log.

Plain ASGI, outside of the application, so that no body is read before its sender is known, but for what may have come
along: a small one, and what Ray has taken in meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AbstractContextManager, nullcontext

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raycap.serve.access import OPEN_PATHS, route_of, tell
from raycap.serve.config import ServeConfig
from raycap.serve.front import BODY, content_length, request_id
from raycap.serve.keys import ApiKeys, RateLimit
from raycap.serve.metrics import Metrics
from raycap.serve.problems import SECURITY_HEADERS, ProblemError, body_too_large, retry_later
from raycap.serve.room import Place, Room

log = logging.getLogger(__name__)
CLIENT_GONE = 499
"""Status in log and metrics of a request whose client went before the answer (nginx's number; HTTP has none)."""


class _ClientGone(BaseException):  # as CancelledError: not for the application's handlers of errors
    """The client went before its request was whole."""


class Guard:
    """Wraps an application."""

    def __init__(self, app: ASGIApp, *, config: ServeConfig, room: Room, metrics: Metrics, names_answers: bool) -> None:
        self.app = app
        self.config = config
        self.room = room
        self.metrics = metrics
        self.names_answers = names_answers
        self._keys = ApiKeys(config.keys_file) if config.keys_file else None
        self._rate = RateLimit(config.rate_limit) if config.rate_limit else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Request(self, scope, receive, send).answer()
        else:
            await self.app(scope, receive, send)

    def check_sender(self, headers: Headers) -> str:
        """The name of the sender's key. Raises ProblemError if it has none or asks too often."""
        if self._keys is None:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        name = self._keys.name_of(key) if key else None
        if name is None:
            raise ProblemError(
                401,
                "unauthorized",
                "expected an API key that is known here, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )
        wait_s = self._rate.take(name) if self._rate else 0.0
        if wait_s:
            raise retry_later(429, "rate_limited", "this API key sends more requests than it may", after_s=wait_s)
        return name


class _Request:
    """One request on its way through the guard."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope, self.receive, self.send = guard, scope, receive, send
        self.headers = Headers(scope=scope)
        self.id = request_id(self.headers)
        self.sender = ""
        self.status = 0
        self.num_bytes = 0
        self.body: bytes | None = scope.pop(BODY, None)
        self.body_is_read = False
        self.start_s = time.perf_counter()
        self.state = scope.setdefault("state", {})
        self.state["request_id"] = self.id

    async def answer(self) -> None:
        try:
            await self._pass_on()
        except ProblemError as problem:
            await self._refuse(problem)
        except _ClientGone:
            self.status = self.status or CLIENT_GONE
        except asyncio.CancelledError:
            self.status = self.status or CLIENT_GONE
            raise
        except Exception:
            log.exception("request %s failed", self.id)  # the application has answered
        finally:
            self._tell()

    async def _pass_on(self) -> None:
        """Raises ProblemError where the request may go no further."""
        if self.scope["path"] not in OPEN_PATHS:
            self.sender = self.guard.check_sender(self.headers)
        self._check_size(content_length(self.headers))
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise ProblemError(415, "unsupported_encoding", "expected a body without Content-Encoding")
        with self._place() as self.state["place"]:
            try:
                async with asyncio.timeout(self.guard.config.deadline_s) as deadline:
                    await self.guard.app(self.scope, self._receive, self._send)
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise self._too_late() from None

    def _place(self) -> AbstractContextManager[Place | None]:
        if self.scope["method"] != "POST":
            return nullcontext()
        self.guard.room.check_open()
        return self.guard.room.place()

    async def _receive(self) -> Message:
        message = await self._next_message()
        if message["type"] == "http.disconnect" and not self.body_is_read:
            raise _ClientGone
        self.num_bytes += len(message.get("body", b""))
        self._check_size(self.num_bytes)
        self.body_is_read = not message.get("more_body", False)
        return message

    async def _next_message(self) -> Message:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        while True:
            message = await self.receive()
            if not (self.body_is_read and message["type"] == "http.request"):  # Ray's, empty, where the body came along
                return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            if self.guard.names_answers:
                headers["X-Request-ID"] = self.id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self.send(message)

    async def _refuse(self, problem: ProblemError) -> None:
        """Answer with the problem, unless an answer has begun."""
        if not self.status:
            self.state["code"] = problem.code
            self.guard.metrics.failure(problem.code)
            await problem.response(self.id)(self.scope, self.receive, self._send)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self.guard.config.max_body_bytes:
            raise body_too_large(self.guard.config.max_body_bytes)

    def _too_late(self) -> ProblemError:
        limit_s = self.guard.config.deadline_s
        if self.body_is_read:
            return retry_later(503, "deadline_exceeded", f"no answer within {limit_s:g} s; try again")
        return ProblemError(408, "body_too_slow", f"the body did not come within {limit_s:g} s")

    def _tell(self) -> None:
        """Count the request, and write its line."""
        seconds = time.perf_counter() - self.start_s
        route = route_of(self.scope["path"])
        self.guard.metrics.request(route, self.status, seconds)
        place = self.state.get("place")
        tell(
            request_id=self.id,
            method=self.scope["method"],
            route=route,
            status=self.status,
            code=self.state.get("code"),
            seconds=seconds,
            num_bytes=self.num_bytes,
            model=self.state.get("model"),
            images=place.num_images if place else 0,
            key=self.sender,
        )
