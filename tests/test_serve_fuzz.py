"""The endpoint against requests that nobody thought of: made from its OpenAPI document, and damaged images."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from raycap.serve.config import ServeConfig
from tests.hostile import base_picture, encode, png, png_header
from tests.serving import JPEG, picture, problem, running, serving, small_captioner

NUM_IMAGES = int(os.environ.get("RAYCAP_FUZZ_IMAGES", "1000"))
AT_A_TIME = 8
MAX_GROWTH_MB = 24
"""Of memory, over the last four fifths of the images: pages of the allocator come and go, a leak grows on."""
CHECKS: list[Any] = [
    not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def document() -> Iterator[Any]:
    """The OpenAPI document of a running endpoint."""
    with running(ServeConfig(), small_captioner()) as address:
        yield schemathesis.openapi.from_url(f"{address}openapi.json")


def test_every_operation_answers_as_its_document_says(document: Any) -> None:
    asked: Counter[str] = Counter()
    # Not by schemathesis's own pytest plugin, which reaches into pytest's insides.
    for operation in (found.ok() for found in document.get_all_operations()):

        @given(case=operation.as_strategy())
        @settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case: Any) -> None:
            asked[case.operation.label] += 1
            case.call_and_validate(checks=CHECKS, timeout=60)

        ask()
    assert {"POST /v1/caption", "POST /v2/models/{model}/infer", "GET /metrics"} <= asked.keys()


def originals() -> list[bytes]:
    """Small images of every format that is read, and some whose headers promise too much."""
    image = base_picture()
    formats = [encode(image, name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    return [picture(), encode(image, "JPEG", progressive=True), *formats, png(png_header(60_000, 60_000))]


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """The file, damaged in one way or several."""
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(damaged) + 1)
        match draw.randrange(5):
            case 0:  # bytes flipped, near the start as often as anywhere
                for _ in range(draw.randint(1, 20)):
                    at = draw.randrange(draw.choice((min(64, len(damaged)), len(damaged))) or 1)
                    damaged[at : at + 1] = bytes([draw.randrange(256)])
            case 1:  # cut off
                del damaged[place:]
            case 2:  # another's header
                length = draw.randint(1, 64)
                damaged[:length] = draw.choice(others)[:length]
            case 3:  # a number that is as large as it can be: a size, a length, an offset
                width = draw.choice((2, 4))
                at = draw.randrange(min(200, len(damaged)) + 1)
                damaged[at : at + width] = draw.choice((b"\xff", b"\x7f")) + b"\xff" * (width - 1)
            case _:  # a part twice
                damaged[place:place] = damaged[place : place + draw.randint(1, 500)]
    return bytes(damaged)


@pytest.mark.timeout(300 + NUM_IMAGES)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_damaged_images_are_answered_and_leave_nothing_behind() -> None:
    draw, others = random.Random(6), originals()
    statuses: Counter[int] = Counter()
    codes: Counter[str] = Counter()

    async def main() -> float:
        config = ServeConfig(max_pixels=1_000_000)  # large ones would hide a leak behind what a decoder needs
        async with serving(config) as client:

            async def ask() -> None:
                answer = await client.post(
                    "/v1/caption", content=mutated(draw.choice(others), others, draw), headers=JPEG
                )
                statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    codes[problem(answer, answer.status_code)["code"]] += 1

            async def ask_all(number: int) -> float:
                for _ in range(0, number, AT_A_TIME):
                    await asyncio.gather(*(ask() for _ in range(AT_A_TIME)))
                gc.collect()
                return resident_mb()

            before = await ask_all(NUM_IMAGES // 5)
            return await ask_all(NUM_IMAGES - NUM_IMAGES // 5) - before

    growth_mb = asyncio.run(main())
    assert statuses.keys() == {200, 413, 415, 422}
    assert {"truncated", "corrupt", "not_an_image", "unsupported_format", "too_large"} <= codes.keys()
    assert growth_mb < MAX_GROWTH_MB


def resident_mb() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
