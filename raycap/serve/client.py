"""A client of the endpoint, for Python: typed answers, and retries that wait as long as the server asks for.

Needs neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2 as httpx
from pydantic import ValidationError

from raycap.errors import ConfigurationError, RaycapError
from raycap.serve.schemas import Base64Image, CaptionRequest, CaptionResponse, ImageAddress, Options, ProblemDetails

__all__ = ["AnswerError", "AsyncClient", "Client", "Image"]

Image = bytes | str | PathLike[str]
"""The bytes of an image file, its path, or its https:// address, where the server fetches from that host."""
ADDRESS = "http://127.0.0.1:8000"
TIMEOUT_S = 60.0
MAX_ATTEMPTS = 5
RETRIED = frozenset({429, 502, 503, 504})
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 30.0
"""A server that asks for a longer wait than this is not asked again."""
_NOT_REPEATED = (
    *(httpx.ReadTimeout, httpx.WriteTimeout),  # it may be in work still
    *(httpx.LocalProtocolError, httpx.UnsupportedProtocol),  # it cannot be sent
)
_DEFAULTS = Options()


class AnswerError(RaycapError):
    """The endpoint refused a request, or did not answer it."""

    def __init__(self, status: int, code: str, detail: str, request_id: str) -> None:
        super().__init__(status, code, detail, request_id)
        self.status = status
        """HTTP status; 0 if there was no answer."""
        self.code = code
        """Which problem it is, for programs."""
        self.detail = detail
        self.request_id = request_id
        """What the server's log has of it."""

    def __str__(self) -> str:
        return f"{self.code} (HTTP status {self.status}, request {self.request_id}): {self.detail}"


class _Exchange:
    """One request and its repetitions, without the network: what both clients share."""

    def __init__(self, images: Image | Sequence[Image], options: Options, max_attempts: int) -> None:
        if not isinstance(options, Options):
            raise TypeError(f"expected raycap.Options, got {type(options).__name__}; several images are one list")
        several = isinstance(images, Sequence) and not isinstance(images, bytes | str)
        found = [_read(each) for each in (images if several else [images])]  # type: ignore[union-attr, arg-type]
        if not found:
            raise ValueError("expected one or more images, got none")
        self.id = uuid.uuid4().hex  # of all repetitions: a canary's share goes by it
        self.request: dict[str, Any] = {"headers": {"X-Request-ID": self.id}} | _body(found, options)
        self._attempts_left = max_attempts
        self._backoff_s = FIRST_WAIT_S

    def read(self, response: httpx.Response) -> CaptionResponse | float:
        """The captions, or the seconds to wait before the same is asked again. Raises AnswerError."""
        status = response.status_code
        try:
            if response.is_success:
                return CaptionResponse.model_validate_json(response.content)
            problem = ProblemDetails.model_validate_json(response.content)
            error = AnswerError(status, problem.code, problem.detail, self.id)
        except ValidationError:  # of a proxy in front, or of something else altogether
            error = AnswerError(status, "no_answer", "what answers there does not speak as raycap does", self.id)
        if status not in RETRIED:
            raise error
        return self._wait_s(error, _retry_after_s(response.headers.get("retry-after", "")))

    def failed(self, error: httpx.TransportError) -> float:
        """The seconds to wait before the same is asked again: a caption may be asked for twice. Raises AnswerError."""
        found = AnswerError(0, "no_connection", str(error) or type(error).__name__, self.id)
        if isinstance(error, _NOT_REPEATED):
            raise found from error
        return self._wait_s(found, 0.0)

    def _wait_s(self, error: AnswerError, asked_s: float) -> float:
        self._attempts_left -= 1
        self._backoff_s *= 2
        if self._attempts_left <= 0 or asked_s > LONGEST_WAIT_S:
            raise error
        # Spread: all that were refused together were told the same.
        return asked_s + random.uniform(0.5, 1.0) * self._backoff_s


def _read(image: Image) -> bytes | ImageAddress:
    if isinstance(image, str) and image.startswith("https://"):
        return ImageAddress(url=image)
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str | PathLike):
        raise TypeError(f"expected an image file's path, bytes, or https:// address, got {type(image).__name__}")
    return Path(image).read_bytes()


def _body(images: Sequence[bytes | ImageAddress], options: Options) -> dict[str, Any]:
    """As a form, which is the smallest; addresses go in JSON alone."""
    files = [("image", ("image", image, "application/octet-stream")) for image in images if isinstance(image, bytes)]
    if len(files) == len(images):
        return {"files": files, "data": options.model_dump(exclude_none=True, exclude_defaults=True)}
    several = [Base64Image(data=b64encode(each).decode()) if isinstance(each, bytes) else each for each in images]
    return {"json": CaptionRequest(images=several, options=options).model_dump(exclude_defaults=True)}


def _retry_after_s(text: str) -> float:
    """Seconds from now: RFC 9110 has them as a number or as a date. 0 for what is neither."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0


def _settings(address: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Raises ConfigurationError for what is no address."""
    if not address.startswith(("http://", "https://")):
        raise ConfigurationError(f"expected an address such as {ADDRESS}, got {address!r}")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": address, "headers": headers, "timeout": timeout_s}


class Client:
    """Asks an endpoint for captions. Usable from many threads.

    >>> with Client() as client:
    ...     print(client.caption("dog.jpg").results[0].caption)
    ...     client.caption(["dog.jpg", "cat.jpg"], Options(beam_size=5, attention=True))
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
        """Raises ConfigurationError for what is no address."""
        self._http = httpx.Client(transport=transport, **_settings(address, api_key, timeout_s))
        self._max_attempts = max_attempts
        self._sleep = sleep

    def caption(self, images: Image | Sequence[Image], options: Options = _DEFAULTS) -> CaptionResponse:
        """The captions of one image, or of a list of several, in their order.

        Raises OSError for a file that cannot be read, and AnswerError if the endpoint refuses, or still has no time
        after `max_attempts`.
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
