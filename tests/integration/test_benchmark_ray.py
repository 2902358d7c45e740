"""`raycap benchmark` as a whole, on real Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
from PIL import Image

from raycap.benchmark.config import PARTS
from tests.commands import Command
from tests.hostile import encode

pytestmark = pytest.mark.integration

NUM_IMAGES = 40


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(NUM_IMAGES):
        picture = Image.linear_gradient("L").rotate(9 * number).resize((300, 200)).convert("RGB")
        (folder / f"{number:02d}.jpg").write_bytes(encode(picture, "JPEG"))
    return folder


def test_whole(start: Callable[..., Command], photos: Path, tmp_path: Path, tiny_bundle: str) -> None:
    output, report = tmp_path / "numbers.json", tmp_path / "page.html"
    command = start(
        *("benchmark", str(photos), "--model", tiny_bundle, "--num-images", "8", "--batch-size", "4"),
        *("--repeats", "1", "--serve-s", "3", "--output", str(output), "--report", str(report)),
    )
    code, printed, err = command.finish()
    assert code == 0, err
    assert command.others() == []
    result = json.loads(output.read_text())
    assert set(result["settings"]["parts"]) == set(PARTS)
    measurements = result["measurements"]
    assert {"decode", "encode_chosen", "search_5_batch_64", "path_chosen", "bulk_1", "serve"} <= measurements.keys()
    for each in measurements.values():
        rates = each["images_per_s"]["rounds"]
        assert len(rates) == 1
        assert all(rate > 0 for rate in rates)
        assert each["images_per_s"]["median"] == pytest.approx(median(rates), abs=0.002)
    assert {"greedy", "batched", "batched_search", "bulk_1", "serve", "serve_latency"} <= result["ratios"].keys()
    for each in result["ratios"].values():
        above, below = (measurements[each[side]]["images_per_s"]["rounds"] for side in ("above", "below"))
        expected = [one / other for one, other in zip(above, below, strict=True)]
        assert each["ratio"]["rounds"] == pytest.approx(expected, rel=0.01, abs=0.002)
    assert result["share_of_equal_captions"] == 1
    assert [each["share"] for each in result["loads"]] == [0.5, 0.8, 1.5]
    for each in result["loads"]:
        assert each["failed"] == 0
        assert each["answered"] + each["refused"] == pytest.approx(1, abs=1e-3)
        assert sum(each["batch_sizes"].values()) == pytest.approx(1, abs=1e-2)
    loop, bulk = result["core_ms_per_image"].values()
    assert loop["decode"] == pytest.approx(measurements["decode"]["core_ms_per_image"])
    assert bulk["encode"] + bulk["search"] > 0
    assert sum(bulk.values()) == pytest.approx(measurements["bulk_1"]["core_ms_per_image"], abs=0.01)
    assert result["machine"]["cores"] >= 1
    assert {"raycap", "torch", "ray"} <= result["versions"].keys()
    assert "bulk job from" in printed
    assert "<h2" in report.read_text()
