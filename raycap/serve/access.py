"""The access log: one line of JSON for each request."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

from raycap.serve.page import PAGE_PATHS

access_log = logging.getLogger("raycap.serve.access")

OPEN_PATHS = PAGE_PATHS | {"/healthz", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
"""For these no key is asked."""
KNOWN_PATHS = OPEN_PATHS | {"/metrics", "/v1/caption", "/v2", "/v2/repository/index"}
_OF_A_MODEL = re.compile(r"/v2/models/[^/]+((/versions/1)?(/ready|/infer)?)")


def route_of(path: str) -> str:
    """The route's pattern, for log and metrics: a path may be anything, and what is refused reaches no route."""
    of_a_model = _OF_A_MODEL.fullmatch(path)
    return f"/v2/models/{{model}}{of_a_model[1]}" if of_a_model else path if path in KNOWN_PATHS else "other"


def tell(
    *, request_id: str, method: str, route: str, status: int, code: str | None, seconds: float, num_bytes: int,
    **more: Any,
) -> None:  # fmt: skip
    """Write the line of a request that took so long."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "method": method,
        "route": route,
        "status": status,
        "code": code,
        "ms": round(1000 * seconds, 1),
        "bytes": num_bytes,
        **more,
    }
    access_log.info("%s", json.dumps(line))


def log_to_stderr() -> None:
    """What raycap logs goes into the process's log file, which Ray keeps; the access log as it is, lines of JSON."""
    for name, form in (("raycap", "%(asctime)s %(name)s %(message)s"), (access_log.name, "%(message)s")):
        logger = logging.getLogger(name)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(form))
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
