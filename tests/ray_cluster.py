"""A Ray cluster of several nodes on this machine, each with processes of its own that can be killed and come back.

The cluster asks for a token, as `ray start` has it by default; nobody's ~/.ray is read or written.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from tests.commands import clean_environment, end_with_parent, marked_processes, process_title, wait_until

OBJECT_STORE_BYTES = 256 * 2**20
_ADDRESS = "127.0.0.1"


class Node:
    """One `ray start` with all its processes."""

    def __init__(self, *arguments: str, num_cpus: int, env: dict[str, str], log: Path) -> None:
        self.mark = f"RAYCAP_TEST_NODE={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        ray = Path(sysconfig.get_path("scripts")) / "ray"
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    *(str(ray), "start", "--block", f"--num-cpus={num_cpus}", f"--node-ip-address={_ADDRESS}"),
                    *("--num-gpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"),
                    *arguments,
                ],
                env=env | {name: value, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(end_with_parent, signal.SIGTERM),  # at which it ends what it started
            )

    def is_up(self) -> bool:
        """Whether it is part of the cluster by now."""
        said = self._log.read_text()
        assert self._process.poll() is None, said
        return "Ray runtime started" in said

    def processes(self) -> dict[int, str]:
        """Process id -> title of everything that runs on this node."""
        return {pid: process_title(pid) for pid in marked_processes(self.mark)}

    def raylet(self) -> int | None:
        """Its raylet's process id."""
        titles = self.processes().items()
        return next((pid for pid, title in titles if title.split(" ")[0].endswith("/raylet")), None)

    def end(self) -> None:
        """Kill all of it."""
        self._process.kill()
        self._process.wait()
        while pids := marked_processes(self.mark):  # one may start another meanwhile
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class RayCluster:
    """A head and any number of further nodes; a context manager."""

    def __init__(self, *, head_cpus: int, env: dict[str, str] | None = None) -> None:
        """`env`: further environment of all nodes; S3 keys, for instance, which a driver does not hand on."""
        self._head_cpus = head_cpus
        self._folder = tempfile.mkdtemp(prefix="raycap-ray-")  # short: Ray makes sockets below it
        self._port, self._client_port = _free_ports(2)
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        """What a driver needs besides the address."""
        self.address = f"{_ADDRESS}:{self._port}"
        self.nodes: list[Node] = []
        self._node_env = clean_environment() | self.env | (env or {})

    def __enter__(self) -> RayCluster:
        ports = (f"--port={self._port}", f"--ray-client-server-port={self._client_port}")
        try:
            self._start(
                *("--head", *ports, "--include-dashboard=false", f"--temp-dir={self._folder}"),
                num_cpus=self._head_cpus,
            )
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Kill all nodes."""
        for node in reversed(self.nodes):
            node.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_node(self, *, num_cpus: int) -> Node:
        """Start a further node; returns when it is part of the cluster."""
        return self._start(f"--address={self.address}", num_cpus=num_cpus)

    def processes(self) -> dict[int, str]:
        """Process id -> title on all nodes."""
        return {pid: title for node in self.nodes for pid, title in node.processes().items()}

    def _start(self, *arguments: str, num_cpus: int) -> Node:
        log = Path(self._folder) / f"node-{len(self.nodes)}.log"
        node = Node(*arguments, num_cpus=num_cpus, env=self._node_env, log=log)
        self.nodes.append(node)
        wait_until(node.is_up, "the start of a Ray node", every_s=0.1)
        return node


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((_ADDRESS, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
