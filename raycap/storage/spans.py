"""Cuts a listing into spans that can be listed at the same time, without listing it.

Two ways: by folders, on any server; by ranges of keys, on servers that list in the order of keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from raycap.storage.base import ObjectInfo, Span

MAX_LEVELS = 5
"""Folders in folders that are looked into."""
MAX_FOLDER_PAGES = 10
MAX_FOLDERS = 1000
"""No further folder is divided when there are so many: each is at least one request, and often one file, later."""
_PAGE_KEYS = 1000
_OVERSAMPLING = 2
"""Ranges for each span: 1 leaves spans of up to 5 times the mean where numbers have no leading zeros, 2 of up to 2."""


def split_by_folders(level: Callable[[str], Iterator[ObjectInfo | str]], num_spans: int) -> list[Span]:
    """Spans of whole folders, and of the objects directly in a folder. `level` lists one folder: objects and folders.

    At most 100 + `num_spans` + 10 pages are listed: of each folder its first 10 at most, and folders in folders down to
    five levels. A folder that would take more stays one span.
    """
    pages_left = 100 + num_spans
    spans, undivided = [Span()], {""}
    for _ in range(MAX_LEVELS):
        if len(spans) >= num_spans or not undivided:
            break
        deeper: list[Span] = []
        new_folders: set[str] = set()
        for number, span in enumerate(spans):
            parts = [span]
            if span.prefix in undivided and pages_left > 0 and len(deeper) + len(spans) - number <= MAX_FOLDERS:
                parts, num_pages = _divided_folder(level, span)
                pages_left -= num_pages
                new_folders |= {part.prefix for part in parts if not part.level and part is not span}
            deeper += parts
        spans, undivided = deeper, new_folders
    return spans


def _divided_folder(level: Callable[[str], Iterator[ObjectInfo | str]], span: Span) -> tuple[list[Span], int]:
    """The spans that a folder's span falls into, and how many pages it took to know."""
    folders, num_objects = [], 0
    for entry in level(span.prefix):
        if isinstance(entry, str):
            folders.append(entry)
        else:
            num_objects += 1
        if len(folders) + num_objects > MAX_FOLDER_PAGES * _PAGE_KEYS or len(folders) > MAX_FOLDERS:
            folders = []
            break
    num_pages = 1 + (len(folders) + num_objects) // _PAGE_KEYS
    if not folders:
        return [span], num_pages
    return [Span(span.prefix, level=True)] * bool(num_objects) + [Span(folder) for folder in folders], num_pages


class KeyPage(NamedTuple):
    """The first keys after some text, in order."""

    keys: list[str]
    more: bool
    """Whether there are keys after them."""


@dataclass(slots=True)
class _Range:
    """Keys after `after`, up to `until`."""

    after: str
    until: str | None
    keys: list[str]
    """Its first ones: a page at most."""
    is_large: bool
    """Whether it may hold more than those."""
    weight: float
    """Estimate of how many it holds."""

    is_divisible: bool
    """Whether looking closer may divide it."""


def split_by_keys(keys_after: Callable[[str], KeyPage], num_spans: int, *, max_key_bytes: int = 1024) -> list[Span]:
    """Spans of ranges of keys, of about the same number of objects where names are numbers, hashes, dates or folders.

    `keys_after` gives the first keys after a text, in byte order. At most 100 + 4 `num_spans` such pages are listed.
    """
    return _KeySplit(keys_after, 100 + 4 * num_spans, max_key_bytes).spans(num_spans)


