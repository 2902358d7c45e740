"""A Ray cluster of several nodes on this machine, each with processes of its own that can be killed and come back.

On a `Network`, each has an address of its own and can be cut off; otherwise all are at 127.0.0.1. The cluster asks for
a token, as `ray start` has it by default; nobody's ~/.ray is read or written.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

from tests.commands import (
    clean_environment,
    end_with_parent,
    free_port,
    free_ports,
    marked_processes,
    process_title,
    wait_until,
)
from tests.network import INTERFACE, Network, Port

OBJECT_STORE_BYTES = 256 * 2**20
_ADDRESS = "127.0.0.1"


class Node:
    """One `ray start` with all its processes."""

    def __init__(
        self, *arguments: str, num_cpus: int, num_gpus: int, port: Port | None, env: dict[str, str], log: Path
    ) -> None:
        self.num_cpus, self.num_gpus, self.port = num_cpus, num_gpus, port
        self.address = port.address if port else _ADDRESS
        self.mark = f"RAYCAP_TEST_NODE={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        ray = Path(sysconfig.get_path("scripts")) / "ray"
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    *(port.enter if port else ()),
                    *(str(ray), "start", "--block", f"--num-cpus={num_cpus}", f"--node-ip-address={self.address}"),
                    *(f"--num-gpus={num_gpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"),
                    "--disable-usage-stats",
                    *arguments,
                ],
                # Nodes share this machine's host name; Gloo would take what it stands for as the address of each.
                env=env | {name: value, "OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": INTERFACE} if port else {}),
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

    def node_id(self) -> str:
        """What Ray calls it."""
        titles = self.processes().values()
        found = (re.search(r"/raylet .*--node_id=([0-9a-f]+)", title) for title in titles)
        return next(match[1] for match in found if match)

    def has_ended(self) -> bool:
        """Whether it is down, be it that Ray took it out of the cluster."""
        return self._process.poll() is not None

    def crash(self) -> None:
        """Kill its raylet as the kernel does, and when its workers have ended by that, the rest."""
        raylet = self.raylet()
        assert raylet is not None
        os.kill(raylet, signal.SIGKILL)
        wait_until(lambda: not any(title.startswith("ray::") for title in self.processes().values()), "its workers")
        self.end()

    def cut(self) -> None:
        """Nothing comes from it and nothing reaches it; where there is no network to cut, it stands still."""
        if self.port:
            self.port.cut()
        else:
            self._signal(signal.SIGSTOP)

    def heal(self) -> None:
        """Undo `cut`."""
        if self.port:
            self.port.heal()
        else:
            self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill all of it."""
        self._process.kill()
        self._process.wait()
        while pids := marked_processes(self.mark):  # one may start another meanwhile
            _send(signal.SIGKILL, pids)

    def _signal(self, number: signal.Signals) -> None:
        _send(number, marked_processes(self.mark))


class RayCluster:
    """A head and any number of further nodes; a context manager."""

    def __init__(
        self,
        *,
        head_cpus: int,
        env: dict[str, str] | None = None,
        network: Network | None = None,
        with_dashboard: bool = False,
    ) -> None:
        """`env`: further environment of all nodes; S3 keys, for instance, which a driver does not hand on. The
        dashboard takes jobs and Serve's config files."""
        self._head_cpus = head_cpus
        self._network = network
        self._with_dashboard = with_dashboard
        self._folder = tempfile.mkdtemp(prefix="raycap-ray-")  # short: Ray makes sockets below it
        self._port, self._client_port, self._dashboard_port = free_ports(3)
        self._head_at = network.add_port() if network else None
        head = self._head_at.address if self._head_at else _ADDRESS
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        """What a driver needs besides the address."""
        self.address = f"{head}:{self._port}"
        self.dashboard = f"http://{head}:{self._dashboard_port}"
        self.nodes: list[Node] = []
        self._node_env = clean_environment() | self.env | (env or {})

    def __enter__(self) -> RayCluster:
        ports = (f"--port={self._port}", f"--ray-client-server-port={self._client_port}")
        dashboard = (f"--include-dashboard={str(self._with_dashboard).lower()}",)
        if self._with_dashboard:
            host = self.dashboard.removeprefix("http://").split(":")[0]
            dashboard += (f"--dashboard-host={host}", f"--dashboard-port={self._dashboard_port}")
        try:
            self._start(
                *("--head", *ports, *dashboard, f"--temp-dir={self._folder}"),
                num_cpus=self._head_cpus,
                port=self._head_at,
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

    def add_node(self, *, num_cpus: int, num_gpus: int = 0) -> Node:
        """Start a further node, with as many GPUs as it shall say that it has; returns when it is part of the
        cluster."""
        port = self._network.add_port() if self._network else None
        return self._start(f"--address={self.address}", num_cpus=num_cpus, num_gpus=num_gpus, port=port)

    def bring_back(self, node: Node) -> Node:
        """Start another node at the address of one that has ended."""
        self.nodes.remove(node)
        return self._start(f"--address={self.address}", num_cpus=node.num_cpus, num_gpus=node.num_gpus, port=node.port)

    def processes(self) -> dict[int, str]:
        """Process id -> title on all nodes."""
        return {pid: title for node in self.nodes for pid, title in node.processes().items()}

    def logs(self) -> Path:
        """The folder of all that Ray and what ran on it wrote."""
        return Path(self._folder)

    def _start(self, *arguments: str, num_cpus: int, num_gpus: int = 0, port: Port | None) -> Node:
        log = Path(self._folder) / f"node-{len(self.nodes)}.log"
        agent = f"--dashboard-agent-listen-port={free_port()}"
        node = Node(*arguments, agent, num_cpus=num_cpus, num_gpus=num_gpus, port=port, env=self._node_env, log=log)
        self.nodes.append(node)
        wait_until(node.is_up, "the start of a Ray node", every_s=0.1)
        return node


@contextmanager
def cluster_of_cores(cores: Sequence[int]) -> Iterator[RayCluster]:
    """A node of one CPU for each of these cores, whose processes are kept to it. Drivers have all cores."""
    with ExitStack() as stack:
        cluster = RayCluster(head_cpus=1)
        with kept_to(cores[0]):
            stack.enter_context(cluster)
        for core in cores[1:]:
            with kept_to(core):
                cluster.add_node(num_cpus=1)
        yield cluster


@contextmanager
def kept_to(core: int) -> Iterator[None]:
    """What is started inside runs on this core, and so does all that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
