"""Fetching by address: what is refused, and that what was checked is what is dialled. A real TLS server answers; the
look-up and the dialling are seams."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpcore2 as httpcore
import pytest
import trustme

from raycap.errors import ConfigurationError
from raycap.serve.problems import ProblemError
from raycap.serve.urls import Address, UrlFetcher, is_public

PUBLIC, ALSO_PUBLIC = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
IMAGE = bytes(range(256)) * 40
PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.8", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1",
    "169.254.169.254", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::127.0.0.1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2001:0:0:0:0:0:80ff:fffe",
    "fec0::1", "feff::1",
]  # fmt: skip


class Network(httpcore.AsyncNetworkBackend):
    """Every address leads to the local server; keeps what was looked up and dialled."""

    def __init__(self, port: int, addresses: dict[str, list[Sequence[str]]]) -> None:
        self.port, self.addresses = port, addresses
        self.looked_up: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self.dead: set[str] = set()

    async def resolve(self, host: str, port: int) -> list[Address]:
        """The next answer for the host; the last one is given ever after."""
        self.looked_up.append(host)
        answers = self.addresses.get(host)
        if answers is None:
            raise OSError("no such host")
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [ipaddress.ip_address(address) for address in found]

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        self.dialled.append((host, port))
        if host in self.dead:
            raise httpcore.ConnectError("refused")
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port, *args, **kwargs)


AUTHORITY = trustme.CA()


@asynccontextmanager
async def server(
    answers: dict[str, bytes], *, names: tuple[str, ...] = ("images.example", "a.cdn.example", "b.a.cdn.example")
) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A TLS server that gives each path's raw answer, and the requests that it saw. Other paths hang."""
    requests: list[bytes] = []
    hanging = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            requests.append(request)
            raw = answers.get(request.split()[1].decode())
            if raw is None:
                await hanging.wait()
            else:
                writer.write(raw)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert(*names).configure_cert(context)
    listening = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    try:
        yield listening.sockets[0].getsockname()[1], requests
    finally:
        hanging.set()
        listening.close()
        await listening.wait_closed()


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def fetched(
    url: str,
    answers: dict[str, bytes],
    addresses: dict[str, list[Sequence[str]]] | None = None,
    *,
    hosts: Sequence[str] = ("images.example", "*.cdn.example"),
    dead: Sequence[str] = (),
    **settings: Any,
) -> tuple[bytes | ProblemError, Network, list[bytes]]:
    """What came, who was asked, and the requests that the server saw."""

    async def fetch() -> tuple[bytes | ProblemError, Network, list[bytes]]:
        async with server(answers) as (port, requests):
            network = Network(port, addresses or {"images.example": [[PUBLIC]], "a.cdn.example": [[PUBLIC]]})
            network.dead = set(dead)
            context = ssl.create_default_context()
            AUTHORITY.configure_trust(context)
            fetcher = UrlFetcher(
                hosts,
                **{"max_bytes": 2**20} | settings,
                resolve=network.resolve,
                network=network,
                ssl_context=context,
            )
            try:
                (body,) = await fetcher([url])
                return body, network, requests
            except ProblemError as problem:
                return problem, network, requests

    return asyncio.run(fetch())


