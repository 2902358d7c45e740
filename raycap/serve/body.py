"""Reading a caption request: images and options out of a form, a raw body or JSON."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from raycap.serve.captions import Captions
from raycap.serve.problems import ProblemError, invalid_fields
from raycap.serve.schemas import Base64Image, CaptionRequest, Options

Fetch = Callable[[str], Awaitable[bytes]]
"""Gives the bytes behind an address, or raises ProblemError."""
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
        raise invalid_fields(error.errors()) from None


async def _form(request: Request, captions: Captions) -> tuple[list[bytes], dict[str, Any]]:
    async with request.form(max_files=1000, max_fields=len(Options.model_fields)) as form:
        files = [value for name, value in form.multi_items() if name == "image"]
        if not files or not all(isinstance(file, UploadFile) for file in files):
            raise ProblemError(422, "no_image", "expected one or more files named image, as curl -F image=@FILE sends")
        captions.check_number(len(files))
        images = [await file.read() for file in files if isinstance(file, UploadFile)]
        return images, {name: value for name, value in form.multi_items() if name != "image"}


async def _json(request: Request, captions: Captions, fetch: Fetch | None) -> tuple[list[bytes], dict[str, Any]]:
    try:
        asked = checked(CaptionRequest, await request.json())
    except (ValueError, RecursionError) as error:
        raise ProblemError(400, "invalid_json", "the body is not valid JSON") from error
    captions.check_number(len(asked.images))
    images = []
    for image in asked.images:
        if isinstance(image, Base64Image):
            images.append(decode_base64(image.data))
        elif fetch is None:
            raise ProblemError(403, "urls_not_allowed", "this server fetches no images; send the image itself")
        else:
            images.append(await fetch(image.url))
    return images, asked.options.model_dump(exclude_unset=True)


def decode_base64(text: str) -> bytes:
    """The bytes. Raises ProblemError for what is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProblemError(
            422, "invalid_base64", "expected the image file in base64, without a data: prefix"
        ) from error
