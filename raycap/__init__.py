"""raycap: image captioning on Ray, in bulk and online, and the training of the model.

The public names are loaded on first use, so that `import raycap` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raycap.model.bundle import Bundle
    from raycap.model.captioner import Alternative, Caption, Captioner
    from raycap.model.config import DecodingConfig
    from raycap.serve.client import AnswerError, AsyncClient, Client
    from raycap.serve.schemas import Options

__version__ = "0.1.0"

_HOMES = {
    "Alternative": "raycap.model.captioner",
    "AnswerError": "raycap.serve.client",
    "AsyncClient": "raycap.serve.client",
    "Bundle": "raycap.model.bundle",
    "Caption": "raycap.model.captioner",
    "Captioner": "raycap.model.captioner",
    "Client": "raycap.serve.client",
    "DecodingConfig": "raycap.model.config",
    "Options": "raycap.serve.schemas",
}

__all__ = [
    "Alternative",
    "AnswerError",
    "AsyncClient",
    "Bundle",
    "Caption",
    "Captioner",
    "Client",
    "DecodingConfig",
    "Options",
    "__version__",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'raycap' has no attribute {name!r}")
