"""The report of an output in a real S3 server."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raycap.bulk.report import REPORT, write_report
from raycap.errors import ConfigurationError
from raycap.storage import open_store
from tests.hostile import base_picture, encode
from tests.report_outputs import Page, row, table
from tests.s3 import S3Server

pytestmark = pytest.mark.integration


@pytest.mark.usefixtures("no_aws_settings")
def test_report_of_an_output_in_s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.make_bucket()
    picture = encode(base_picture(), "JPEG")
    images, output = open_store(f"s3://{bucket}/images"), open_store(f"s3://{bucket}/out")
    images.write("a b%20c+ü.jpg", picture)
    rows = [
        row("a b%20c+ü.jpg", uri=images.uri("a b%20c+ü.jpg"), size=len(picture)),
        row("gone.jpg", uri=images.uri("gone.jpg")),
        row("closed.jpg", uri="s3://raycap-no-such-bucket/closed.jpg"),
    ]
    buffer = BytesIO()
    pq.write_table(table(rows), buffer)
    output.write("captions/part-00000.parquet", buffer.getvalue())
    location = write_report(f"s3://{bucket}/out")
    assert location == f"s3://{bucket}/out/{REPORT}"
    (tmp_path / REPORT).write_bytes(output.read(REPORT))
    page = Page(str(tmp_path / REPORT))
    assert len(page.images()) == 1 and page.source.count('class="gone"') == 2
    with pytest.raises(ConfigurationError, match="no captions/ here"):
        write_report(f"s3://{bucket}/elsewhere")
