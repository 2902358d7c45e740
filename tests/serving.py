"""The endpoint in this process: the real application over a small random model, and a client of it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn
from PIL import Image
from torch import Tensor

from raycap.serve.api import create_app
from raycap.serve.body import Fetch
from raycap.serve.config import ServeConfig
from raycap.serve.front import Front
from raycap.serve.model import OnlineCaptioner, ServedModel, Texts
from raycap.serve.room import Room
from raycap.serve.schemas import Options
from tests.small import small_bundle

SAMPLES = Path(str(files("raycap"))) / "samples"
JPEG = {"Content-Type": "image/jpeg"}
DEADLINE_S = 60


def picture(number: int = 0) -> bytes:
    """A JPEG; each number another colour."""
    file = BytesIO()
    Image.new("RGB", (24, 16), (37 * number % 256, 101 * number % 256, 200)).save(file, "JPEG")
    return file.getvalue()


def small_captioner() -> OnlineCaptioner:
    """A captioner of nonsense."""
    return OnlineCaptioner(small_bundle(), device="cpu")


class GatedCaptioner(OnlineCaptioner):
    """Captions nothing until its gate is opened, and remembers its batches."""

    def __init__(self) -> None:
        super().__init__(small_bundle(), device="cpu")
        self.gate = threading.Event()
        self.batch_sizes: list[int] = []

    def caption_with(self, pixels_BHWC: Tensor, options: Options) -> list[Texts]:
        self.batch_sizes.append(len(pixels_BHWC))
        assert self.gate.wait(DEADLINE_S)
        return super().caption_with(pixels_BHWC, options)


@asynccontextmanager
async def serving(
    config: ServeConfig | None = None,
    *,
    captioner: OnlineCaptioner | None = None,
    fetch: Fetch | None = None,
    room: Room | None = None,
    batch_size: int = 8,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application of its own; each model that the settings name is the same captioner."""
    config = config or ServeConfig()
    model = ServedModel(captioner or small_captioner(), batch_size=batch_size)
    app = create_app(config, dict.fromkeys(config.bundles, model), fetch=fetch, room=room)
    # An error of ours is answered with 500, and raised besides: for the server's log, not for the client.
    behind = Front(app, max_body_bytes=config.max_body_bytes)  # as behind Ray's proxy
    transport = httpx.ASGITransport(behind, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
        yield client
    await model.close()


@contextmanager
def running(config: ServeConfig, captioner: OnlineCaptioner) -> Iterator[str]:
    """The application on a free port; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server = uvicorn.Server(uvicorn.Config("", log_level="warning"))
        started = threading.Event()

        async def main() -> None:
            model = ServedModel(captioner, batch_size=4)
            server.config.app = create_app(config, {"default": model})
            started.set()  # the socket listens already: what comes before the server waits in its queue
            await server.serve([listening])
            await model.close()

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        started.wait()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join()


async def until(condition: Callable[[], bool], what: str) -> None:
    """Return when the condition holds; meanwhile other tasks go on."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.001)


def problem(answer: httpx.Response, status: int) -> Any:
    """The problem that an answer holds, which is of this status and code."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    found = answer.json()
    assert found["status"] == status
    assert found["request_id"] == answer.headers["x-request-id"]
    return found
