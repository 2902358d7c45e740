"""How the page of an evaluation behaves in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raycap.evaluate.config import EvaluateConfig
from raycap.evaluate.run import evaluate
from tests.hostile import base_picture, encode
from tests.integration.test_report_browser import CONTRAST, browser, load, wait_until
from tests.report_outputs import EVIL_CAPTION

__all__ = ["browser"]  # the fixture

pytestmark = pytest.mark.integration


def test_browser_shows_every_picture_and_asks_for_nothing_else(browser: Any, tiny_bundle: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / f"images/{number}.png").write_bytes(encode(base_picture().rotate(90 * number), "PNG"))
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(3)]
    captions = [{"image_id": number, "caption": f"{EVIL_CAPTION} {number} {'w' * 200}"} for number in range(3)]
    (tmp_path / "annotations.json").write_text(json.dumps({"images": images, "annotations": captions}))
    report = tmp_path / "page.html"
    given = {"annotations": tmp_path / "annotations.json", "images": tmp_path / "images", "report": report}
    evaluate(EvaluateConfig(**{name: str(path) for name, path in given.items()}, model=tiny_bundle, tokenizer="python"))

    load(browser, str(report))
    ready = "return [...document.images].every(each => (each.loading = 'eager', each.complete && each.naturalWidth))"
    wait_until(browser, ready)
    assert browser.execute_script("return document.images.length") > 3 * 2
    assert browser.title.endswith("raycap evaluation")
    assert browser.get_log("browser") == []  # the policy let all of the page through
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("data:")} == {report.as_uri()}
    assert browser.execute_script(CONTRAST) == []
    for width in (320, 1200):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
