"""The settings of the endpoint. Plain data: no torch and no Ray here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from raycap.images import ImageLimits
from raycap.model.config import Engine, Precision, require
from raycap.serve.calls import Calls
from raycap.storage import S3Options

DEFAULT_MODEL = "default"
_NAMED = re.compile(r"([A-Za-z0-9._-]{1,64})=(.+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Caption images online, over HTTP. Ctrl-C or SIGTERM answers what has come in, and ends."""

    model: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]BUNDLE ...")] = ()
    """Bundles, local or s3://, each under a name by which requests choose it; the first is what they get otherwise.
    A single one may go without a name. By default the one that ships with raycap."""
    canary: str | None = None
    """NAME=SHARE: this share of the requests that name no model goes to NAME, one of --model, instead of the first;
    new=0.05, for instance. The request's id decides: the same X-Request-ID gets the same model."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine's."""
    port: int = 8000
    """TCP port."""

    num_replicas: int = 1
    """Processes that caption, for each model."""
    max_replicas: int | None = None
    """Let their number grow up to this, one for each two batches of images in work, where the cluster, which may itself
    grow, has room."""
    gpus_per_replica: float | None = None
    """GPUs of each replica, fractions allowed; by default 1 if the cluster has GPUs, else 0."""
    cpus_per_replica: int | None = None
    """Threads of each replica that has no GPU; by default those of the largest node, shared among the replicas."""
    num_ingress: int = 1
    """Processes that take requests and decode images. The limits of queue and rate are each one's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to caption. auto: on GPUs if the cluster has any."""
    precision: Precision = "auto"
    """Of the model's arithmetic. auto: float32 on a CPU, bfloat16 on a GPU that has it."""
    engine: Engine = "auto"
    """What runs the encoder. auto: ONNX Runtime in float32 on a CPU, if it is installed, else PyTorch."""
    batch_size: int = 16
    """Most images that are captioned at a time."""
    batch_wait_ms: float = 0.0
    """How long an image waits for others to fill its batch, in milliseconds, where a replica could have it at once."""

    max_queue: int = 128
    """Images taken in and not yet answered; requests beyond that get 503 at once."""
    max_latency_s: float | None = None
    """Requests that would take longer once their body is there get 503 at once, by what requests of all models took of
    late; seconds. By default only --max-queue bounds what is taken in."""
    max_images: int = 16
    """Most images of one request."""
    max_body_mb: float = 20.0
    """Largest body of a request, in MB; larger ones get 413 before they are read."""
    max_pixels: int = 50_000_000
    """Images of more pixels are not decoded. Decoding takes 4 bytes of memory a pixel, 13 with transparency."""
    deadline_s: float = 30.0
    """A request that takes longer gets 503, and its images are captioned no more; seconds."""
    drain_s: float = 5.0
    """After SIGTERM requests are answered for so long as before while readiness says 503, so that load balancers turn
    away before any is refused; seconds. Ctrl-C refuses at once."""
    keys_file: str | None = None
    """File of API keys, a line of NAME KEY for each; it is read again when it changes. By default no key is asked
    for."""
    rate_limit: float | None = None
    """Requests a second of each API key, with bursts of up to 2 seconds' worth; beyond that they get 429."""
    allow_urls: tuple[str, ...] = ()
    """Hosts that images may be fetched from over https: a name, `*.example.org` for all below it, or `*`; by default
    requests with addresses are refused."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call from a browser, such as https://example.org; by default none."""
    ray_address: str | None = None
    """Ray cluster to run on; by default RAY_ADDRESS, else Ray starts on this machine."""
    s3: Annotated[S3Options, tyro.conf.OmitArgPrefixes] = field(default_factory=S3Options)

    def __post_init__(self) -> None:
        for name in ("cpus_per_replica", "num_replicas", "num_ingress", "batch_size", "max_images", "max_pixels"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{_flag(name)} must be at least 1, got {value}")
        for name in ("max_body_mb", "max_latency_s", "deadline_s", "rate_limit"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{_flag(name)} must be above 0, got {value}")
        for origin in self.cors_origins:
            require(
                origin == "*" or re.fullmatch(r"https?://[^/\s]+", origin) is not None,
                f"--cors-origins: expected origins such as https://example.org, got {origin}",
            )
        require(1 <= self.port <= 65535, f"--port must be from 1 to 65535, got {self.port}")
        for name in ("batch_wait_ms", "drain_s"):
            value = getattr(self, name)
            require(value >= 0, f"{_flag(name)} must not be negative, got {value:g}")
        require(
            self.max_queue >= max(self.max_images, self.batch_size),
            f"--max-queue must hold a request of --max-images and a batch, got {self.max_queue}",
        )
        require(
            self.max_replicas is None or self.max_replicas >= self.num_replicas,
            f"--max-replicas must be at least --num-replicas, got {self.max_replicas}",
        )
        require(
            self.max_latency_s is None or self.max_latency_s <= self.deadline_s,
            f"--max-latency-s must be at most --deadline-s, {self.deadline_s:g}, got {self.max_latency_s}",
        )
        # Ray starts replicas by the calls that are out: with a shorter queue, the last ones never.
        wanted = self.calls.max_running * self.batch_size
        require(
            self.max_replicas in (None, self.num_replicas) or self.max_queue >= wanted,
            f"--max-replicas {self.max_replicas} is for {self.calls.max_running} batches in work of each ingress; "
            f"--max-queue must be at least {wanted}, got {self.max_queue}",
        )
        gpus = self.gpus_per_replica or 0
        require(gpus >= 0, f"--gpus-per-replica must not be negative, got {gpus:g}")
        require(gpus <= 1 or gpus == int(gpus), f"--gpus-per-replica above 1 must be a whole number, got {gpus:g}")
        require(
            self.rate_limit is None or self.keys_file is not None,
            "--rate-limit is for each API key: give --keys-file too",
        )
        names = [_split(text)[0] for text in self.model]
        require(len(set(names)) == len(names), f"--model: expected each name once, got {', '.join(names)}")
        if self.canary is not None:
            name, share = _split_share(self.canary)
            require(
                0 < share <= 1, f"--canary: expected NAME=SHARE with a share above 0 and up to 1, got {self.canary}"
            )
            require(name in names[1:], f"--canary: expected a name that --model gives after the first, got {name!r}")

    @property
    def bundles(self) -> dict[str, str | None]:
        """Location of each model by its name, the default one first; None is the bundle that ships with raycap."""
        return dict(map(_split, self.model)) or {DEFAULT_MODEL: None}

    @property
    def canary_share(self) -> tuple[str, float] | None:
        """The canary's name, and its share of the requests that name no model."""
        return None if self.canary is None else _split_share(self.canary)

    @property
    def calls(self) -> Calls:
        """How the ingresses ask the replicas of a model."""
        return Calls(
            num_ingress=self.num_ingress,
            num_replicas=self.num_replicas,
            max_replicas=self.max_replicas or self.num_replicas,
        )

    @property
    def limits(self) -> ImageLimits:
        """What one image may cost."""
        return ImageLimits(max_bytes=self.max_body_bytes, max_pixels=self.max_pixels)

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mb` in bytes."""
        return int(self.max_body_mb * 1e6)


def _split(text: str) -> tuple[str, str]:
    named = _NAMED.fullmatch(text)
    return (named[1], named[2]) if named else (DEFAULT_MODEL, text)


def _split_share(text: str) -> tuple[str, float]:
    """The name and its share; one that is no number is NaN, which no check lets through."""
    name, _, share = text.rpartition("=")
    try:
        return name, float(share)
    except ValueError:
        return name, math.nan


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
