"""Listings cut into spans: disjoint and together the whole, whatever the keys; for usual names of about one size."""

from __future__ import annotations

import hashlib
import os
import random
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from raycap.errors import EndpointError
from raycap.storage import ObjectInfo, S3Options, Span, Store, open_store
from raycap.storage.spans import KeyPage, split_by_folders, split_by_keys
from tests.listing_server import listing_server

ALPHABETS = ["ab", "0123456789", "0123456789abcdef", "a/", "a/-.", "\x01a\x7f", "é日😀\ud7ff\ue000\U0010ffff", "aé/0"]


def random_keys(rng: random.Random) -> list[str]:
    alphabet, start = rng.choice(ALPHABETS), rng.choice(["", "", "photos/", "p" * 1000])
    longest = rng.choice([2, 4, 12, 24])
    keys = {start + "".join(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(rng.randint(1, 300))}
    return sorted((key for key in keys if len(key.encode()) <= 1024), key=str.encode)


def spans_and_requests(keys: list[str], num_spans: int, *, page_keys: int = 1000) -> tuple[list[Span], int]:
    asked: list[str] = []

    def keys_after(after: str) -> KeyPage:
        assert len(after.encode()) <= 1024
        asked.append(after)
        start = bisect_right(keys, after)
        return KeyPage(keys[start : start + page_keys], start + page_keys < len(keys))

    return split_by_keys(keys_after, num_spans), len(asked)


def naive_span(keys: list[str], span: Span) -> list[str]:
    """The definition of a span, on a list of keys."""
    return [
        key
        for key in keys
        if key.startswith(span.prefix)
        and key.encode() > span.after.encode()
        and (span.until is None or key.encode() <= span.until.encode())
        and not (span.level and "/" in key[len(span.prefix) :])
    ]


def sizes(keys: list[str], spans: list[Span]) -> list[int]:
    edges = [0, *(bisect_right(keys, span.until) for span in spans[:-1] if span.until is not None), len(keys)]
    return [end - start for start, end in pairwise(edges)]


# Ranges of keys


@pytest.mark.parametrize("seed", range(60))
def test_ranges_of_keys_lose_and_double_nothing(seed: int) -> None:
    rng = random.Random(seed)
    keys = random_keys(rng)
    num_spans = rng.choice([1, 2, 7, 64])
    spans, num_requests = spans_and_requests(keys, num_spans, page_keys=rng.choice([1, 2, 10]))
    assert [key for span in spans for key in naive_span(keys, span)] == keys
    assert 1 <= len(spans) <= num_spans
    assert num_requests <= 100 + 4 * num_spans


def test_many_random_keys_are_divided() -> None:
    """The test above would pass if nothing were ever divided."""
    keys = sorted(f"{number}" for number in range(300))
    spans, _ = spans_and_requests(keys, 10, page_keys=10)
    assert len(spans) == 10


NAMES: dict[str, Callable[[random.Random, int], list[str]]] = {
    "numbers": lambda rng, n: [f"img_{number:08d}.jpg" for number in range(n)],
    "numbers with gaps": lambda rng, n: [f"{number:012d}.jpg" for number in rng.sample(range(9 * n), n)],
    "numbers without zeros": lambda rng, n: [f"{number}.jpg" for number in range(n)],
    "hashes": lambda rng, n: [hashlib.md5(str(number).encode()).hexdigest() for number in range(n)],
    "uuids": lambda rng, n: [f"photos/{uuid.UUID(int=rng.getrandbits(128))}.jpg" for _ in range(n)],
    "days": lambda rng, n: [
        f"20{rng.randint(22, 24)}/{rng.randint(1, 12):02d}/{rng.randint(1, 28):02d}/{number}.jpg" for number in range(n)
    ],
    "few huge folders": lambda rng, n: [
        "cats/", "dogs/", *(f"{'cats' if number % 2 else 'dogs'}/IMG_{number:07d}" for number in range(n))
    ],
    "a huge folder among small ones": lambda rng, n: [
        f"huge/{number}.jpg" if number % 20 else f"user{number}/1.jpg" for number in range(n)
    ],
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("num_spans", [8, 64])
def test_spans_of_usual_names_are_of_about_the_same_size(names: str, num_spans: int) -> None:
    keys = sorted(set(NAMES[names](random.Random(1), 100_000)))
    spans, num_requests = spans_and_requests(keys, num_spans)
    assert max(sizes(keys, spans)) <= 2.5 * len(keys) / num_spans
    assert num_requests <= 100 + 4 * num_spans


def test_a_flat_folder_of_ten_million() -> None:
    """Too many to make: the server's answers are computed."""

    def keys_after(after: str) -> KeyPage:
        # The number of the first key after `after`; longer and shorter texts than keys have are taken as they sort.
        first = 0
        if after:
            digits = after.removeprefix("img_")[:7].ljust(7, "0") if after.startswith("img_") else "9999999"
            first = int(digits) if digits.isdigit() else 10**7
        while first < 10**7 and f"img_{first:07d}.jpg" <= after:
            first += 1
        last = min(first + 1000, 10**7)
        return KeyPage([f"img_{number:07d}.jpg" for number in range(first, last)], last < 10**7)

    spans = split_by_keys(keys_after, 64)
    assert len(spans) == 64
    edges = [int(span.until.removeprefix("img_").ljust(7, "0")) for span in spans if span.until is not None]
    assert max(end - start for start, end in zip([0, *edges], [*edges, 10**7], strict=True)) <= 2.5 * 10**7 / 64


# Folders


def level_of(keys: list[str], listed: list[str]) -> Callable[[str], Iterator[ObjectInfo | str]]:
    def level(folder: str) -> Iterator[ObjectInfo | str]:
        seen = set()
        for key in naive_span(keys, Span(folder)):
            listed.append(folder)
            name, slash, _ = key[len(folder) :].partition("/")
            if not slash:
                yield ObjectInfo(key, key, 1, "e")
            elif name not in seen:
                seen.add(name)
                yield f"{folder}{name}/"

    return level


@pytest.mark.parametrize("seed", range(30))
def test_folders_lose_and_double_nothing(seed: int) -> None:
    rng = random.Random(seed)
    keys = random_keys(rng)
    spans = split_by_folders(level_of(keys, []), rng.choice([1, 4, 50]))
    assert sorted(key for span in spans for key in naive_span(keys, span)) == sorted(keys)


def test_folders_are_divided_until_there_are_enough() -> None:
    days = [f"{year}/{month:02d}/{day:02d}/1.jpg" for year in (2023, 2024) for month in range(1, 13) for day in (1, 2)]
    keys = ["top.jpg", *days]

    def prefixes(num_spans: int) -> list[Span]:
        return split_by_folders(level_of(keys, []), num_spans)

    assert prefixes(1) == [Span()]
    assert prefixes(2) == [Span(level=True), Span("2023/"), Span("2024/")]
    assert len(prefixes(20)) == 1 + 24
    assert len(prefixes(30)) == 1 + 48
    assert len(prefixes(1000)) == 1 + 48


def test_a_flat_folder_is_not_walked_to_its_end() -> None:
    listed: list[str] = []
    keys = [f"{number:06d}" for number in range(50_000)] + ["z/1"]
    assert split_by_folders(level_of(keys, listed), 10) == [Span()]
    assert len(listed) <= 10_001


# Through a store


def listed(store: Store, span: Span, after: str = "") -> list[str]:
    return [info.key for info in store.list_span(span, after=after)]


@pytest.mark.usefixtures("no_aws_settings")
@pytest.mark.parametrize("byte_ordered", [True, False])
@pytest.mark.parametrize("location", ["s3://bucket", "s3://bucket/a/"])
def test_spans_of_an_s3_listing(byte_ordered: bool, location: str) -> None:
    rng = random.Random(4)
    keys = {f"a/{folder}/{rng.getrandbits(40):x}" for folder in ("x", "y", "é😀") for _ in range(600)}
    keys |= {f"a/{number}%20+ .jpg" for number in range(300)} | {"a/x/", "a/", "a/x", "a/y", "a/y-1", "b"}
    with listing_server(keys) as server:
        options = S3Options(endpoint_url=server.endpoint_url, anonymous=True, byte_ordered=byte_ordered)
        store = open_store(location, options)
        whole = [info.key for info in store.list()]
        base = location.removeprefix("s3://bucket").removeprefix("/")
        assert whole == [key[len(base) :] for key in server.keys if key.startswith(base) and key != base]
        spans = store.split(6)
        assert len(spans) >= 4
        parts = [listed(store, span) for span in spans]
        assert sorted(chain.from_iterable(parts)) == sorted(whole)
        for span, part in zip(spans, parts, strict=True):
            for number in (0, len(part) // 2, len(part) - 1):
                assert listed(store, span, after=part[number]) == part[number + 1 :]
        assert listed(store, Span("x/", after="x/3", until="x/9")) == [key for key in whole if "x/3" < key <= "x/9"]


@pytest.mark.usefixtures("no_aws_settings")
def test_what_fits_into_a_page_is_one_span_and_one_request() -> None:
    with listing_server([f"{number}/1" for number in range(1000)]) as server:
        assert open_store("s3://bucket", S3Options(endpoint_url=server.endpoint_url, anonymous=True)).split(9) == [
            Span()
        ]
        assert len(server.queries) == 1


@pytest.mark.usefixtures("no_aws_settings")
def test_a_listing_that_does_not_say_where_it_goes_on_is_no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    with listing_server([f"{number}" for number in range(1001)]) as server:
        page = server.page
        monkeypatch.setattr(server, "page", lambda query: page(query).replace("NextContinuationToken", "Unknown"))
        with pytest.raises(EndpointError, match="cannot be relied on"):
            list(open_store("s3://bucket", S3Options(endpoint_url=server.endpoint_url, anonymous=True)).list())


def test_a_local_listing_goes_on_after_any_key(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for key in ["a-b", "a/b", "a/c/d", "a/c.d", "a.b", "é/x", "日本/1", "z", "a/c/e/f", "a0/1"]:
        store.write(key, b"")
    (tmp_path / "caf\udce9").write_bytes(b"")  # a name that is not UTF-8
    (tmp_path / "cafe").write_bytes(b"")
    assert store.split(10) == [Span()]
    whole = [info.key for info in store.list()]
    assert whole == sorted(whole, key=str.encode)
    for number, key in enumerate(whole):
        assert listed(store, Span(), after=key) == whole[number + 1 :]
        assert listed(store, Span(after=key)) == whole[number + 1 :]
        assert listed(store, Span(until=key)) == whole[: number + 1]
    assert listed(store, Span("a/", level=True)) == ["a/b", "a/c.d"]
    assert listed(store, Span("a/", level=True), after="a/b") == ["a/c.d"]
    assert listed(open_store(tmp_path / "z"), Span(), after="z") == []


def test_folders_that_were_listed_already_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    for folder in "abc":
        store.write(f"{folder}/1", b"")
    scandir, opened = os.scandir, []

    def noting(folder: str) -> Any:
        opened.append(Path(folder).name)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", noting)
    assert listed(store, Span(), after="b/1") == ["c/1"]
    assert opened == [tmp_path.name, "b", "c"]
