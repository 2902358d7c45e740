"""`raycap` as a process of its own, with all the processes that it starts in sight."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEADLINE_S = 300
HURRY = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
"""Environment with which Ray Train looks at its workers, and takes what they report, more often than every 2 s."""


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that says how to reach S3 or Ray."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_"))}


class Command:
    """`python -m raycap ...` in its own session. All processes that it starts carry a mark, so none goes unseen."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.mark = f"RAYCAP_TEST_COMMAND={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "raycap", *arguments],
            cwd=ROOT,
            env=clean_environment() | {name: value, "OMP_NUM_THREADS": "1"} | HURRY | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_prepare,
        )

    def finish(self, deadline_s: float = DEADLINE_S) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        out, err = self.process.communicate(timeout=deadline_s)
        return self.process.returncode, out, err

    def has_ended(self) -> bool:
        """Whether the command itself has ended."""
        return self.process.poll() is not None

    def others(self) -> list[int]:
        """Process ids of what it started and what still runs."""
        return [pid for pid in marked_processes(self.mark) if pid != self.process.pid]

    def end(self) -> None:
        """Kill it and everything that it started; say what nobody has read, which pytest shows when a test fails."""
        for pid in (self.process.pid, *self.others()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.stdout and not self.process.stdout.closed:
            sys.stdout.write("\n".join(self.process.communicate()))


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C, and so would their children
    end_with_parent(signal.SIGKILL)


@contextmanager
def starting_commands() -> Iterator[Callable[..., Command]]:
    """Gives what starts commands; whatever they leave behind ends with the block."""
    commands: list[Command] = []

    def start(*arguments: str, env: dict[str, str] | None = None) -> Command:
        commands.append(Command(*arguments, env=env))
        return commands[-1]

    try:
        yield start
    finally:
        for command in commands:
            command.end()


def marked_processes(mark: str) -> list[int]:
    """Ids of the running processes with `mark` (NAME=value) in the environment that they were started with."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def process_title(pid: int) -> str:
    """Its command line, or what it calls itself (Ray's workers: `ray::` and what they run); "" if it has ended."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def end_with_parent(signal_number: int) -> None:
    """In a child before it runs: have Linux send it this signal when the parent dies and cannot clean up."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal_number)


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nothing has at the moment."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def free_port() -> int:
    """One of them."""
    [port] = free_ports(1)
    return port


def wait_until(
    condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S, *, every_s: float = 0.02
) -> None:
    """Return when `condition()` holds, which is looked at every so often; fail after the deadline."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s} s: {what}"
        time.sleep(every_s)


def check_one_line(err: str, message: str) -> None:
    """`err` is one error line of raycap's and nothing else."""
    assert err.startswith("raycap: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert message in err
