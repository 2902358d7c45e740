"""`raycap benchmark`: settings, rounds and ratios, where the time goes, CPU time of processes, the tables, the page."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from torch import Tensor

from raycap.benchmark.breakdown import STAGES, of_bulk, of_path
from raycap.benchmark.bulk import steady
from raycap.benchmark.config import PARTS, BenchmarkConfig
from raycap.benchmark.cpu import CpuClock, processes_under
from raycap.benchmark.page import render
from raycap.benchmark.parts import engines_of, part_measures, read_images, share_of_equal_captions
from raycap.benchmark.result import core_ms, load_medians, ratios
from raycap.benchmark.run import benchmark
from raycap.benchmark.table import print_result
from raycap.benchmark.timing import Measure, Sample, measure, quotients, spread, timed
from raycap.cli import _parse
from raycap.errors import ConfigurationError
from raycap.model.bundle import Bundle
from raycap.model.captioner import Captioner
from raycap.model.ensemble import EnsembleNetwork
from raycap.storage import open_store
from tests.bundles import random_bundle
from tests.commands import wait_until
from tests.hostile import base_picture, encode

NUM_IMAGES = 5
LOAD = {
    **{"share": 1.5, "asked_per_s": 60.0, "answered": 0.66, "refused": 0.34, "failed": 0.0},
    **{"p50_ms": 1500.0, "p99_ms": 2900.0, "bound_ms": 3200.0, "batch_sizes": {"1": 0.0, "16": 0.25, "32": 0.75}},
}


def of(name: str, *samples: tuple[float, float | None], title: str = "") -> Measure:
    """A measure with these rates and core-milliseconds."""
    found = [Sample(images_per_s=rate, core_ms=cost) for rate, cost in samples]
    return Measure(name=name, title=title or name, run=lambda: found[0], samples=found)


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ()}, "give at least one SOURCE: a directory or s3:// prefix of images"),
        ({"sources": ("a", "a")}, "a SOURCE is given twice"),
        ({"parts": ()}, "--parts needs at least one of decode, encode, search, path, bulk, serve"),
        ({"num_images": 0}, "--num-images must be at least 1, got 0"),
        ({"num_bulk_images": 0}, "--num-bulk-images must be at least 1, got 0"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"serve_s": 0}, "--serve-s must be above 0, got 0"),
        ({"output": "x", "report": "x"}, "--output and --report need a file each"),
    ],
)
def test_bad_values_are_refused_by_option(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        BenchmarkConfig(**{"sources": ("a",), **settings})
    assert str(raised.value) == message


def test_sources_and_parts_reach_the_config() -> None:
    config = _parse(["benchmark", "photos", "s3://bucket/photos", "--parts", "decode", "path", "--engine", "torch"])
    assert config == BenchmarkConfig(sources=("photos", "s3://bucket/photos"), parts=("decode", "path"), engine="torch")
    assert _parse(["benchmark", "photos"]) == BenchmarkConfig(sources=("photos",), parts=PARTS)


def test_what_serve_needs_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "raycap.benchmark.serve", raising=False)
    monkeypatch.delitem(sys.modules, "raycap.benchmark.load", raising=False)
    monkeypatch.setitem(sys.modules, "httpx2", None)  # as if it were not installed
    with pytest.raises(ConfigurationError, match=r"not installed \(httpx2\): pip install 'raycap\[serve\]', or leave"):
        benchmark(BenchmarkConfig(sources=("no-such-folder",)))


# Rounds and ratios


def test_rounds_take_everything_in_turn() -> None:
    order: list[str] = []

    def noting(name: str) -> Measure:
        def run() -> Sample:
            order.append(name)
            return Sample(images_per_s=len(order), core_ms=None)

        return Measure(name=name, title=name, run=run)

    one, other = noting("one"), noting("other")
    measure([one, other], 3)
    assert order == ["one", "other"] * 3
    assert (one.rates, other.rates) == ([1, 3, 5], [2, 4, 6])
    assert one.core_ms is None


def test_a_ratio_is_of_one_round() -> None:
    # The machine is half as fast in the second round: the ratio does not see it.
    one, other = of("one", (20, None), (10, None), (20, None)), of("other", (10, None), (5, None), (10, None))
    assert quotients(one, other) == [2, 2, 2]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2, "lowest": 1, "highest": 3, "rounds": [3, 1, 2]}


def test_ratios_are_told_where_both_sides_were_measured() -> None:
    path, bulk = of("path_chosen", (40, 50), (20, 50)), of("bulk_1", (38, 60), (21, 60), title="bulk job from photos")
    found = ratios([path, bulk, of("search_3_batch_64", (1, 1), (1, 1))])
    assert list(found) == ["bulk_1"]
    assert found["bulk_1"]["title"] == "bulk job from photos over the tight loop"
    assert (found["bulk_1"]["above"], found["bulk_1"]["below"]) == ("bulk_1", "path_chosen")
    assert found["bulk_1"]["ratio"]["rounds"] == [0.95, 1.05]
    assert found["bulk_1"]["ratio"]["median"] == 1.0


def test_the_share_of_the_encoder_is_told() -> None:
    found = ratios([of("path_chosen", (40, None)), of("encode_chosen", (100, None))])
    assert found["encoder_share"]["ratio"]["median"] == 0.4


def test_work_is_timed_in_this_process() -> None:
    def work() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    sample = timed(work, 10)
    assert sample.core_ms is not None
    assert 5 <= sample.core_ms < 50
    assert sample.images_per_s <= 10 / 0.05


# Where the time goes


def test_a_bulk_run_is_shared_out_to_its_stages() -> None:
    floor = of_path(decode_ms=4, encode_ms=10, path_ms=44)
    assert floor == {"decode": 4, "encode": 10, "search": 30}
    costs = of_bulk([{"fetch": 5, "caption": 48, "write": 1, "ray": 6}], floor)
    assert costs == {"fetch": 1, "decode": 4, "encode": 12, "search": 36, "write": 1, "ray": 6}
    assert list(costs) == list(STAGES)
    assert sum(costs.values()) == 60
    # The middle of three runs.
    runs = [{"fetch": f, "caption": 40.0, "write": 0.0, "ray": 0.0} for f in (9.0, 3.0, 5.0)]
    assert of_bulk(runs, floor)["fetch"] == 1


def test_decoding_is_never_more_than_what_its_process_took() -> None:
    costs = of_bulk([{"fetch": 3, "caption": 40, "write": 0, "ray": 0}], of_path(4, 10, 44))
    assert (costs["fetch"], costs["decode"]) == (0, 3)


def test_seconds_of_stages_stand_in_for_cpu_time() -> None:
    costs = of_bulk([{"fetch": 7, "decode": 5, "caption": 40}], of_path(4, 10, 44))
    assert costs == {"fetch": 7, "decode": 5, "encode": 10, "search": 30}


def test_costs_need_the_stages_and_the_loop() -> None:
    measures = [
        of("decode", (1, 4.0)),
        of("encode_chosen", (1, 10.0)),
        of("path_chosen", (1, 44.0)),
        of("bulk_1", (1, 60.0)),
    ]
    workers = {"bulk_1": [{"fetch": 5.0, "caption": 48.0, "write": 1.0, "ray": 6.0}]}
    assert {title: sum(costs.values()) for title, costs in core_ms(measures, workers).items()} == {
        "tight loop": 44,
        "bulk_1": 60,
    }
    assert core_ms(measures[1:], workers) == {}


def test_the_steady_part_begins_after_the_first_batch() -> None:
    times_s = np.array([10.0, 10.1, 12, 13, 14, 15])
    assert steady(times_s[::-1], 2) == (4, 10.1, 15.0)
    for few in (times_s[:2], np.array([1.0, 1.0, 1.0])):
        with pytest.raises(ConfigurationError, match="expected more images for bulk than one batch of 2"):
            steady(few, 2)


# CPU time of processes


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process that works until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass  # a-busy-process"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(not CpuClock.is_available(), reason="needs /proc")
def test_cpu_time_is_counted_by_what_processes_are(busy: subprocess.Popen[bytes]) -> None:
    def used_s() -> float:
        return processes_under(busy.pid)[busy.pid].cpu_s

    with CpuClock({"a-busy-process": "busy"}, other="rest") as clock:
        before, started = used_s(), time.time()
        wait_until(lambda: used_s() >= before + 0.3, "the process works")
    seconds = clock.between(started, time.time())
    assert set(seconds) == {"busy", "rest"}
    assert 0.2 <= seconds["busy"] <= used_s() + 0.01
    assert clock.between(started, started) == {"busy": 0, "rest": 0}


@pytest.mark.skipif(not CpuClock.is_available(), reason="needs /proc")
def test_only_what_was_started_here_counts(busy: subprocess.Popen[bytes]) -> None:
    found = processes_under(os.getpid())
    assert {os.getpid(), busy.pid} <= found.keys()
    assert os.getppid() not in found
    assert found[busy.pid].parent == os.getpid()
    assert "a-busy-process" in found[busy.pid].title


# The parts


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner(random_bundle(), device="cpu", engine="torch")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(NUM_IMAGES):
        (folder / f"{number}.jpg").write_bytes(encode(base_picture().resize((80 + number, 60)), "JPEG"))
    (folder / "0-broken.jpg").write_bytes(b"no picture")
    return folder


def test_images_are_those_that_can_be_read(photos: Path, captioner: Captioner, tmp_path: Path) -> None:
    assert read_images(open_store(str(photos)), captioner, 3) == [(photos / f"{n}.jpg").read_bytes() for n in range(3)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="expected images to measure with, found none"):
        read_images(open_store(str(tmp_path / "empty")), captioner, 3)


def names(config: BenchmarkConfig, bundle: Bundle, files: list[bytes]) -> list[str]:
    measures = part_measures(config, engines_of(bundle, config), files)
    measure(measures, 1)
    assert all(rate > 0 for each in measures for rate in each.rates)
    return [each.name for each in measures]


def test_every_part_is_measured(photos: Path, captioner: Captioner) -> None:
    files = read_images(open_store(str(photos)), captioner, 9)
    config = BenchmarkConfig(sources=("a",), batch_size=2, device="cpu", engine="torch")
    assert names(config, random_bundle(), files) == [
        *("decode", "encode_chosen", "encode_plain", "search_1_batch_64", "search_3_batch_64", "search_5_batch_64"),
        *("search_3_batch_1", "search_3_batch_8", "path_chosen", "path_plain"),
        *("path_1_batch_64", "path_3_batch_64", "path_3_batch_1"),
    ]


def test_the_chosen_engine_is_measured_beside_pytorch(photos: Path, captioner: Captioner) -> None:
    pytest.importorskip("onnxruntime")
    files = read_images(open_store(str(photos)), captioner, 9)
    config = BenchmarkConfig(sources=("a",), parts=("encode",), device="cpu", engine="onnx")
    assert names(config, random_bundle(), files) == ["encode_chosen", "encode_torch", "encode_plain"]


def test_the_encoder_is_measured_in_whole_batches(photos: Path, captioner: Captioner) -> None:
    files = read_images(open_store(str(photos)), captioner, 9) * 14
    config = BenchmarkConfig(sources=("a",), parts=("encode",), batch_size=len(files), device="cpu", engine="torch")
    engines = engines_of(random_bundle(), config)
    network, sizes = engines["chosen"].network, []

    def features(pixels_BSSC: Tensor) -> Any:
        sizes.append(len(pixels_BSSC))
        return type(network).features(network, pixels_BSSC)

    network.features = features  # type: ignore[assignment, method-assign]
    measure(part_measures(config, {"chosen": engines["chosen"]}, files), 1)
    assert set(sizes) == {len(files)}


def test_plain_pytorch_is_the_network_as_it_is() -> None:
    bundle = random_bundle()
    engines = engines_of(bundle, BenchmarkConfig(sources=("a",), device="cpu", engine="torch"))
    assert engines["chosen"] is engines["torch"]
    assert engines["plain"].network.state_dict().keys() == bundle.network.state_dict().keys()
    assert not any("running_mean" in name for name in engines["torch"].network.state_dict())


def test_captions_are_compared(photos: Path, captioner: Captioner) -> None:
    files = read_images(open_store(str(photos)), captioner, 9)
    other = Captioner(random_bundle(seed=1), device="cpu", engine="torch")
    assert share_of_equal_captions(captioner, captioner, files, 2) == 1
    assert share_of_equal_captions(captioner, other, files, 2) < 1


def test_an_ensemble_is_measured_too(photos: Path, captioner: Captioner) -> None:
    one, other = random_bundle(), random_bundle(seed=1)
    bundle = Bundle(
        network=EnsembleNetwork.of([one.network, other.network]),  # type: ignore[list-item]
        vocabulary=one.vocabulary,
        preprocessing=one.preprocessing,
        decoding=one.decoding,
    )
    files = read_images(open_store(str(photos)), captioner, 9)
    config = BenchmarkConfig(sources=("a",), parts=("encode", "search"), device="cpu", engine="torch")
    assert names(config, bundle, files)[:3] == ["encode_chosen", "encode_plain", "search_1_batch_64"]


# Tables and page


@pytest.fixture
def result() -> dict[str, Any]:
    evil = "bulk job from <script>alert(1)</script> [red]x[/red]"
    measures = [
        of("decode", (250, 4.0)),
        of("encode_chosen", (100, 10.0), title="encoder, engine onnx"),
        of("path_chosen", (41.26, 44.0), title="tight loop, engine onnx"),
        of("bulk_1", (38, None), title=evil),
    ]
    return {
        "date": "2031-02-03T04:05:06+00:00",
        "model_id": "a-model",
        "engine": "onnx",
        "device": "cpu",
        "num_images": 64,
        "measurements": {each.name: each.to_dict() for each in measures},
        "ratios": ratios(measures),
        "share_of_equal_captions": 0.996,
        "loads": load_medians([[LOAD]]),
        "core_ms_per_image": core_ms(measures, {"bulk_1": [{"fetch": 7.0, "decode": 5.0, "caption": 40.0}]}),
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gb": 24.6, "gpu": None, "system": "Linux 6"},
        "versions": {"raycap": "1.2.3"},
        "settings": {"sources": ("photos",), "repeats": 1, "batch_size": 32},
    }


def test_tables_have_the_numbers(result: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_result(result, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "A CPU, 2 cores, 24.6 GB; 64 images; engine onnx" in text
    assert re.search(r"tight loop, engine onnx +41\.3 +41\.3 +41\.3 +44\.0", text)
    assert re.search(r"\[red\]x\[/red\] +38\.0 +38\.0 +38\.0 +- ", text)
    assert re.search(r"over the tight loop +0\.92 ", text)
    assert "the same caption as plain PyTorch: 99.6% of the images" in text
    assert re.search(r"150% of saturation +60\.0 +1,500\.0 +2,900\.0 +3,200\.0 +34\.0% +0\.0% +16: 25%, 32: 75%", text)
    assert re.search(r"tight loop +- +4\.0 +10\.0 +30\.0 +- +- +44\.0", text)
    assert re.search(r"\[/red\] +7\.0 +5\.0 +10\.0 +30\.0 +- +- +52\.0", text)


def test_loads_are_medians_of_their_rounds() -> None:
    rounds = [
        [LOAD | {"p99_ms": p99_ms, "batch_sizes": {"32": share}}] for p99_ms, share in ((1.0, 1), (9.0, 0.5), (2.0, 0))
    ]
    (found,) = load_medians(rounds)
    assert (found["p99_ms"], found["batch_sizes"], found["share"]) == (2.0, {"32": 0.5}, 1.5)


def test_page_has_the_numbers_and_loads_nothing(result: dict[str, Any]) -> None:
    page = render(result)
    assert "<script" not in page
    assert not re.search(r"""(src|href)=|url\(|style=["']""", page)
    assert "default-src 'none'" in page
    assert page.count("<td>41.3</td>") == 3
    assert "<td>0.92</td>" in page
    assert "<td>2,900.0</td><td>3,200.0</td><td>34.0%</td><td>0.0%</td><td>16: 25%, 32: 75%</td>" in page
    assert "99.6% of the images" in page
    # The longest bar is the fastest round; the stages of the costliest pipeline fill its bar.
    assert 'width="100.00%"' in page
    widths = [float(width) for width in re.findall(r'class="stage \w+"[^>]* width="([\d.]+)%"', page)]
    assert len(widths) == 3 + 4
    assert sum(widths[3:]) == pytest.approx(100, abs=0.05)
    assert sum(widths[:3]) == pytest.approx(100 * 44 / 52, abs=0.05)


def test_page_of_a_single_part(result: dict[str, Any]) -> None:
    decode = {"decode": result["measurements"]["decode"]}
    page = render(result | {"measurements": decode, "ratios": {}, "core_ms_per_image": {}, "loads": []})
    assert "Ratios" not in page
    assert "under load" not in page
    assert "Where the time goes" not in page
