"""Images by their address, fetched without becoming a door into the server's own network (server-side request forgery).

Only https, only hosts on a list, only public addresses. A host is looked up once for each connection, and the address
that was checked is the one that is dialled, so a name whose answer changes gains nothing; redirects pass the same
checks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpcore2 as httpcore
import httpx2 as httpx

import raycap
from raycap.errors import ConfigurationError
from raycap.serve.problems import ProblemError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]
"""Gives the addresses of a host."""

TIMEOUT_S = 10.0
MAX_REDIRECTS = 3
RESOLVING_THREADS = 64
_REDIRECTS = (301, 302, 303, 307, 308)
_PATTERN = re.compile(r"\*|(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are the IPv4 address that is meant


class UrlFetcher:
    """Gives the bytes behind addresses. Use it as the `fetch` of `create_app`."""

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        max_bytes: int,
        timeout_s: float = TIMEOUT_S,
        resolve: Resolve | None = None,
        network: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """
        Args:
            hosts: those that may be asked: a name, `*.example.org` for all below example.org, or `*` for any.
            max_bytes: of the images of one request together.
            timeout_s: for one image, redirects included.
            resolve, network, ssl_context: by default the system's.

        Raises ConfigurationError for what is not a host's name.
        """
        self._hosts = [host.lower().removesuffix(".") for host in hosts]
        for host in self._hosts:
            if not _PATTERN.fullmatch(host):
                raise ConfigurationError(
                    f"--allow-urls: expected names of hosts such as images.example.org or *.example.org, got {host!r}"
                )
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=None,  # slow hosts must not hold up the others; the server's room bounds their number
            max_keepalive_connections=0,  # each image's host is looked up and checked anew
            network_backend=_PublicNetwork(resolve or _Resolver(), network or httpcore.AnyIOBackend()),
        )

    async def __call__(self, urls: Sequence[str]) -> list[bytes]:
        """The images of one request. Raises ProblemError if one of them may not or cannot be had."""
        budget = _Budget(self._max_bytes)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._fetch(url, budget)) for url in urls]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _fetch(self, url: str, budget: _Budget) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(url, budget)
        except TimeoutError as error:
            raise _failed(f"it took longer than {self._timeout_s:g} s") from error
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            raise _failed("its server did not answer as it should") from error

    async def _follow(self, url: str, budget: _Budget) -> bytes:
        """The body, after redirects."""
        asked = self._checked(url)
        for _ in range(MAX_REDIRECTS + 1):
            async with self._pool.stream("GET", _target(asked), headers=_headers(asked)) as response:
                if response.status not in _REDIRECTS:
                    return await _body(response, budget)
                location = dict(response.headers).get(b"location", dict(response.headers).get(b"Location", b""))
            try:
                asked = self._checked(str(asked.join(location.decode("ascii"))))
            except (httpx.InvalidURL, UnicodeDecodeError) as error:
                raise _failed("its server redirects to no address") from error
        raise _failed(f"it redirects more than {MAX_REDIRECTS} times")

    def _checked(self, url: str) -> httpx.URL:
        """The address, if it may be asked. What is checked here is what is dialled: both read the same parts."""
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ProblemError(422, "invalid_url", "expected an address such as https://example.org/dog.jpg") from error
        host = parsed.raw_host.decode("ascii").lower().removesuffix(".")
        if (
            parsed.scheme != "https"
            or parsed.port not in (None, 443)
            or parsed.userinfo
            or not _HOST.fullmatch(host)
            or not any(_matches(host, pattern) for pattern in self._hosts)
        ):
            raise _refused()
        return parsed.copy_with(host=host)


class _Budget:
    """The bytes that may yet come."""

    def __init__(self, num_bytes: int) -> None:
        self._limit = self._left = num_bytes

    def take(self, num_bytes: int) -> None:
        """Raises ProblemError when there are no more."""
        self._left -= num_bytes
        if self._left < 0:
            raise ProblemError(413, "too_large", f"the images at those addresses have more than {self._limit:,} bytes")


async def _body(response: httpcore.Response, budget: _Budget) -> bytes:
    if response.status != 200:
        raise _failed(f"its server answered {response.status}")
    body = bytearray()
    async for chunk in response.aiter_stream():
        budget.take(len(chunk))
        body += chunk
    return bytes(body)


class _PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to hosts all of whose addresses are public."""

    def __init__(self, resolve: Resolve, network: httpcore.AsyncNetworkBackend) -> None:
        self._resolve, self._network = resolve, network

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host.strip("[]"), port)
        except (OSError, UnicodeError) as error:  # IDNA refuses empty labels and those of more than 63 letters
            raise _failed("its host is not known") from error
        if not addresses or not all(map(is_public, addresses)):
            raise _refused()
        *others, last = addresses
        for address in others:
            try:
                return await self._network.connect_tcp(str(address), port, *args, **kwargs)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._network.connect_tcp(str(last), port, *args, **kwargs)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, also as IPv6 that stands for IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        meant = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            meant = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if meant is not None:
            return is_public(meant)
        if address.is_site_local:  # RFC 3879: deprecated, and still routed inside of sites
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


class _Resolver:
    """The system's, in threads of its own: names whose servers do not answer keep them busy for long."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVING_THREADS, "raycap-resolve")

    async def __call__(self, host: str, port: int) -> list[Address]:
        resolve = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, resolve)
        return [ipaddress.ip_address(address[0]) for *_, address in found]


def _matches(host: str, pattern: str) -> bool:
    return pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _target(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=b"https", host=url.raw_host, port=443, target=url.raw_path)


def _headers(url: httpx.URL) -> list[tuple[bytes, bytes]]:
    return [
        (b"Host", url.raw_host),
        (b"Accept", b"image/*"),
        (b"Accept-Encoding", b"identity"),  # a small answer must not become a large one
        (b"User-Agent", f"raycap/{raycap.__version__}".encode()),
    ]


def _refused() -> ProblemError:
    """One answer for all that is not allowed: it tells nothing of the network behind the server."""
    return ProblemError(403, "url_not_allowed", "images are not fetched from that address; send the image itself")


def _failed(reason: str) -> ProblemError:
    return ProblemError(422, "url_failed", f"the image could not be fetched: {reason}")
