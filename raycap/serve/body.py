"""Reading a caption request: images and options out of a form, a raw body or JSON."""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from raycap.serve.captions import Captions
from raycap.serve.problems import ProblemError, invalid_fields
from raycap.serve.schemas import Base64Image, CaptionRequest, ImageAddress, Options

Fetch = Callable[[Sequence[str]], Awaitable[Sequence[bytes]]]
"""Gives the bytes behind the addresses of one request, or raises ProblemError."""
MAX_VALUES = 10_000
"""Of a body in JSON. Making a million objects and telling what is wrong with each would hold up all other requests, and
take gigabytes."""
T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Body:
    """What was asked."""

    images: list[bytes]
    options: Options
    read_s: float
    """Seconds that it took to come in."""


async def read_body(request: Request, query: Options, captions: Captions, fetch: Fetch | None) -> Body:
    """The images and options of a request. Those options in the body go before those in the query.

    Raises ProblemError for a body that is not as it should be.
    """
    start_s = time.perf_counter()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images, given = await _form(request, captions)
    elif kind == "application/json":
        images, given = await _json(request, captions, fetch)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        images, given = [await request.body()], {}
    else:
        raise ProblemError(
            415,
            "unsupported_media_type",
            "expected multipart/form-data with files named image, a body of type image/*, or application/json",
        )
    return Body(images, checked(Options, query.model_dump(exclude_unset=True) | given), time.perf_counter() - start_s)


def checked(model: type[T], value: Any) -> T:
    """The value as `model`. Raises ProblemError that names the fields which are wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False, include_input=False)) from None


def checked_json(model: type[T], body: bytes) -> T:
    """As `checked`, of JSON. Raises ProblemError for what is none, or of too many values."""
    if body.count(b",") > MAX_VALUES:
        raise ProblemError(422, "invalid_request", f"expected JSON of at most {MAX_VALUES:,} values")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProblemError(400, "invalid_json", "the body is not valid JSON") from error
    return checked(model, value)


def admit(request: Request, captions: Captions, num_images: int) -> None:
    """Have the request keep room for its images. Raises ProblemError if there is none, or if they are too many."""
    captions.check_number(num_images)
    request.state.place.hold(num_images)


async def _form(request: Request, captions: Captions) -> tuple[list[bytes], dict[str, Any]]:
    async with request.form(max_files=1000, max_fields=len(Options.model_fields)) as form:
        files = [value for name, value in form.multi_items() if name == "image"]
        if not files or not all(isinstance(file, UploadFile) for file in files):
            raise ProblemError(422, "no_image", "expected one or more files named image, as curl -F image=@FILE sends")
        admit(request, captions, len(files))
        images = [await file.read() for file in files if isinstance(file, UploadFile)]
        return images, {name: value for name, value in form.multi_items() if name != "image"}


async def _json(request: Request, captions: Captions, fetch: Fetch | None) -> tuple[list[bytes], dict[str, Any]]:
    asked = checked_json(CaptionRequest, await request.body())
    admit(request, captions, len(asked.images))
    addresses = [image.url for image in asked.images if isinstance(image, ImageAddress)]
    if fetch is None and addresses:
        raise ProblemError(403, "urls_not_allowed", "this server fetches no images; send the image itself")
    fetched = iter(await fetch(addresses) if fetch else ())
    images = [decode_base64(image.data) if isinstance(image, Base64Image) else next(fetched) for image in asked.images]
    return images, asked.options.model_dump(exclude_unset=True)


def decode_base64(text: str) -> bytes:
    """The bytes. Raises ProblemError for what is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProblemError(
            422, "invalid_base64", "expected the image file in base64, without a data: prefix"
        ) from error
