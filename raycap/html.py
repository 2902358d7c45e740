"""What the HTML pages share: each is one file that needs no other and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from io import BytesIO

import jinja2
from markupsafe import Markup
from PIL import Image

__all__ = ["jpeg_uri", "page_template"]

_JPEG_QUALITY = 80


def page_template(package: str, filters: dict[str, Callable[..., str]]) -> jinja2.Template:
    """The `report.html.j2` of a package, with these filters, `csp_hash`, by which a page's policy names its own styles
    and scripts, and `common_style`, with which its style begins."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"csp_hash": _csp_hash} | filters
    environment.globals["common_style"] = Markup((files("raycap") / "page.css").read_text(encoding="utf-8"))
    return environment.from_string((files(package) / "report.html.j2").read_text(encoding="utf-8"))


def jpeg_uri(image: Image.Image, *, progressive: bool = False) -> str:
    """The picture as a `data:` URI."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True, progressive=progressive)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
