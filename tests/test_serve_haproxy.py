"""HAProxy with the configuration that Ray Serve writes, run by the program that edits it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_connection
from threading import Thread

import httpx2 as httpx
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from raycap.serve import haproxy
from tests.commands import end_with_parent, free_port, free_ports, process_title, wait_until
from tests.serving import problem

PROGRAM = haproxy.program()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no HAProxy for this system")
UNFIT = ("", 'a"b', "x" * 129, 'abc-1, b","c":"d')


class Ingress(BaseHTTPRequestHandler):
    """Answers with the status that is asked for; /dies breaks off."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status = self.path.strip("/")
        if status == "dies":
            self.close_connection = True
            return
        self.send_response(200 if status.startswith("-") else int(status))
        self.send_header("X-Request-ID", self.headers.get("X-Request-ID", "none"))
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"said")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def write_config(folder: Path, *ingress_ports: int) -> tuple[Path, HAProxyConfig]:
    """As Ray does."""
    port, stats_port, metrics_port = free_ports(3)
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "admin.sock"),
        metrics_socket_path=str(folder / "metrics.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        stats_port=stats_port,
        metrics_port=metrics_port,
        is_head=True,
    )
    servers = [ServerConfig(f"ingress{port}", "127.0.0.1", port) for port in ingress_ports]
    backends = {"http-raycap": BackendConfig("http-raycap", "/", servers=servers, app_name="raycap")} if servers else {}
    path = folder / "haproxy.cfg"
    api = HAProxyApi(config, backends, str(path))
    api.set_backend_configs(backends)
    api._generate_config_file_internal()
    return path, config


@contextmanager
def proxy(folder: Path, *ingress_ports: int) -> Iterator[httpx.Client]:
    """A client of the program with such a configuration."""
    path, config = write_config(folder, *ingress_ports)
    address = f"http://127.0.0.1:{config.frontend_port}"
    with started([str(PROGRAM)], path, config), httpx.Client(base_url=address, timeout=60) as client:
        yield client


@contextmanager
def started(program: list[str], path: Path, config: HAProxyConfig) -> Iterator[None]:
    """Let it run as Ray does."""
    process = subprocess.Popen(
        [*program, "-db", "-f", str(path), "-dR"], preexec_fn=partial(end_with_parent, signal.SIGKILL)
    )
    try:
        wait_until(lambda: listens(config.frontend_port) or process.poll() is not None, "HAProxy")
        assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    try:
        with closing(create_connection(("127.0.0.1", port))):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def ingress() -> Iterator[int]:
    """The port of one."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Ingress) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def through(ingress: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of HAProxy before that ingress."""
    with proxy(tmp_path_factory.mktemp("haproxy"), ingress) as client:
        yield client


@pytest.mark.parametrize("status", [200, 404, 500, 502, 503, 504])
def test_what_an_ingress_says_stays_as_it_is(through: httpx.Client, status: int) -> None:
    answer = through.get(f"/{status}", headers={"X-Request-ID": "abc-1"})
    assert (answer.status_code, answer.text) == (status, "said")
    assert answer.headers.get_list("x-request-id") == ["abc-1"]


def test_its_own_paths_are_the_ingresss_but_for_health(through: httpx.Client) -> None:
    assert through.get("/-/routes").text == "said"
    assert through.get("/-/healthz").text == "success"


def check_unavailable(client: httpx.Client, path: str) -> None:
    answer = client.get(path, headers={"X-Request-ID": "abc-1"})
    found = problem(answer, 503)
    assert (found["code"], found["request_id"], answer.headers["x-request-id"]) == ("unavailable", "abc-1", "abc-1")
    assert answer.headers["retry-after"] == "1"
    assert found["error"] == found["detail"]
    for unfit in UNFIT:
        answer = client.get(path, headers={"X-Request-ID": unfit})
        assert problem(answer, 503)["request_id"] == answer.headers["x-request-id"] != unfit
        assert len(answer.headers["x-request-id"]) == 36


def test_an_ingress_that_dies_over_an_answer_may_be_asked_again(through: httpx.Client) -> None:
    assert through.get("/200").status_code == 200
    check_unavailable(through, "/dies")


def test_so_may_one_that_is_not_there(tmp_path: Path) -> None:
    with proxy(tmp_path, free_port()) as client:
        check_unavailable(client, "/200")


def test_so_may_an_application_that_is_not_there(tmp_path: Path) -> None:
    with proxy(tmp_path) as client:
        check_unavailable(client, "/200")


def test_what_anybody_may_read_or_command_is_where_the_endpoint_is(tmp_path: Path) -> None:
    path, config = write_config(tmp_path, 1)
    text = haproxy.edited(path.read_text(), "problem")
    for port in (config.stats_port, config.metrics_port):
        assert f"bind 127.0.0.1:{port}\n" in text
    assert "mode 600 level admin" in text
    public = haproxy.edited(path.read_text().replace(f"bind 127.0.0.1:{config.frontend_port}", "bind *:80"), "problem")
    assert f"bind *:{config.stats_port}\n" in public


def test_a_configuration_that_is_none_stays_as_it_is() -> None:
    assert haproxy.edited("global\n", "problem") == "global\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"GET /200 HTTP/1.1\r\nHost: here\r\n", b"HTTP/1.1 408 "),
        # answered without its body:
        (b"GET /200 HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 200 "),
    ],
)
def test_a_connection_on_which_nothing_comes_ends(sent: bytes, status: bytes, ingress: int, tmp_path: Path) -> None:
    path, config = write_config(tmp_path, ingress)
    program = "from raycap.serve import haproxy; haproxy.HEADERS_S = haproxy.IDLE_S = 0.5; haproxy.main()"
    with started([sys.executable, "-c", program], path, config):
        with create_connection(("127.0.0.1", config.frontend_port), timeout=60) as connection:
            connection.sendall(sent)
            answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert answer[: len(b"HTTP/1.1 408 ")] == status


def test_it_ends_with_who_started_it(tmp_path: Path, ingress: int) -> None:
    path, config = write_config(tmp_path, ingress)
    parent = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); sys.stdin.read()",
            *(str(PROGRAM), "-db", "-f", str(path), "-dR"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(end_with_parent, signal.SIGKILL),
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_until(lambda: listens(config.frontend_port), "HAProxy")
        assert str(path) in process_title(pid)  # by which Ray knows it
        parent.kill()
    wait_until(lambda: not (process_title(pid) or listens(config.frontend_port)), "its end")


def test_where_it_is_not_installed_there_is_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(haproxy.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert haproxy.program() is None
    (tmp_path / haproxy.PROGRAM).touch(mode=0o755)
    assert haproxy.program() == tmp_path / haproxy.PROGRAM
    monkeypatch.setattr(haproxy, "find_spec", lambda _: None)
    assert haproxy.program() is None


def test_endpoints_on_one_machine_have_ports_of_their_own() -> None:
    first, second = haproxy.own_environment(), haproxy.own_environment()
    ports = [value for name, value in first.items() if name.endswith("_PORT")]
    assert len(set(ports)) == 3
    assert first.keys() == second.keys()
