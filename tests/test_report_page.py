"""report.html as a file: its images, that everything is escaped, and that it loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.hostile import base_picture, encode, exif_with_orientation, hostile_files
from tests.report_outputs import (
    EVIL,
    EVIL_CAPTION,
    EVIL_KEY,
    image_row,
    report,
    row,
    summary_of,
    thumbnail,
    write_output,
)


def test_thumbnails_are_small_upright_and_keep_their_shape(tmp_path: Path) -> None:
    files = {
        "1-wide.jpg": encode(base_picture().resize((800, 600)), "JPEG"),
        "2-turned.jpg": encode(base_picture().resize((800, 600)), "JPEG", exif=exif_with_orientation(6)),
        "3-strip.png": encode(base_picture().resize((900, 3)), "PNG"),
    }
    rows = [image_row(tmp_path / "images", name, data) for name, data in files.items()]
    images = report(write_output(tmp_path / "out", rows)).images()
    assert [thumbnail(each).size for each in images] == [(240, 180), (180, 240), (240, 1)]
    assert [(each["width"], each["height"]) for each in images] == [("240", "180"), ("180", "240"), ("240", "1")]
    assert all(each["alt"] == "a dog runs" and each["loading"] == "lazy" for each in images)
    upright, turned = thumbnail(images[0]), thumbnail(images[1])
    difference = np.asarray(upright.rotate(-90, expand=True), int) - np.asarray(turned, int)
    assert abs(difference).mean() < 5


def test_missing_changed_and_oversized_images_leave_a_note(tmp_path: Path) -> None:
    picture = encode(base_picture(), "JPEG")
    rows = [
        image_row(tmp_path / "images", "1-changed.jpg", picture, size=len(picture) + 1),
        row("2-gone.jpg", "a cat that is gone"),
        image_row(tmp_path / "images", "3-large.jpg", encode(base_picture().resize((2000, 10)), "JPEG")),
        row("4-odd.jpg", uri="http://127.0.0.1/odd.jpg"),
        row("5-null.jpg", uri=None),
    ]
    settings = {"limits": {"max_pixels": 19_200}}
    page = report(write_output(tmp_path / "out", rows, summary=summary_of(rows), settings=settings))
    assert len(page.images()) == 1
    assert "The file has changed since it was captioned." in page.text
    assert page.text.count("The image is no longer there.") == 2
    assert "expected at most 19,200 pixels, got 2,000 x 10" in page.text
    assert "a cat that is gone" in page.text


def test_hostile_images_do_not_break_the_report(tmp_path: Path) -> None:
    files = hostile_files()
    rows = [image_row(tmp_path / "images", f"{i}", data, key=name) for i, (name, (data, _)) in enumerate(files.items())]
    page = report(write_output(tmp_path / "out", rows))
    assert len(page.images()) == sum(code == "ok" for _, code in files.values())
    assert page.source.count('class="gone"') == sum(code != "ok" for _, code in files.values())


@pytest.fixture
def evil_output(tmp_path: Path) -> str:
    picture = encode(base_picture(), "JPEG")
    rows = [
        image_row(tmp_path / "images", "evil", picture, key=EVIL_KEY, caption=EVIL_CAPTION),
        row(f"bad{EVIL}", None, error=f"expected an image, got {EVIL}", error_code=f"code{EVIL}"),
        row("other.jpg", EVIL_CAPTION, alternatives=[{"caption": EVIL, "log_prob": -1.0}], model_id=EVIL),
    ]
    summary = summary_of(rows, source=EVIL, stage_s={EVIL: 1.0}, raycap_version=EVIL)
    return write_output(tmp_path / "out", rows, summary=summary, settings={"source": EVIL})


def test_everything_is_escaped(evil_output: str) -> None:
    page = report(evil_output)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert len(page.images()) == 1 and page.images()[0]["alt"] == EVIL_CAPTION
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert EVIL not in page.source
    for text in (EVIL_KEY, EVIL_CAPTION, f"bad{EVIL}", f"code{EVIL}", f"got {EVIL}"):
        assert text in page.text


def test_page_loads_nothing_and_its_policy_allows_only_its_own_script_and_style(evil_output: str) -> None:
    page = report(evil_output)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "style"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"@import|url\(", page.contents["style"][0])
    assert not re.search(r"\bfetch\b|XMLHttpRequest|WebSocket|import\(|innerHTML", page.contents["script"][0])
    policy = next(a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    for tag in ("script", "style"):
        assert len(page.contents[tag]) == 1
        digest = base64.b64encode(hashlib.sha256(page.contents[tag][0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_module_needs_neither_ray_nor_torch() -> None:
    code = "import sys, raycap.bulk.report; print({'ray', 'torch', 'boto3'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
