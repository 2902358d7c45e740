"""What the three jobs share on Ray: connecting to it, hearing from workers, and finding the real cause of a failure."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycap.errors import ConfigurationError, RaycapError

log = logging.getLogger(__name__)


def connect(address: str | None = None) -> None:
    """Connect to the cluster at `address` or RAY_ADDRESS; without either, start Ray on this machine.

    Does nothing if connected.
    Workers' own output stays in Ray's log files: what a user should read comes through a `Mailbox`.
    Raises ConfigurationError if no cluster answers at the address.
    """
    if ray.is_initialized():
        return
    address = cluster_address(address)
    with _own_sigterm_handler():
        _connect(address)


def cluster_address(address: str | None = None) -> str | None:
    """Where `connect` finds a cluster with this `address`; None if it starts Ray on this machine."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM, which ends the process by SIGABRT, in the place of the command's."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _connect(address: str | None) -> None:
    # Ray's own future default; unset, it warns in every process.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        log.info("starting Ray on this machine")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises no class of its own
            reason = " ".join(str(error).split())
            raise RaycapError(
                f"Ray did not start on this machine: {reason}; if it was only busy, run the same command again"
            ) from error
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ray.exceptions.AuthenticationError as error:
        raise ConfigurationError(
            f"the Ray cluster at {address!r} wants a token: set RAY_AUTH_MODE=token, with the token of its "
            "~/.ray/auth_token"
        ) from error
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"no Ray cluster answers at {address!r}: {reason}; check --ray-address or RAY_ADDRESS, "
            "or leave both out to run on this machine"
        ) from error
    log.info("connected to the Ray cluster at %s", address)


@ray.remote(num_cpus=0)
class Mailbox:
    """Messages from workers to the driver. Losing it loses progress lines, nothing else."""

    def __init__(self) -> None:
        self._messages: list[Any] = []

    def post(self, message: Any) -> None:
        """Leave a message; workers do not wait for it to be read."""
        self._messages.append(message)

    def drain(self) -> list[Any]:
        """All messages since the last call."""
        messages, self._messages = self._messages, []
        return messages


@contextmanager
def mailbox(handle: Callable[[Any], None], *, every_s: float = 0.5) -> Iterator[Any]:
    """A `Mailbox` whose messages go to `handle`, in a thread of the driver, until the block ends; the last ones too."""
    # Beside the driver: another node may go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    box = Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    def deliver() -> None:
        for message in ray.get(box.drain.remote()):
            handle(message)

    def poll() -> None:
        try:
            while not stop.wait(every_s):
                deliver()
        except ray.exceptions.RayError as error:
            log.warning("no more progress lines: %s", error)

    thread = threading.Thread(target=poll, name="raycap-mailbox", daemon=True)
    thread.start()
    try:
        yield box
    finally:
        stop.set()
        thread.join()
        try:
            deliver()
            ray.kill(box)
        except ray.exceptions.RayError:
            pass


def raycap_cause(error: BaseException) -> RaycapError | None:
    """The error of ours that a worker raised, from whatever Ray wrapped it in; None if it was not one of ours."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        cause = getattr(current, "cause", None)
        if isinstance(current, RaycapError) and not isinstance(cause, RaycapError):
            return current
        pending += [current.__cause__, current.__context__, cause if isinstance(cause, BaseException) else None]
        pending += getattr(current, "worker_failures", {}).values()
    return None
