"""An S3 endpoint of any number of objects that are stored nowhere: keys and images follow from their number.

    python -m tests.synthetic_s3 --num-keys 1000000 --shape flat --port 0     prints its port, then serves
    with running_synthetic_s3(num_keys=10_000) as server: ...                  the same, as a process of its own

It knows ListObjectsV2, GET and HEAD, in any bucket and with any keys or none; everything else is refused. Every key
gives a small JPEG. Requests are counted, so that a test can say how often each object was fetched.

    flat     img-000000000123.jpg                one level, numbered
    hashes   00a7c5ac471b4786.jpg                one level, evenly spread over 16 hex digits
    dates    2015/03/27/IMG_00042.jpg            a folder for each day
    skewed   big/000000000123.jpg                nine tenths in one folder, the rest in a hundred
    odd      a b/ü%20+&#<"'>/000000000123.jpg    characters that listings have to escape
"""

from __future__ import annotations

import argparse
import array
import asyncio
import io
import json
import signal
import subprocess
import sys
import urllib.request
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from tests.commands import end_with_parent

MAX_KEYS = 1000
NUM_IMAGES = 4093
"""Different images; object n has image n modulo this."""
IMAGE_BYTES = 1500
PER_DAY = 500
BUCKET = "synthetic"
ANY_KEYS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true"}
"""Environment: boto3 wants to sign requests with something."""
_LAST = "\U0010ffff"  # sorts after whatever may follow a prefix


def _mixed(number: int) -> int:
    """64 bits that look random (the finaliser of splitmix64)."""
    number = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def _hash(number: int, num_keys: int) -> str:
    step = 2**64 // num_keys
    return f"{number * step + _mixed(number) % step:016x}.jpg"