def refused(answer: bytes | ProblemError, status: int, code: str) -> None:
    assert isinstance(answer, ProblemError), answer
    assert (answer.status, answer.code) == (status, code), answer.detail


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_not_dialled(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    for found in ([address], [PUBLIC, address], [address, PUBLIC]):
        answer, network, _ = fetched("https://images.example/", {"/": ok(IMAGE)}, {"images.example": [found]})
        refused(answer, 403, "url_not_allowed")
        assert network.dialled == []


@pytest.mark.parametrize("address", [PUBLIC, ALSO_PUBLIC, f"::ffff:{PUBLIC}", "64:ff9b::5db8:d70e", "8.8.8.8"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    answer, network, _ = fetched("https://images.example/a.jpg", {"/a.jpg": ok(IMAGE)}, {"images.example": [[address]]})
    assert answer == IMAGE
    assert [host for host, _ in network.dialled] == [str(ipaddress.ip_address(address))]


def test_a_name_is_looked_up_once_and_its_address_dialled() -> None:
    """The classic trick: the name is public when it is checked and private when it is dialled."""
    answer, network, requests = fetched(
        "https://images.example/dog.jpg?size=1",
        {"/dog.jpg?size=1": ok(IMAGE)},
        {"images.example": [[PUBLIC], ["127.0.0.1"]]},
    )
    assert answer == IMAGE
    assert network.looked_up == ["images.example"]
    assert network.dialled == [(PUBLIC, 443)]
    (request,) = requests
    assert b"Host: images.example\r\n" in request
    assert b"Accept-Encoding: identity\r\n" in request


def test_the_next_address_is_tried() -> None:
    answer, network, _ = fetched(
        "https://images.example/", {"/": ok(IMAGE)}, {"images.example": [[ALSO_PUBLIC, PUBLIC]]}, dead=[ALSO_PUBLIC]
    )
    assert answer == IMAGE
    assert [host for host, _ in network.dialled] == [ALSO_PUBLIC, PUBLIC]


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example/", "ftp://images.example/", "file:///etc/passwd", "//images.example/",
        "https://other.example/", "https://images.example.evil.example/", "https://evilimages.example/",
        "https://cdn.example/", "https://evilcdn.example/", "https://images.example:8443/", "https://images.example:22/",
        "https://user@images.example/", "https://user:pass@images.example/", "https://images.example@evil.example/",
        "https://images.example\\@evil.example/", "https://evil.example\\.cdn.example/", "https://127.0.0.1/",
        "https://2130706433/", "https://0x7f.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://localhost/",
        "https://evil.example#.cdn.example", "https://evil.example/.cdn.example", "https://evil.example?.cdn.example",
        "https:///images.example/", "data:image/png;base64,AAAA", "",
    ],
)  # fmt: skip
def test_other_addresses_are_not_even_looked_up(url: str) -> None:
    answer, network, requests = fetched(url, {"/": ok(IMAGE)})
    assert isinstance(answer, ProblemError)
    assert (answer.status, answer.code) in {(403, "url_not_allowed"), (422, "invalid_url")}
    assert (network.looked_up, network.dialled, requests) == ([], [], [])


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("https://a.cdn.example/", ["*.cdn.example"]),
        ("https://b.a.cdn.example/", ["*.CDN.example"]),
        ("https://IMAGES.example./", ["images.example"]),
        ("https://images.example:443/", ["images.example."]),
        ("https://images.example/", ["*"]),
    ],
)
def test_hosts_on_the_list_are_asked(url: str, hosts: list[str]) -> None:
    names = ("a.cdn.example", "b.a.cdn.example", "images.example", "images.example.")
    answer, _, _ = fetched(url, {"/": ok(IMAGE)}, {name: [[PUBLIC]] for name in names}, hosts=hosts)
    assert answer == IMAGE


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]", "metadata.example", "10.0.0.1"])
def test_any_host_is_still_a_public_one(address: str) -> None:
    addresses: dict[str, list[Sequence[str]]] = {
        "127.0.0.1": [["127.0.0.1"]], "::1": [["::1"]], "metadata.example": [["169.254.169.254"]],
        "10.0.0.1": [["10.0.0.1"]],
    }  # fmt: skip
    answer, network, _ = fetched(f"https://{address}/", {"/": ok(IMAGE)}, addresses, hosts=["*"])
    refused(answer, 403, "url_not_allowed")
    assert len(network.looked_up) == 1
    assert network.dialled == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_to_hosts_on_the_list(status: int) -> None:
    answers = {"/old": redirect("https://a.cdn.example/new", status), "/new": ok(IMAGE)}
    answer, network, _ = fetched("https://images.example/old", answers)
    assert answer == IMAGE
    assert network.looked_up == ["images.example", "a.cdn.example"]
    answer, _, _ = fetched("https://images.example/old", {"/old": redirect("/new", status), "/new": ok(IMAGE)})
    assert answer == IMAGE


@pytest.mark.parametrize(
    "location",
    ["http://images.example/", "https://evil.example/", "https://169.254.169.254/", "//evil.example/", "file:///etc"],
)
def test_redirects_lead_nowhere_else(location: str) -> None:
    answer, network, _ = fetched("https://images.example/", {"/": redirect(location)})
    refused(answer, 403, "url_not_allowed")
    assert network.looked_up == ["images.example"]


def test_a_redirect_to_a_name_with_a_private_address_is_refused() -> None:
    answer, network, _ = fetched(
        "https://images.example/",
        {"/": redirect("https://a.cdn.example/")},
        {"images.example": [[PUBLIC]], "a.cdn.example": [["127.0.0.1"]]},
    )
    refused(answer, 403, "url_not_allowed")
    assert network.dialled == [(PUBLIC, 443)]