class _KeySplit:
    """Looks at the keys as a tree, whose nodes are what keys start with, level by level from the root.

    Of each node, the children are found by asking for the first key after each child that is known. All nodes of a
    level are taken for equally large, but for those that end within the page that was listed.
    """

    def __init__(self, keys_after: Callable[[str], KeyPage], num_pages: int, max_key_bytes: int) -> None:
        self._keys_after = keys_after
        self._pages_left = num_pages
        self._max_key_bytes = max_key_bytes
        self._pages: dict[str, KeyPage] = {}

    def spans(self, num_spans: int) -> list[Span]:
        ranges = [_range("", None, self._page(""), 0)]
        while self._pages_left > 0 and sum(each.is_large for each in ranges) < _OVERSAMPLING * num_spans:
            if not any(each.is_divisible for each in ranges):
                break
            ranges = self._next_level(ranges)
        return _joined(ranges, num_spans)

    def _next_level(self, ranges: list[_Range]) -> list[_Range]:
        deeper: list[_Range] = []
        num_divided, divided_weight = 0, 0.0
        undivided: list[_Range] = []
        for each in ranges:
            parts = [each]
            if each.is_divisible and self._pages_left > 0:
                parts = self._divided(each)
                num_divided += 1
                divided_weight += sum(part.weight for part in parts)
            elif each.is_divisible:
                undivided.append(each)
            deeper += parts
        for each in undivided:  # no pages are left; they are taken for as large as the others were found to be
            each.weight = divided_weight / num_divided
        return deeper

    def _divided(self, whole: _Range) -> list[_Range]:
        """The ranges of the next characters after what all keys of `whole` start with. One range: it stays whole."""
        whole.is_divisible = False
        # A key that is an end itself belongs to the range before it, which may then seem to be all there is.
        for length in range(len(self._shared(whole)), len(_start_of(whole.keys)) + 1):
            parts = self._children(whole, length)
            if len(parts) > 1:
                return parts
        return [whole]

    def _children(self, whole: _Range, length: int) -> list[_Range]:
        """The ranges of the characters at `length`."""
        parts: list[_Range] = []
        after, page = whole.after, KeyPage(whole.keys, whole.is_large)
        while True:
            key = next((key for key in page.keys if len(key) > length), None)
            end = key and self._end_within(whole, key[: length + 1])
            rest = KeyPage([], more=False)
            if end:
                rest = KeyPage(page.keys[bisect_right(page.keys, end) :], page.more)
                if not rest.keys and page.more and self._pages_left > 0:
                    rest = self._page(end, whole.until)
            if not rest.keys:
                return [*parts, _range(after, whole.until, page, length + 1)]
            parts.append(_range(after, end, page, length + 1))
            after, page = end or "", rest

    def _shared(self, whole: _Range) -> str:
        """What the keys of a range start with, but for those (folder markers) that are shorter than that.

        The first page says what it is at most. Then the first key after all that start so, if there is one in the
        range, says where they part.
        """
        shared = _start_of(whole.keys)
        while self._pages_left > 0 and (end := self._end_within(whole, shared)):
            page = self._page(end, whole.until)
            if not page.keys:
                break
            shared = _common_start(shared, page.keys[0])
        return shared

    def _end_within(self, whole: _Range, prefix: str) -> str | None:
        """Where what starts with `prefix` ends, if the range goes on after it."""
        end = _end_of(prefix)
        if end is None or (whole.until is not None and end >= whole.until):
            return None
        return end if len(end.encode()) <= self._max_key_bytes else None

    def _page(self, after: str, until: str | None = None) -> KeyPage:
        if after not in self._pages:
            self._pages_left -= 1
            self._pages[after] = self._keys_after(after)
        page = self._pages[after]
        if until is None or not page.keys or page.keys[-1] < until:
            return page
        return KeyPage(page.keys[: bisect_right(page.keys, until)], more=False)


def _range(after: str, until: str | None, page: KeyPage, num_known: int) -> _Range:
    """The range whose first keys are in `page`; `num_known` characters told it from its neighbours."""
    keys = page.keys if until is None else page.keys[: bisect_right(page.keys, until)]
    is_large = page.more and len(keys) == len(page.keys) and keys[-1] != until
    weight = float(len(keys))
    if is_large:
        # Of the ten children that a range of numbers has, the page shows some. If it does not get beyond the first, the
        # range may be of any size; to take that for ten pages does the least harm.
        length = len(_start_of(keys))
        children = {key[length] for key in keys if len(key) > length} if length <= num_known else set()
        weight *= max(1.0, 10 / max(1, len(children)))
    return _Range(after, until, keys, is_large, weight, is_divisible=is_large)


def _end_of(prefix: str) -> str | None:
    """The first text, in byte order, after all that starts with `prefix`. None: nothing is."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    code = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if code == 0xD800 else code)  # surrogates are no characters


def _start_of(keys: list[str]) -> str:
    """What sorted keys start with, but for those at the beginning, such as folder markers, that are shorter."""
    first = next((key for key, following in pairwise(keys) if not following.startswith(key)), keys[-1])
    return _common_start(first, keys[-1])


def _common_start(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _joined(ranges: list[_Range], num_spans: int) -> list[Span]:
    """Neighbours joined to spans of about the same weight."""
    spans: list[Span] = []
    total, seen, after = sum(each.weight for each in ranges), 0.0, ""
    for each in ranges:
        seen += each.weight
        if each is ranges[-1] or seen * num_spans >= total * (len(spans) + 1):
            spans.append(Span(after=after, until=each.until))
            after = each.until or ""
    return spans
