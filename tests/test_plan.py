"""`raycap plan`: objects, hours and cost from a listing and a small sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from raycap.bulk.config import PlanConfig, Selection
from raycap.bulk.plan import plan
from raycap.errors import ConfigurationError, NotFoundError
from raycap.model.captioner import Caption, Captioner
from tests.hostile import encode


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        (folder / f"{number}.jpg").write_bytes(encode(Image.new("RGB", (40, 30), (number, 0, 0)), "JPEG"))
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_bytes(b"text")
    return folder


def planned(source: Path, bundle: str, **settings: Any) -> dict[str, Any]:
    return plan(PlanConfig(source=str(source), model=bundle, **settings))


def test_small_source_is_counted_and_captioned(source: Path, tiny_bundle: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
    result = planned(source, tiny_bundle, num_cpus=4)
    assert (result["num_objects"], result["num_skipped"], result["skips"]) == (14, 1, {"other_suffix": 1})
    assert result["num_bytes"] == sum(path.stat().st_size for path in before)
    assert (result["num_sampled"], result["sample_counts"]) == (13, {"ok": 12, "failed": 1})
    assert result["sample_errors"] == {"not_an_image": 1}
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*")} == before, "it writes nothing"


def test_what_is_timed_was_captioned_before(source: Path, tiny_bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch of each size takes longer: much longer on a GPU."""
    sizes: list[int] = []
    caption = Captioner.caption

    def noting(self: Captioner, pixels: Any) -> list[Caption]:
        sizes.append(len(pixels))
        return caption(self, pixels)

    monkeypatch.setattr(Captioner, "caption", noting)
    planned(source, tiny_bundle)
    assert sizes == [12, 12]


def test_numbers_follow_from_one_another(source: Path, tiny_bundle: str) -> None:
    result = planned(source, tiny_bundle, num_cpus=4, num_objects=14_000_000, price_per_hour=3.0)
    caption_s, feed_s = result["seconds_per_image"]["caption"], result["feed_core_seconds_per_image"]
    assert result["images_per_s"] == pytest.approx(4 / (caption_s + feed_s), rel=0.02)
    assert result["num_skipped"] == 1_000_000
    assert result["hours"] == pytest.approx(13_000_000 / result["images_per_s"] / 3600, rel=0.01)
    assert result["cpu_hours"] == pytest.approx(4 * result["hours"], abs=0.01)
    assert result["cost"] == pytest.approx(3 * result["hours"], abs=0.01)
    assert result["num_get_requests"] == pytest.approx(13_000_000 * (1 + 2 / 256), rel=1e-6)
    puts = result["num_put_and_list_requests"]
    assert result["requests_cost"] == pytest.approx(result["num_get_requests"] * 4e-7 + puts * 5e-6, abs=0.01)


def test_gpus_are_planned_by_their_rate_and_the_cores_that_feed_them(source: Path, tiny_bundle: str) -> None:
    few = planned(source, tiny_bundle, num_gpus=8, gpu_images_per_s=1e6, num_cpus=1)
    assert few["bottleneck"] == "fetching and decoding on the CPUs"
    assert few["images_per_s"] == pytest.approx(1 / few["feed_core_seconds_per_image"], rel=0.05)
    many = planned(source, tiny_bundle, num_gpus=2, gpu_images_per_s=5, num_cpus=64)
    assert (many["bottleneck"], many["images_per_s"]) == ("captioning", 10)
    assert many["gpu_hours"] == pytest.approx(2 * many["hours"], abs=0.01)


def test_what_goes_beside_an_actor_follows_from_its_rate(source: Path, tiny_bundle: str) -> None:
    core, gpu = planned(source, tiny_bundle), planned(source, tiny_bundle, num_gpus=1, gpu_images_per_s=1000)
    assert (core["actor"], core["actor_images_per_s_is"]) == ("CPU core", "measured")
    assert core["actor_images_per_s"] == pytest.approx(1 / core["seconds_per_image"]["caption"])
    assert (gpu["actor"], gpu["actor_images_per_s"], gpu["actor_images_per_s_is"]) == ("GPU", 1000, "given")
    assert gpu["actor_needs"] == {
        "cores": pytest.approx(1000 * gpu["feed_core_seconds_per_image"]),
        "mb_per_s": pytest.approx(1000 * gpu["sample_bytes"] / 13 / 1e6),
        "pixel_mb_per_s": pytest.approx(1000 * 3 * 64**2 / 1e6),
        "requests_in_flight": pytest.approx(1000 * gpu["read_seconds"]),
    }
    assert gpu["nodes"] is None, "not asked for"


def test_nodes_that_are_done_in_time(source: Path, tiny_bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"cpus_per_node": 64, "gpus_per_node": 2, "gpu_images_per_s": 10}
    nodes = planned(source, tiny_bundle, num_objects=1_400_000, within_hours=0.5, **shape)["nodes"]
    assert nodes["images_per_s"] == 20
    assert nodes["num_nodes"] == 37  # 1,300,000 images to try, 36,000 by each node
    printed = " ".join(capsys.readouterr().out.split())
    assert "37 of 64 CPU cores and 2 GPUs caption in 30m00s, 20.0 images/s each" in printed
    assert "10.0 images/s (given; the rest is measured)" in printed


def test_reads_are_timed_and_errors_pass_through(source: Path, tiny_bundle: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{source}/{name}.jpg\n" for name in ("0", "1", "gone")))
    result = planned(keys, tiny_bundle)
    assert result["sample_errors"] == {"not_found": 1}
    assert 0 < result["read_seconds"] < 60
    assert result["feed_core_seconds_per_image"] > 0


def test_long_listing_is_cut_and_says_so(source: Path, tiny_bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(source, tiny_bundle, max_list=5)
    assert (result["listing_is_whole"], result["num_objects"]) == (False, 5)
    printed = capsys.readouterr().out
    assert "at least 5" in printed
    assert "the listing stopped after 5" in printed


def test_sample_is_bounded_and_json_is_json(source: Path, tiny_bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(source, tiny_bundle, num_samples=3, json=True, selection=Selection(include=("1*.jpg",)))
    assert (result["num_objects"], result["num_sampled"]) == (3, 3)
    assert json.loads(capsys.readouterr().out) == result


def test_what_cannot_be_planned_is_one_error(source: Path, tiny_bundle: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there are no objects here"):
        planned(tmp_path, tiny_bundle)
    with pytest.raises(ConfigurationError, match="every listed object would be skipped"):
        planned(source, tiny_bundle, selection=Selection(include=("*.txt",)))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ConfigurationError, match="none of 1 sampled objects could be captioned: 1 not_an_image"):
        planned(tmp_path, tiny_bundle)
    with pytest.raises(ConfigurationError, match="has no GPU to measure: give --gpu-images-per-s"):
        planned(source, tiny_bundle, num_gpus=1)
    with pytest.raises(ConfigurationError, match="has no GPU to measure: give --gpu-images-per-s"):
        planned(source, tiny_bundle, gpus_per_node=1, within_hours=1)
