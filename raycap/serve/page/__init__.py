"""The web page at `/`: three files, with a policy that lets it load nothing else and talk to its own server alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

__all__ = ["PAGE_PATHS", "router"]

_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
PAGE_PATHS = frozenset(_FILES)
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """The page's routes; they are not in the OpenAPI document."""
    routes = APIRouter(include_in_schema=False)
    for path, name in _FILES.items():
        content = (files(__package__) / name).read_bytes()
        routes.add_api_route(path, _file(content, _TYPES[name.rpartition(".")[2]]), methods=["GET", "HEAD"])
    return routes


def _file(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=f"{media_type}; charset=utf-8", headers=_HEADERS)

    return answer