FAILURES: dict[str, tuple[dict[str, bytes], int, str]] = {
    "round and round": ({"/": redirect("/")}, 422, "url_failed"),
    "redirect to nothing": ({"/": redirect("")[:-4] + b"\r\n\r\n"}, 422, "url_failed"),
    "not there": ({"/": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"}, 422, "url_failed"),
    "not HTTP": ({"/": b"SSH-2.0-OpenSSH_9.6\r\n\r\n"}, 422, "url_failed"),
    "cut short": ({"/": ok(IMAGE)[:-10]}, 422, "url_failed"),
    "no answer": ({}, 422, "url_failed"),
    "too large": ({"/": ok(IMAGE * 200)}, 413, "too_large"),
    "too large, of no stated length": ({"/": b"HTTP/1.1 200 OK\r\n\r\n" + IMAGE * 200}, 413, "too_large"),
}


@pytest.mark.parametrize(("answers", "status", "code"), FAILURES.values(), ids=FAILURES)
def test_failures_are_told(answers: dict[str, bytes], status: int, code: str) -> None:
    answer, _, _ = fetched("https://images.example/", answers, timeout_s=1.0)
    refused(answer, status, code)


def test_unknown_hosts_and_foreign_certificates_fail() -> None:
    answer, _, _ = fetched("https://nowhere.cdn.example/", {"/": ok(IMAGE)})
    refused(answer, 422, "url_failed")
    addresses: dict[str, list[Sequence[str]]] = {"c.cdn.example": [[PUBLIC]]}
    answer, _, requests = fetched("https://c.cdn.example/", {"/": ok(IMAGE)}, addresses)
    refused(answer, 422, "url_failed")
    assert requests == [], "the certificate is of other names"


def test_the_largest_that_is_allowed_comes_whole() -> None:
    answer, _, _ = fetched("https://images.example/", {"/": ok(IMAGE)}, max_bytes=len(IMAGE))
    assert answer == IMAGE
    answer, _, _ = fetched("https://images.example/", {"/": ok(IMAGE)}, max_bytes=len(IMAGE) - 1)
    refused(answer, 413, "too_large")


def fetched_together(paths: Sequence[str], answers: dict[str, bytes], **settings: Any) -> list[bytes] | ProblemError:
    async def fetch() -> list[bytes] | ProblemError:
        async with server(answers) as (port, _):
            context = ssl.create_default_context()
            AUTHORITY.configure_trust(context)
            network = Network(port, {"images.example": [[PUBLIC]]})
            fetcher = UrlFetcher(
                ["images.example"], resolve=network.resolve, network=network, ssl_context=context, **settings
            )
            try:
                return await fetcher([f"https://images.example{path}" for path in paths])
            except ProblemError as problem:
                return problem

    return asyncio.run(fetch())


def test_the_images_of_a_request_are_together_no_larger_than_is_allowed() -> None:
    answers = {"/a": ok(IMAGE), "/b": ok(IMAGE[::-1])}
    found = fetched_together(["/a", "/b", "/a"], answers, max_bytes=3 * len(IMAGE))
    assert found == [IMAGE, IMAGE[::-1], IMAGE]
    answer = fetched_together(["/a", "/b", "/a"], answers, max_bytes=3 * len(IMAGE) - 1)
    assert isinstance(answer, ProblemError)
    assert (answer.status, answer.code) == (413, "too_large")


def test_hosts_that_hang_do_not_hold_up_the_others() -> None:
    """Each image is asked for at once, however many others are under way."""

    async def fetch() -> bytes:
        async with server({"/": ok(IMAGE)}) as (port, requests):
            context = ssl.create_default_context()
            AUTHORITY.configure_trust(context)
            network = Network(port, {"images.example": [[PUBLIC]]})
            fetcher = UrlFetcher(
                ["images.example"], max_bytes=2**20, resolve=network.resolve, network=network, ssl_context=context
            )
            hanging = asyncio.create_task(fetcher(["https://images.example/hangs"] * 12))
            while len(requests) < 12:
                await asyncio.sleep(0)
            (body,) = await fetcher(["https://images.example/"])
            hanging.cancel()
            await asyncio.wait([hanging])
            return body

    assert asyncio.run(fetch()) == IMAGE


def test_when_one_image_cannot_be_had_the_others_are_not_waited_for() -> None:
    answer = fetched_together(["/hangs", "/none"], {"/none": redirect("http://images.example/")}, max_bytes=2**20)
    assert isinstance(answer, ProblemError)
    assert answer.code == "url_not_allowed"


@pytest.mark.parametrize("host", ["https://images.example", "images.example/", "images.example:443", "", "a*b", "*.*"])
def test_what_is_no_host_is_named(host: str) -> None:
    with pytest.raises(ConfigurationError, match="expected names of hosts"):
        UrlFetcher([host], max_bytes=1)


@pytest.mark.parametrize(
    ("host", "status", "code"),
    [
        ("localhost", 403, "url_not_allowed"),
        ("a..localhost", 422, "url_failed"),
        (f"{'a' * 64}.localhost", 422, "url_failed"),
    ],
)
def test_the_system_looks_up_names(host: str, status: int, code: str) -> None:
    async def fetch() -> bytes:
        (body,) = await UrlFetcher(["*"], max_bytes=1)([f"https://{host}/"])
        return body

    with pytest.raises(ProblemError) as caught:
        asyncio.run(fetch())
    refused(caught.value, status, code)
