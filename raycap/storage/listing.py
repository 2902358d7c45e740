"""What is in a bucket below one folder: page by page, folder by folder, or cut into spans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raycap.errors import EndpointError
from raycap.storage.base import TEMPORARY_PREFIX, ObjectInfo, Span
from raycap.storage.client import resolved
from raycap.storage.failures import not_s3
from raycap.storage.options import S3Options
from raycap.storage.patience import ask
from raycap.storage.spans import KeyPage, split_by_folders, split_by_keys

MAX_KEY_BYTES = 1024
_PROBE_KEYS = 100
"""Keys that a look at one place of a listing brings: enough to know small ranges whole, at a tenth of a page's cost."""


class Listing:
    """The objects whose key starts with `base`, which is "" or a folder. Keys are relative to it."""

    def __init__(self, options: S3Options, bucket: str, base: str) -> None:
        self.options = options
        self.bucket = bucket
        self.base = base
        self._is_ordered = options.byte_ordered
        if self._is_ordered is None:
            self._is_ordered = resolved(options).endpoint_url is None

    def objects(self, span: Span, after: str) -> Iterator[ObjectInfo]:
        """The objects of a span behind the key `after`. StartAfter, not a comparison: the server has its own order."""
        start = {"StartAfter": self.base + (after or span.after)} if after or span.after else {}
        level = {"Delimiter": "/"} if span.level else {}
        if after and not after.endswith("/") and not span.level and not self._is_ordered:
            yield from self._skipped_folder(span, after)
        for page in self._pages(span.prefix, **start, **level):
            for info in self._objects(page):
                if span.until is None or info.key <= span.until:
                    yield info
                elif self._is_ordered:
                    return

    def split(self, num_spans: int) -> list[Span]:
        """The spans of the whole listing."""
        if not self._page("")["IsTruncated"]:
            return [Span()]
        if self._is_ordered:
            return split_by_keys(self._keys_after, num_spans, max_key_bytes=MAX_KEY_BYTES - len(self.base.encode()))
        return split_by_folders(self._level, num_spans)

    def _level(self, folder: str) -> Iterator[ObjectInfo | str]:
        """The objects and, as keys that end in `/`, the folders directly in a folder."""
        for page in self._pages(folder, Delimiter="/"):
            yield from (each["Prefix"].removeprefix(self.base) for each in page.get("CommonPrefixes", ()))
            yield from self._objects(page)

    def _keys_after(self, after: str) -> KeyPage:
        start = {"StartAfter": self.base + after} if after else {}
        page = self._page("", MaxKeys=_PROBE_KEYS, **start)
        return KeyPage([each["Key"].removeprefix(self.base) for each in page.get("Contents", ())], page["IsTruncated"])

    def _skipped_folder(self, span: Span, after: str) -> Iterator[ObjectInfo]:
        """What SeaweedFS leaves out behind `a` where there are both an object `a` and objects `a/...`: the latter.

        It lists them directly behind `a`, but not if it is told to start after `a`.
        """
        folder = f"{after}/"
        if not folder.startswith(span.prefix) or not self._first(folder):
            return
        behind_object = self._first(span.prefix, after)
        behind_folder = self._first(span.prefix, f"{folder}\U0010ffff")
        if behind_object == behind_folder:  # where nothing is left out, the first is in the folder or before it
            yield from self.objects(Span(folder), "")

    def _first(self, prefix: str, after: str = "") -> str | None:
        start = {"StartAfter": self.base + after} if after else {}
        contents = self._page(prefix, MaxKeys=1, **start).get("Contents")
        return contents[0]["Key"] if contents else None

    def _pages(self, prefix: str, **settings: Any) -> Iterator[dict[str, Any]]:
        while True:
            page = self._page(prefix, **settings)
            yield page
            if not page["IsTruncated"]:
                return
            token = page.get("NextContinuationToken")
            if not token or token == settings.get("ContinuationToken"):
                raise EndpointError(
                    f"cannot list s3://{self.bucket}/{self.base}: the server says that there is more, but not where; "
                    "its listing cannot be relied on"
                )
            settings["ContinuationToken"] = token

    def _page(self, prefix: str, **settings: Any) -> dict[str, Any]:
        what = f"cannot list s3://{self.bucket}/{self.base}"
        page: dict[str, Any] = ask(
            self.options,
            what,
            lambda client: client.list_objects_v2(Bucket=self.bucket, Prefix=self.base + prefix, **settings),
        )
        require_s3(page, what)
        return {"IsTruncated": False} | page

    def _objects(self, page: dict[str, Any]) -> Iterator[ObjectInfo]:
        for each in page.get("Contents", ()):
            full_key = each["Key"]
            key = full_key[len(self.base) :]
            # The root's own marker, an object that is called like the folder, has no name in it. SeaweedFS reads `a//`
            # as `a/`: what it lists then is not below the base.
            if not key or not full_key.startswith(self.base):
                continue
            if not key.rpartition("/")[2].startswith(TEMPORARY_PREFIX):
                yield ObjectInfo(
                    key,
                    f"s3://{self.bucket}/{full_key}",
                    each["Size"],
                    each.get("ETag", "").strip('"'),
                    each.get("StorageClass", ""),
                )


def require_s3(page: dict[str, Any], what: str) -> None:
    """boto3 takes any web page for an empty listing; a real one repeats the bucket's name or counts its keys."""
    if "Name" not in page and "KeyCount" not in page:
        raise not_s3(what)
