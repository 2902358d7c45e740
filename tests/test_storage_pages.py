"""Listing pages: ours say what botocore's say."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.parsers import ResponseParserError, create_parser
from botocore.session import Session

from raycap.storage.pages import PageParserFactory

OBJECT = (
    "<Contents><Key>{}</Key><ETag>&quot;e1&quot;</ETag><Size>12</Size><StorageClass>GLACIER</StorageClass></Contents>"
)
AWS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
NAMES = (
    "plain.jpg",
    "a%20b%2Bc%0A%23.jpg",
    "ünï/日本語/😀.jpg",
    " lead and trail ",
    "&lt;&amp;&gt;.jpg",
    "&#13;&#10;.jpg",
)


def document(inside: str, namespace: str = AWS) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult {namespace}>{inside}</ListBucketResult>'.encode()


def parsed(parser: Any, body: bytes, status: int = 200, operation: str = "ListObjectsV2") -> Any:
    shape = Session().get_service_model("s3").operation_model(operation).output_shape
    return parser.parse({"body": body, "headers": {"X-Amz-Id": "1"}, "status_code": status}, shape)


def both(body: bytes, **settings: Any) -> tuple[Any, Any]:
    return tuple(parsed(parser, body, **settings) for parser in (ours(), create_parser("rest-xml")))  # type: ignore[return-value]


def ours() -> Any:
    return PageParserFactory().create_parser("rest-xml")


@pytest.mark.parametrize("namespace", [AWS, "", 'xmlns="http://doc.s3.amazonaws.com/2006-03-01"'])
@pytest.mark.parametrize("name", NAMES)
def test_objects_are_those_of_botocore(name: str, namespace: str) -> None:
    head = "<Name>bucket</Name><Prefix></Prefix><KeyCount>2</KeyCount><MaxKeys>1000</MaxKeys>"
    head += "<IsTruncated>true</IsTruncated>"
    token = "<EncodingType>url</EncodingType><NextContinuationToken>1/abc==</NextContinuationToken>"
    folder = f"<CommonPrefixes><Prefix>{name}/</Prefix></CommonPrefixes>"
    mine, botocores = both(document(head + token + OBJECT.format(name) + OBJECT.format("other") + folder, namespace))
    assert mine == botocores | {"ResponseMetadata": mine["ResponseMetadata"]}
    assert mine["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert len(mine["Contents"]) == 2


@pytest.mark.parametrize("inside", ["", "<Name>bucket</Name><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount>"])
def test_empty_pages(inside: str) -> None:
    mine, botocores = both(document(inside))
    lists = {"Contents": [], "CommonPrefixes": []}
    assert mine == lists | botocores | {"ResponseMetadata": mine["ResponseMetadata"]}


def test_other_answers_are_left_to_botocore() -> None:
    error = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    for body, settings in [
        (error, {"status": 503}),
        (b"<html><body>hello</body></html>", {}),
        (
            b"<ListAllMyBucketsResult><Buckets><Bucket><Name>a</Name></Bucket></Buckets></ListAllMyBucketsResult>",
            {"operation": "ListBuckets"},
        ),
    ]:
        mine, botocores = both(body, **settings)
        assert mine == botocores


@pytest.mark.parametrize("body", [b"not xml", b"<ListBucketResult><Contents>", b""])
def test_what_is_no_xml_fails_as_in_botocore(body: bytes) -> None:
    for parser in (create_parser("rest-xml"), ours()):
        try:
            result = parsed(parser, body)
        except ResponseParserError:
            result = "error"
        assert result in ("error", {"ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {"x-amz-id": "1"}}})
