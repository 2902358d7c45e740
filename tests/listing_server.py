"""An S3 server in memory that only lists, in the order of keys' UTF-8 bytes as AWS does."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, quote, urlsplit

from tests.answering import serving


class ListingServer:
    """`keys` of its one bucket, and the queries that came."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = sorted(set(keys), key=str.encode)
        self.queries: list[dict[str, str]] = []
        self.endpoint_url = ""

    def page(self, query: dict[str, str]) -> str:
        """ListObjectsV2: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html"""
        self.queries.append(query)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        max_keys = int(query.get("max-keys", 1000))
        after = query.get("start-after", "")
        if "continuation-token" in query:
            after = bytes.fromhex(query["continuation-token"]).decode()
        at = max(bisect_left(self.keys, prefix), bisect_right(self.keys, after))
        entries: list[str] = []
        last = ""
        while at < len(self.keys) and self.keys[at].startswith(prefix) and len(entries) < max_keys:
            last = self.keys[at]
            folder_end = last.find(delimiter, len(prefix)) if delimiter else -1
            if folder_end < 0:
                entries.append(f"<Contents><Key>{quote(last)}</Key><Size>1</Size><ETag>e</ETag></Contents>")
                at += 1
                continue
            folder = last[: folder_end + 1]
            entries.append(f"<CommonPrefixes><Prefix>{quote(folder)}</Prefix></CommonPrefixes>")
            last = folder + "\U0010ffff"
            at = bisect_right(self.keys, last)
        more = at < len(self.keys) and self.keys[at].startswith(prefix)
        token = f"<NextContinuationToken>{last.encode().hex()}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><Name>bucket</Name><EncodingType>url</EncodingType>{token}"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{''.join(entries)}</ListBucketResult>"
        )


@contextmanager
def listing_server(keys: Iterable[str]) -> Iterator[ListingServer]:
    """Run it on a free port of 127.0.0.1."""
    state = ListingServer(keys)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
            body = state.page({name: values[0] for name, values in query.items()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as state.endpoint_url:
        yield state
