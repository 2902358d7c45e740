"""What each process of the endpoint gets of the cluster, and whether it may listen. Ray is not imported."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from raycap.errors import ConfigurationError
from raycap.serve.config import ServeConfig

INGRESS_CPUS = 0.25
"""CPUs that Ray reserves for an ingress: decoding takes about a tenth of a core for each core that captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Of one replica of a model."""

    gpus: float
    cpus: float
    num_threads: int


def plan_resources(config: ServeConfig, nodes: Sequence[dict[str, float]]) -> Resources:
    """What a replica gets; `nodes` are the resources of each node that there is now.

    Raises ConfigurationError if a GPU is needed and none was asked for.
    """
    gpus = config.gpus_per_replica
    if gpus is None:
        gpus = 1.0 if config.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    if not gpus and (config.device == "cuda" or config.precision == "float16"):
        asked = "--device cuda" if config.device == "cuda" else "--precision float16"
        if not any(node.get("GPU", 0) for node in nodes):
            raise ConfigurationError(f"{asked} needs GPUs, but Ray knows of none here")
        raise ConfigurationError(f"{asked} needs GPUs, but the replicas get none; give --gpus-per-replica")
    cores = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    if gpus:
        return Resources(gpus=gpus, cpus=min(1.0, cores / 4), num_threads=1)
    threads = config.cpus_per_replica or max(1, cores // (config.num_replicas * len(config.bundles)))
    return Resources(gpus=0.0, cpus=(1 - INGRESS_CPUS) * threads, num_threads=threads)


def check_room(config: ServeConfig, resources: Resources, nodes: Sequence[dict[str, float]]) -> None:
    """Raise ConfigurationError if the cluster has no room for all processes: Ray would wait for it without an end."""
    num_replicas = config.num_replicas * len(config.bundles)
    for name, wanted in (
        ("CPU", num_replicas * resources.cpus + config.num_ingress * INGRESS_CPUS),
        ("GPU", num_replicas * resources.gpus),
    ):
        there = sum(node.get(name, 0) for node in nodes)
        if wanted > there:
            raise ConfigurationError(
                f"{num_replicas} replicas with {resources.num_threads} threads and {resources.gpus:g} GPUs each need "
                f"{wanted:g} {name}s, but the cluster has {there:g}; lower --num-replicas, --cpus-per-replica or "
                "--gpus-per-replica"
            )


def check_address(host: str, port: int) -> None:
    """Raise ConfigurationError if nobody could listen there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except socket.gaierror as error:
        raise ConfigurationError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"--port {port}: another program listens there; end it, or give another one"
            ) from error
        raise ConfigurationError(f"nobody can listen at --host {host}, --port {port}: {error.strerror}") from error
