"""A network of its own for machines that are none: network namespaces on one switch, each with its own address.

    with virtual_network() as network:      None where this machine does not let us
        port = network.add_port()           a machine: run things on it by `port.enter`
        port.cut(); port.heal()

Every namespace lives as long as a process that does nothing, which Linux ends with this one; with it go bridge and
cables. Nothing of the machine's own network changes, but for one interface.
"""

from __future__ import annotations

import logging
import secrets
import signal
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from socket import SHUT_WR, create_connection, socket
from typing import Any

from tests.commands import end_with_parent, wait_until

log = logging.getLogger(__name__)

INTERFACE = "eth0"
"""What each machine calls its own."""


class Port:
    """One machine on the switch."""

    def __init__(self, address: str, switch: str, cable: str, inside: str) -> None:
        self.address = address
        self.enter = ("nsenter", f"--net={inside}")
        """What a command begins with to run there."""
        self._plug = (*_inside(switch), "ip", "link", "set", cable)

    def cut(self) -> None:
        """Pull the plug: packets vanish, and nobody is told."""
        _run(*self._plug, "down")

    def heal(self) -> None:
        """Put it back."""
        _run(*self._plug, "up")


class Network:
    """The switch. This process is on it too, at `host_address`."""

    def __init__(self, stack: ExitStack) -> None:
        """Raises OSError or CalledProcessError where this machine does not let us; `stack` ends what was begun."""
        # RFC 2544's addresses, which no real network uses; another part of them for another test at the same time.
        number = secrets.randbelow(512)
        self._prefix = f"198.{18 + number // 256}.{number % 256}"
        self.host_address = f"{self._prefix}.254"
        self._stack = stack
        self._num_ports = 0
        self._switch = self._namespace()
        host_end = f"raycap{secrets.token_hex(4)}"
        switch = (*_inside(self._switch), "ip")
        _run(*switch, "link", "add", "switch", "type", "bridge")
        _run(*switch, "link", "set", "switch", "up")
        _run("ip", "link", "add", host_end, "type", "veth", "peer", "name", "host", "netns", _pid(self._switch))
        _run("ip", "address", "add", f"{self.host_address}/24", "dev", host_end)
        _run("ip", "link", "set", host_end, "up")
        _run(*switch, "link", "set", "host", "master", "switch", "up")

    def add_port(self) -> Port:
        """A further machine."""
        self._num_ports += 1
        cable, address, inside = f"port{self._num_ports}", f"{self._prefix}.{self._num_ports}", self._namespace()
        there = (*_inside(inside), "ip")
        _run(*there, "link", "add", INTERFACE, "type", "veth", "peer", "name", cable, "netns", _pid(self._switch))
        _run(*there, "address", "add", f"{address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _run(*there, "link", "set", interface, "up")
        # Nothing goes that way, but it is by such a route that programs find their own address.
        _run(*there, "route", "add", "default", "via", self.host_address)
        _run(*_inside(self._switch), "ip", "link", "set", cable, "master", "switch", "up")
        return Port(address, self._switch, cable, inside)

    @contextmanager
    def relay(self, port: int) -> Iterator[int]:
        """A port at `host_address` that leads to a port of 127.0.0.1."""
        with _Relay((self.host_address, 0), partial(_pass_on, ("127.0.0.1", port))) as server:
            threading.Thread(target=server.serve_forever, name="relay", daemon=True).start()
            yield server.server_address[1]
            server.shutdown()

    def _namespace(self) -> str:
        """The path of a new one."""
        holder = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=partial(end_with_parent, signal.SIGKILL),
        )
        self._stack.callback(_end, holder)
        path, ours = Path(f"/proc/{holder.pid}/ns/net"), Path("/proc/self/ns/net").readlink()
        wait_until(lambda: holder.poll() is not None or path.readlink() != ours, "a network namespace")
        if holder.poll() is not None:
            raise OSError("unshare ended with an error")
        return str(path)


@contextmanager
def virtual_network() -> Iterator[Network | None]:
    """A network; None where this machine does not let us make one, which takes root, and `ip` and its like."""
    with ExitStack() as stack:
        network = None
        try:
            network = Network(stack)
            network.add_port()  # what it takes is known when one is there
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning("no network namespaces here: %s", error)
        yield network


class _Relay(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False


def _pass_on(target: tuple[str, int], client: socket, address: Any, server: Any) -> None:
    with suppress(OSError), create_connection(target) as upstream:
        back = threading.Thread(target=_copy, args=(upstream, client), daemon=True)
        back.start()
        _copy(client, upstream)
        back.join()


def _copy(source: socket, sink: socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(SHUT_WR)


def _inside(namespace: str) -> tuple[str, str]:
    return ("nsenter", f"--net={namespace}")


def _pid(namespace: str) -> str:
    return namespace.split("/")[2]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
