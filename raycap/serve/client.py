"""A client of the endpoint, for Python: typed answers, and retries that wait as long as the server asks for.

Needs neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2 as httpx
from pydantic import ValidationError

from raycap.errors import RaycapError
from raycap.serve.schemas import CaptionResponse, Options, ProblemDetails

__all__ = ["AnswerError", "AsyncClient", "Client", "Image"]

Image = bytes | str | PathLike[str]
"""The bytes of an image file, or its path."""
ADDRESS = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0
MAX_ATTEMPTS = 5
RETRIED = frozenset({429, 502, 503, 504})
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
"""A server that asks for a longer wait than this is not asked again."""
_DEFAULTS = Options()


class AnswerError(RaycapError):
    """The endpoint refused a request, or did not answer it."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(status, code, detail)
        self.status = status
        """HTTP status; 0 if there was no answer."""
        self.code = code
        """Which problem it is, for programs."""
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code} (HTTP status {self.status}): {self.detail}"


class _Exchange:
    """One request and its repetitions, without the network: what both clients share."""

    def __init__(self, images: Image | Sequence[Image], options: Options, max_attempts: int) -> None:
        several = [images] if isinstance(images, bytes | str | PathLike) else images
        files = [each if isinstance(each, bytes) else Path(each).read_bytes() for each in several]
        self.request: dict[str, Any] = {
            "files": [("image", ("image", data, "application/octet-stream")) for data in files],
            "data": options.model_dump(exclude_none=True, exclude_defaults=True),
        }
        self._attempts_left = max_attempts
        self._backoff_s = FIRST_WAIT_S

    def read(self, response: httpx.Response) -> CaptionResponse | float:
        """The captions, or the seconds to wait before the same is asked again. Raises AnswerError."""
        status = response.status_code
        try:
            if response.is_success:
                return CaptionResponse.model_validate_json(response.content)
            problem = ProblemDetails.model_validate_json(response.content)
            error = AnswerError(status, problem.code, problem.detail)
        except ValidationError:  # of a proxy in front, or of something else altogether
            error = AnswerError(status, "no_answer", "what answers there does not speak as raycap does")
        if status not in RETRIED:
            raise error
        return self._wait_s(error, response.headers.get("retry-after", ""))

    def failed(self, error: httpx.TransportError) -> float:
        """The seconds to wait before the same is asked again: a caption may be asked for twice. Raises AnswerError."""
        found = AnswerError(0, "no_connection", str(error) or type(error).__name__)
        if isinstance(error, httpx.TimeoutException):
            raise found from error
        return self._wait_s(found, "")

    def _wait_s(self, error: AnswerError, retry_after: str) -> float:
        self._attempts_left -= 1
        self._backoff_s *= 2
        wait_s = random.uniform(0.5, 1.0) * self._backoff_s
        if retry_after.isdigit():
            wait_s = max(wait_s, float(retry_after))
        if self._attempts_left <= 0 or wait_s > LONGEST_WAIT_S:
            raise error
        return wait_s


def _settings(address: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": address, "headers": headers, "timeout": timeout_s}


class Client:
    """Asks an endpoint for captions. Usable from many threads.

    >>> with Client() as client:
    ...     print(client.caption("dog.jpg").results[0].caption)
    """

    def __init__(
        self,
        address: str = ADDRESS,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_attempts: int = MAX_ATTEMPTS,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = httpx.Client(transport=transport, **_settings(address, api_key, timeout_s))
        self._max_attempts = max_attempts
        self._sleep = sleep

    def caption(self, images: Image | Sequence[Image], options: Options = _DEFAULTS) -> CaptionResponse:
        """The captions of one image or several, in their order.

        Raises AnswerError if the endpoint refuses, or still has no time after `max_attempts`.
        """
        exchange = _Exchange(images, options, self._max_attempts)
        while True:
            try:
                found = exchange.read(self._http.post("/v1/caption", **exchange.request))
            except httpx.TransportError as error:
                found = exchange.failed(error)
            if isinstance(found, CaptionResponse):
                return found
            self._sleep(found)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """As `Client`, for asyncio.

    >>> async with AsyncClient() as client:
    ...     answer = await client.caption(["dog.jpg", "cat.jpg"])
    """

    def __init__(
        self,
        address: str = ADDRESS,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_attempts: int = MAX_ATTEMPTS,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = httpx.AsyncClient(transport=transport, **_settings(address, api_key, timeout_s))
        self._max_attempts = max_attempts
        self._sleep = sleep

    async def caption(self, images: Image | Sequence[Image], options: Options = _DEFAULTS) -> CaptionResponse:
        """See `Client.caption`."""
        exchange = _Exchange(images, options, self._max_attempts)
        while True:
            try:
                found = exchange.read(await self._http.post("/v1/caption", **exchange.request))
            except httpx.TransportError as error:
                found = exchange.failed(error)
            if isinstance(found, CaptionResponse):
                return found
            await self._sleep(found)

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()