def _date(number: int, num_keys: int) -> str:
    day = date(2015, 1, 1) + timedelta(days=number // PER_DAY)
    return f"{day:%Y/%m/%d}/IMG_{number % PER_DAY:05d}.jpg"


def _skewed(number: int, num_keys: int) -> str:
    if number < num_keys * 9 // 10:
        return f"big/{number:012d}.jpg"
    rest = num_keys - num_keys * 9 // 10
    return f"small-{(number - num_keys * 9 // 10) * 100 // rest:02d}/{number:012d}.jpg"


SHAPES: dict[str, Callable[[int, int], str]] = {
    "flat": lambda number, num_keys: f"img-{number:012d}.jpg",
    "hashes": _hash,
    "dates": _date,
    "skewed": _skewed,
    "odd": lambda number, num_keys: f"a b/ü%20+&#<\"'>/{number:012d}.jpg",
}
"""Number of an object and of all objects -> key. Numbers rise in the order of the keys' bytes, so that a key is found
by bisection and nothing need be held in memory."""


@lru_cache(maxsize=NUM_IMAGES)
def synthetic_image(number: int) -> bytes:
    """The JPEG of an object: 24 x 24 pixels in four random colours, always of IMAGE_BYTES bytes."""
    random = np.random.default_rng(number % NUM_IMAGES)
    colours_HWC = random.integers(0, 256, (2, 2, 3), np.uint8).repeat(12, axis=0).repeat(12, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(colours_HWC).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    padding = IMAGE_BYTES - len(data)  # a comment segment: marker, length with itself, text
    return data[:2] + b"\xff\xfe" + (padding - 2).to_bytes(2, "big") + b" " * (padding - 4) + data[2:]


def etag_of(number: int) -> str:
    """The ETag of an object, in listings and with its bytes."""
    return f"{number:032x}"


class Keys:
    """All keys of the endpoint, in order."""

    def __init__(self, num_keys: int, shape: str) -> None:
        self.num_keys = num_keys
        self._key = SHAPES[shape]

    def __getitem__(self, number: int) -> str:
        return self._key(number, self.num_keys)

    def position(self, text: str) -> int:
        """How many keys come before `text`. Code points sort as their UTF-8 bytes do."""
        return bisect_left(range(self.num_keys), text, key=self.__getitem__)

    def number(self, key: str) -> int | None:
        """The number of the object with this key."""
        at = self.position(key)
        return at if at < self.num_keys and self[at] == key else None


class Endpoint:
    """Requests to answers."""

    def __init__(self, num_keys: int, shape: str) -> None:
        self.keys = Keys(num_keys, shape)
        self.requests: Counter[str] = Counter()
        self.gets = array.array("L", bytes(8 * num_keys))

    def answer(self, method: str, target: str) -> tuple[int, str, bytes]:
        """HTTP status, ETag of an object or "", body."""
        parts = urlsplit(target)
        if parts.path == "/-/counts":
            return 200, "", json.dumps(self.counts()).encode()
        _, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if method == "HEAD" and not key:
            return 200, "", b""
        if method == "GET" and not key and query.get("list-type") == "2":
            self.requests["list"] += 1
            return 200, "", self.page(query)
        if method not in ("GET", "HEAD"):
            return 403, "", _error("AccessDenied")
        number = self.keys.number(key) if key else None
        if number is None:
            return 404, "", _error("NoSuchKey")
        self.requests[method.lower()] += 1
        if method == "GET":
            self.gets[number] += 1
        return 200, etag_of(number), synthetic_image(number)

    def counts(self) -> dict[str, int]:
        """Requests so far: by kind, the objects that were fetched, and how often the most fetched one was."""
        gets = np.asarray(self.gets)
        return {
            "list": self.requests["list"],
            "head": self.requests["head"],
            "get": self.requests["get"],
            "objects": int(np.count_nonzero(gets)),
            "most": int(gets.max(initial=0)),
        }

    def page(self, query: dict[str, str]) -> bytes:
        """One page of ListObjectsV2, as XML."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        max_keys = min(int(query.get("max-keys", MAX_KEYS)), MAX_KEYS)
        encode: Callable[[str], str] = quote if query.get("encoding-type") == "url" else escape
        keys = self.keys
        if "continuation-token" in query:
            at = int(query["continuation-token"].removeprefix("at-"))
        else:
            at = keys.position(prefix)
            if start_after := query.get("start-after"):
                at = max(at, keys.position(start_after + "\0"))
        end = keys.position(prefix + _LAST)
        contents: list[str] = []
        folders: list[str] = []
        while at < end and len(contents) + len(folders) < max_keys:
            key = keys[at]
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut >= 0:
                folder = key[: cut + len(delimiter)]
                folders.append(f"<CommonPrefixes><Prefix>{encode(folder)}</Prefix></CommonPrefixes>")
                at = keys.position(folder + _LAST)
                continue
            contents.append(
                f"<Contents><Key>{encode(key)}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>&quot;{etag_of(at)}&quot;</ETag><Size>{IMAGE_BYTES}</Size><StorageClass>STANDARD</StorageClass>"
                "</Contents>"
            )
            at += 1
        more = at < end and max_keys > 0
        return "".join(
            (
                '<?xml version="1.0" encoding="UTF-8"?>\n',
                '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">',
                f"<Name>{BUCKET}</Name><Prefix>{encode(prefix)}</Prefix><MaxKeys>{max_keys}</MaxKeys>",
                f"<Delimiter>{encode(delimiter)}</Delimiter>" if delimiter else "",
                "<EncodingType>url</EncodingType>" if encode is quote else "",
                f"<KeyCount>{len(contents) + len(folders)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>",
                f"<NextContinuationToken>at-{at}</NextContinuationToken>" if more else "",
                *contents,
                *folders,
                "</ListBucketResult>",
            )
        ).encode()


def _error(code: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code></Error>'.encode()


class _Connection(asyncio.Protocol):
    """HTTP/1.1 with connections that stay open; no request here has a body worth reading."""

    def __init__(self, endpoint: Endpoint, latency_s: float) -> None:
        self._endpoint = endpoint
        self._latency_s = latency_s
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
            if self._latency_s:
                asyncio.get_running_loop().call_later(self._latency_s, self._answer, method, target)
            else:
                self._answer(method, target)

    def _answer(self, method: str, target: str) -> None:
        status, etag, body = self._endpoint.answer(method, target)
        kind = f'Content-Type: image/jpeg\r\nETag: "{etag}"\r\n' if etag else "Content-Type: application/xml\r\n"
        closing = "" if method in ("GET", "HEAD") else "Connection: close\r\n"
        self._transport.write(
            f"HTTP/1.1 {status} -\r\n{kind}Content-Length: {len(body)}\r\n"
            f"Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n{closing}\r\n".encode()
            + (b"" if method == "HEAD" else body)
        )
        if closing:
            self._transport.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticS3:
    """A running endpoint."""

    endpoint_url: str
    source: str = f"s3://{BUCKET}"

    def env(self) -> dict[str, str]:
        """The environment of a process that reads from here."""
        return ANY_KEYS | {"AWS_ENDPOINT_URL_S3": self.endpoint_url}

    def counts(self) -> dict[str, int]:
        """`Endpoint.counts`."""
        with urllib.request.urlopen(f"{self.endpoint_url}/-/counts") as answer:
            counts: dict[str, int] = json.load(answer)
            return counts


@contextmanager
def running_synthetic_s3(*, num_keys: int, shape: str = "flat", latency_s: float = 0) -> Iterator[SyntheticS3]:
    """Start an endpoint in a process of its own; end it with the block."""
    arguments = ["--num-keys", str(num_keys), "--shape", shape, "--latency-s", str(latency_s)]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.synthetic_s3", *arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(end_with_parent, signal.SIGKILL),
    ) as process:
        assert process.stdout
        try:
            yield SyntheticS3(endpoint_url=f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


async def _serve(num_keys: int, shape: str, port: int, latency_s: float) -> None:
    endpoint = Endpoint(num_keys, shape)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(endpoint, latency_s), "127.0.0.1", port, backlog=1024
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="An S3 endpoint of synthetic objects.")
    parser.add_argument("--num-keys", type=int, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="flat")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-s", type=float, default=0.0, help="before each answer; pages of AWS take about 0.1")
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.num_keys, arguments.shape, arguments.port, arguments.latency_s))


if __name__ == "__main__":
    main()
