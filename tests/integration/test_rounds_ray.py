"""What a data team does with an output after the first run, and two at a time: on real Ray."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
from PIL import Image

from raycap import cli
from raycap.bulk.config import CaptionConfig, Selection
from raycap.bulk.layout import CHUNK_ROWS, LOCK, RUN, SUMMARY, Round
from raycap.bulk.run import caption
from raycap.errors import ConfigurationError
from tests.commands import Command, wait_until
from tests.hostile import encode

pytestmark = pytest.mark.integration

NUM_IMAGES = CHUNK_ROWS + 40


def picture(number: int) -> bytes:
    return encode(Image.new("RGB", (40, 30), (number % 256, 7 * number % 256, number // 256)), "JPEG")


def write_all(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:04d}.jpg").write_bytes(picture(number))
    return folder


def captions(output: str | Path) -> pd.DataFrame:
    return pd.read_parquet(Path(output) / "captions", dtype_backend="pyarrow").set_index("key")


def same(left: pd.DataFrame, right: pd.DataFrame) -> bool:
    return left.drop(columns="captioned_at").equals(right.drop(columns="captioned_at"))


@pytest.fixture
def config(tmp_path: Path, tiny_bundle: str, local_ray: None) -> CaptionConfig:
    source = write_all(tmp_path / "images", range(NUM_IMAGES))
    (source / "0003.jpg").write_bytes(b"no picture yet")
    return CaptionConfig(source=str(source), output=str(tmp_path / "out"), model=tiny_bundle, report=False)


def test_update_and_retry_leave_what_a_fresh_run_would(config: CaptionConfig, tmp_path: Path) -> None:
    source, output = Path(config.source), Path(config.output)
    assert caption(replace(config, update=True)).summary["round"] == 0, "the first run has everything to do"
    first = captions(output)
    assert first.loc["0003.jpg", "error_code"] == "not_an_image"

    assert caption(replace(config, update=True)).summary["round_counts"]["unchanged"] == NUM_IMAGES
    assert captions(output).equals(first)

    write_all(source, range(NUM_IMAGES, NUM_IMAGES + 30))
    (source / "0100.jpg").write_bytes(picture(5000))
    (source / "0200.jpg").unlink()
    (source / "0003.jpg").write_bytes(picture(3))
    counts = caption(replace(config, update=True)).summary["round_counts"]
    assert counts == {"new": 30, "done_again": 2, "deleted": 1, "unchanged": NUM_IMAGES - 3}
    updated = captions(output)
    unchanged = first.index.difference(["0003.jpg", "0100.jpg", "0200.jpg"])
    assert updated.loc[unchanged].equals(first.loc[unchanged]), "not even captioned_at differs"
    assert (updated.loc[["0003.jpg", "0100.jpg"], "row_id"] == first.loc[["0003.jpg", "0100.jpg"], "row_id"]).all()

    fresh = replace(config, output=str(tmp_path / "fresh"))
    caption(fresh)
    wanted = captions(fresh.output).sort_index()
    # In other batches, log-probabilities differ in the last digits; and with them, now and then, later beams.
    by_chance = ["row_id", "log_prob", "alternatives"]
    assert same(updated.sort_index().drop(columns=by_chance), wanted.drop(columns=by_chance))
    assert (updated["log_prob"] - wanted["log_prob"]).abs().max() < 1e-4
    summary, expected = (json.loads((Path(each.output) / SUMMARY).read_bytes()) for each in (config, fresh))
    assert {name: summary[name] for name in ("num_objects", "counts", "num_bytes", "errors")} == {
        name: expected[name] for name in ("num_objects", "counts", "num_bytes", "errors")
    }


def test_retry_takes_the_failed_rows_alone(config: CaptionConfig) -> None:
    source, output = Path(config.source), Path(config.output)
    caption(config)
    (source / "0003.jpg").write_bytes(picture(3))
    assert caption(replace(config, retry_failed=("fetch_failed",))).summary["counts"]["failed"] == 1
    before = captions(output)
    summary = caption(replace(config, retry_failed=())).summary
    assert summary["counts"] == {"ok": NUM_IMAGES, "failed": 0, "skipped": 0}
    assert summary["round_counts"]["done_again"] == 1
    after = captions(output)
    assert after.drop("0003.jpg").equals(before.drop("0003.jpg"))
    assert after.loc["0003.jpg", "status"] == "ok"
    assert caption(config).summary == summary, "and then it is complete"


def test_round_that_was_stopped_is_finished_first(config: CaptionConfig) -> None:
    source, output = Path(config.source), Path(config.output)
    caption(config)
    write_all(source, range(NUM_IMAGES, NUM_IMAGES + 5))
    caption(replace(config, update=True))
    expected = captions(output)
    (output / SUMMARY).unlink()  # as if killed while joining
    (output / Round(1).chunk(0)).unlink()
    summary = caption(config).summary
    assert (summary["round"], summary["num_objects"]) == (1, NUM_IMAGES + 5)
    assert same(captions(output), expected)


def test_internal_files_may_be_deleted_before_an_update(config: CaptionConfig) -> None:
    source, output = Path(config.source), Path(config.output)
    caption(config)
    for path in sorted((output / "_raycap").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    write_all(source, range(NUM_IMAGES, NUM_IMAGES + 5))
    assert caption(replace(config, update=True)).summary["round_counts"]["new"] == 5
    assert len(captions(output)) == NUM_IMAGES + 5


def test_list_of_objects_is_a_source(config: CaptionConfig, tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    keys = [f"images/{number:04d}.jpg" for number in (7, 5, 9)] + ["images/gone.jpg"]
    manifest.write_text("path,size\n" + "".join(f"{key},\n" for key in keys))
    growing = replace(config, source=str(manifest), num_actors=1, max_actors=2)
    summary = caption(growing).summary
    rows = captions(config.output)
    assert list(rows.index) == keys
    assert list(rows["error_code"].fillna("ok")) == ["ok", "ok", "ok", "not_found"]
    assert rows.loc[keys[0], "uri"] == str(Path(config.source) / "0007.jpg")
    assert rows.loc[keys[0], "size"] == len(picture(7))
    assert summary["num_bytes"] == sum(len(picture(number)) for number in (7, 5, 9))


def test_selection_is_part_of_what_the_output_is_of(config: CaptionConfig) -> None:
    chosen = replace(config, selection=Selection(include=("00*.jpg",), limit=20))
    summary = caption(chosen).summary
    assert (summary["num_objects"], summary["num_filtered"]) == (20, 0)
    assert caption(chosen).summary == summary
    with pytest.raises(ConfigurationError, match="selection was"):
        caption(replace(config, selection=Selection(include=("01*.jpg",))))


def test_other_formats_are_written_besides_and_follow_the_captions(config: CaptionConfig) -> None:
    output = Path(config.output)
    caption(replace(config, format="jsonl"))
    part = output / "jsonl/part-00000.jsonl"
    assert len(part.read_text().splitlines()) == NUM_IMAGES
    written = part.stat().st_mtime_ns
    caption(replace(config, format="jsonl"))
    assert part.stat().st_mtime_ns == written
    (Path(config.source) / "0003.jpg").write_bytes(picture(3))
    caption(replace(config, format="jsonl", retry_failed=()))
    assert sum(json.loads(line)["status"] == "ok" for line in part.read_text().splitlines()) == NUM_IMAGES


def test_prometheus_sees_what_is_done(config: CaptionConfig) -> None:
    pytest.importorskip("opencensus", reason="Ray shows metrics where ray[default] is installed")
    caption(config)
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def metrics() -> dict[str, float]:
        """Sums over the actors, each of which has counters of its own."""
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_raycap_")]
        sums: defaultdict[str, float] = defaultdict(float)
        for line in lines:
            sums[line.split("{")[0] + (_label(line) or "")] += float(line.rpartition(" ")[2])
        return sums

    wait_until(lambda: metrics()["ray_raycap_images_total ok"] >= NUM_IMAGES - 1, "the counters")
    found = metrics()
    assert found["ray_raycap_failures_total not_an_image"] >= 1
    assert found["ray_raycap_bytes_total"] > 0
    assert found["ray_raycap_stage_seconds_total caption"] > 0


def _label(line: str) -> str | None:
    labels = dict(part.split("=", 1) for part in line[line.index("{") + 1 : line.rindex("}")].split(",") if "=" in part)
    value = next((labels[name] for name in ("status", "code", "stage") if name in labels), None)
    return value and " " + value.strip('"')


@pytest.mark.timeout(600)
def test_second_run_is_refused_and_sigterm_ends_the_first(
    tmp_path: Path, tiny_bundle: str, start: Callable[..., Command]
) -> None:
    num_images = 8 * CHUNK_ROWS
    source, output = write_all(tmp_path / "images", range(num_images)), tmp_path / "out"
    command = ("caption", str(source), str(output), "--model", tiny_bundle, "--no-report", "--batch-size", "1")
    first = start(*command)
    wait_until(lambda: (output / LOCK).exists() or first.has_ended(), "the lock")
    code, _, err = start(*command).finish()
    assert code == cli.EXIT_USAGE
    assert f"is being written by another run (host {os.uname().nodename}, process {first.process.pid}" in err
    assert not (output / SUMMARY).exists()
    wait_until(lambda: any((output / Round(0).chunks).glob("*.parquet")) or first.has_ended(), "the first chunk")
    os.kill(first.process.pid, signal.SIGTERM)
    code, _, err = first.finish()
    assert code == cli.EXIT_TERMINATED
    assert err.splitlines()[-1].startswith("raycap: terminated; ")
    wait_until(lambda: not first.others(), "the end of all processes")
    assert (output / RUN).exists()
    assert not (output / LOCK).exists()
    code, out, _ = start("status", str(output), "--json").finish()
    told: dict[str, Any] = json.loads(out)
    assert (code, told["state"], told["num_rows"]) == (cli.EXIT_OK, "stopped", num_images)
    assert CHUNK_ROWS <= told["num_done"] < num_images
