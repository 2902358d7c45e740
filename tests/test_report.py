"""report.html: what it counts, that it survives hostile images and names, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raycap.bulk.report import REPORT, write_report
from raycap.bulk.report.digest import Digest, Sample, TopCounter, confidence
from raycap.errors import ConfigurationError
from raycap.storage import open_store
from tests.hostile import base_picture, encode, exif_with_orientation, hostile_files
from tests.s3 import S3Server

SCHEMA = pa.schema(
    [
        ("row_id", pa.int64()),
        *((name, pa.string()) for name in ("uri", "key", "etag")),
        ("size", pa.int64()),
        *((name, pa.string()) for name in ("status", "error_code", "error", "caption")),
        ("log_prob", pa.float64()),
        ("alternatives", pa.list_(pa.struct([("caption", pa.string()), ("log_prob", pa.float64())]))),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("model_id", pa.string()),
        ("captioned_at", pa.timestamp("us", tz="UTC")),
    ]
)
NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
EVIL = "<script>alert(1)</script>"
EVIL_KEY = f"{EVIL}\"'><img src=x onerror=alert(2)>.jpg"
EVIL_CAPTION = "a dog </li></script><script>document.title='owned'</script> & {{ 7 * 7 }}"


def row(name: str, caption: str | None = "a dog runs", **fields: Any) -> dict[str, Any]:
    """One row of the output; without a caption, a failed one."""
    ok = caption is not None
    return {
        "row_id": 0,
        "uri": f"/nowhere/{name}",
        "key": name,
        "size": None,
        "status": "ok" if ok else "failed",
        "error_code": None if ok else "corrupt",
        "error": None if ok else f"{name} is damaged",
        "caption": caption,
        "log_prob": -2.0 if ok else None,
        "alternatives": [] if ok else None,
        "model_id": "tiny@1",
        "captioned_at": NOW,
    } | fields


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA)


def write_output(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    summary: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    num_files: int = 1,
) -> str:
    """An output of `raycap caption` in `folder`; returns its location."""
    (folder / "captions").mkdir(parents=True)
    for part in range(num_files):
        pq.write_table(table(rows[part::num_files]), folder / f"captions/part-{part:05d}.parquet")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if settings is not None:
        (folder / "_raycap").mkdir()
        (folder / "_raycap/run.json").write_text(json.dumps(settings))
    return str(folder)


def summary_of(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {
        "status": "complete",
        "source": "s3://photos/2026",
        "model_id": "tiny@1",
        "num_objects": len(rows),
        "started_at": "2026-03-01T12:00:00+00:00",
        "finished_at": "2026-03-01T12:31:00+00:00",
        "elapsed_s": 1860.0,
        "images_per_s": 12.34,
        "stage_s": {"fetch": 100.0, "decode": 300.0, "caption": 600.0},
        "num_files": 1,
        "raycap_version": "0.1.0",
    } | fields


def image_row(folder: Path, name: str, data: bytes, **fields: Any) -> dict[str, Any]:
    """A file of an image source, and its row."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return row(name) | {"uri": str(folder / name), "size": len(data)} | fields


class Page(HTMLParser):
    """What a browser would see of the report, as far as the tests ask."""

    def __init__(self, location: str) -> None:
        super().__init__()
        self.source = Path(location).read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {}
        self.text = ""
        self._open = ""
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.contents.setdefault(self._open, []).append(data)
        else:
            self.text += f" {data}"

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def report(output: str, **options: Any) -> Page:
    return Page(write_report(output, **options))


def thumbnail(attributes: dict[str, str | None]) -> Image.Image:
    head, data = (attributes["src"] or "").split(",", 1)
    assert head == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(data)))


# What is counted


def test_page_has_counts_source_model_and_rates(tmp_path: Path) -> None:
    rows = [row(f"{i}.jpg", size=1000) for i in range(7)] + [row(f"bad{i}.jpg", None) for i in range(25)]
    rows.append(row("notes.txt", None, status="skipped", error_code="not_an_image_name", error="a text file"))
    output = write_output(tmp_path / "out", rows, summary=summary_of(rows), num_files=3)
    location = write_report(output)
    assert location == str(tmp_path / "out" / REPORT)
    text = Page(location).text
    assert "Captioned 7 21% of 33" in text
    assert "Failed 25 76%" in text
    assert "Skipped 1 3.0%" in text
    assert "Images/s 12.3" in text
    assert "Source size 7.0 kB" in text
    for expected in ("s3://photos/2026", "tiny@1", "2026-03-01 12:31 UTC", "31 min"):
        assert expected in text
    assert "not finished" not in text and "add up" not in text


def test_failures_have_count_example_and_up_to_20_keys(tmp_path: Path) -> None:
    rows = [row(f"bad{i:02d}.jpg", None) for i in range(25)] + [row("empty.jpg", None, error_code="empty", error=None)]
    text = report(write_output(tmp_path / "out", rows, num_files=2)).text
    failures = text[text.index("Objects without a caption") :]
    assert "corrupt 25 bad00.jpg is damaged First 20 of the files" in failures
    assert len(re.findall(r"bad\d\d\.jpg(?! is)", failures)) == 20
    assert "empty 1 no message 1 file empty.jpg" in failures


def test_frequent_captions_and_words(tmp_path: Path) -> None:
    captions = ["a dog runs"] * 5 + ["The Dog's ball."] * 2 + ["a man in a hat"]
    rows = [row(f"{i}.jpg", caption) for i, caption in enumerate(captions)]
    text = report(write_output(tmp_path / "out", rows)).text
    assert "3 different captions, 38% of all. a dog runs 5 · 62% The Dog's ball. 2 · 25%" in text
    assert "9 different words" in text  # a, dog, runs, the, dog's, ball, man, in, hat
    assert "dog 5 runs 5 dog's 2 ball 2 man 1 hat 1" in text


def test_digest_does_not_depend_on_how_rows_are_batched() -> None:
    random = np.random.default_rng(3)
    words = ["dog", "man", "ball", "red", "runs", "snow"]
    rows = [
        row(f"{i:03d}", " ".join(random.choice(words, random.integers(1, 9))), log_prob=-float(random.uniform(0.1, 20)))
        if i % 7
        else row(f"{i:03d}", None)
        for i in range(400)
    ]
    whole, parts = Digest(max_images=20, seed=1), Digest(max_images=20, seed=1)
    whole.add(table(rows))
    for start in range(0, len(rows), 33):
        parts.add(table(rows[start : start + 33]))
    assert whole.sample.rows() == parts.sample.rows()
    assert whole.captions.counts == parts.captions.counts and whole.failures == parts.failures
    ok = [each for each in rows if each["status"] == "ok"]
    assert whole.words.counts == Counter(word for each in ok for word in each["caption"].split())
    assert parts.lengths.tolist() == np.bincount([len(each["caption"].split()) for each in ok], minlength=41).tolist()
    steps = [int(1000 * (confidence(each["caption"], each["log_prob"]) or 0)) for each in ok]
    assert parts.confidences.tolist() == np.bincount(steps, minlength=1000).tolist()


def test_confidence_is_the_geometric_mean_over_words_and_end() -> None:
    assert confidence("a dog runs", math.log(0.5**3 * 0.25)) == pytest.approx((0.5**3 * 0.25) ** (1 / 4))
    assert confidence("", math.log(0.3)) == pytest.approx(0.3)
    assert confidence("a dog", None) is None
    assert confidence("a dog", -math.inf) is None


def test_top_counter_is_bounded_and_its_error_is_known() -> None:
    random = np.random.default_rng(0)
    values = [f"v{n}" for n in random.zipf(1.3, 20_000)]
    counter, exact = TopCounter(capacity=50), Counter(values)
    for start in range(0, len(values), 700):
        counter.add(pa.chunked_array([values[start : start + 700]]))
        assert len(counter.counts) <= 100
    assert 0 < counter.error <= len(values) / 50
    for value, count in exact.items():
        assert count - counter.error <= counter.counts[value] <= count
    assert [value for value, _ in counter.counts.most_common(3)] == [value for value, _ in exact.most_common(3)]


def test_sample_is_uniform() -> None:
    hits = np.zeros(30)
    for seed in range(600):
        sample = Sample(6, seed)
        for start in range(0, 30, 8):
            keys = [f"{i:02d}" for i in range(start, min(start + 8, 30))]
            sample.add(pa.table({"key": keys, "uri": keys}))
        assert len(sample.rows()) == 6
        hits[[int(each["key"]) for each in sample.rows()]] += 1
    assert hits.min() > 80 and hits.max() < 160  # 120 expected, standard deviation 10


def test_max_images(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out", [row(f"{i:03d}.jpg", f"dog {i}") for i in range(50)])
    assert report(output, max_images=10).source.count('class="tile"') == 10
    assert report(output, max_images=100).source.count('class="tile"') == 50
    assert report(output, max_images=0).source.count('class="tile"') == 0

    def keys(seed: int) -> list[str]:
        return re.findall(r"<bdi>(\d+\.jpg)</bdi>", report(output, max_images=10, seed=seed).source)

    assert keys(1) == keys(1) != keys(2)
    with pytest.raises(ConfigurationError, match="max_images"):
        write_report(output, max_images=-1)


# Odd outputs


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda path: (path / "captions").mkdir(parents=True)])
def test_no_captions_is_a_configuration_error(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"out is not an output of raycap caption: no captions/ here"):
        write_report(str(tmp_path / "out"))
    assert not (tmp_path / "out" / REPORT).exists()


def test_foreign_and_damaged_parquet_are_configuration_errors(tmp_path: Path) -> None:
    output = Path(write_output(tmp_path / "out", [row("1.jpg")]))
    part = output / "captions/part-00000.parquet"
    pq.write_table(pa.table({"key": ["1.jpg"], "text": ["a dog"]}), part)
    with pytest.raises(ConfigurationError, match=r"part-00000\.parquet was not written by raycap: no column alternat"):
        write_report(str(output))
    part.write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigurationError, match=r"part-00000\.parquet is no readable Parquet file"):
        write_report(str(output))


def test_unfinished_run_says_so_and_shows_its_chunks(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out", [row("1.jpg", "a dog"), row("2.jpg", "a cat")])
    page = report(output)
    assert "This run has not finished" in page.text and "2 rows" in page.text and "a cat" in page.text
    (tmp_path / "out/captions").rename(tmp_path / "out/chunks")
    (tmp_path / "out/_raycap").mkdir()
    (tmp_path / "out/chunks").rename(tmp_path / "out/_raycap/chunks")
    (tmp_path / "out/_raycap/run.json").write_text(json.dumps({"source": "s3://photos/unfinished"}))
    page = report(output)
    assert "This run has not finished" in page.text and "a cat" in page.text and "s3://photos/unfinished" in page.text


def test_no_rows_at_all_and_no_captioned_row(tmp_path: Path) -> None:
    page = report(write_output(tmp_path / "none", [], summary=summary_of([])))
    assert "No image has a caption." in page.text and "None: every object has a caption." in page.text
    page = report(write_output(tmp_path / "bad", [row("1.jpg", None)]))
    assert "No captions yet." in page.text and "1.jpg is damaged" in page.text


def test_summary_that_contradicts_the_captions_is_pointed_out(tmp_path: Path) -> None:
    rows = [row("1.jpg")]
    page = report(write_output(tmp_path / "out", rows, summary=summary_of(rows, num_objects=5)))
    assert "The rows do not add up" in page.text


# The images


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


# The file


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


@pytest.mark.integration
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


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "window-size=1200,900", "disable-dev-shm-usage"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


NAMES = ["beach", "cat", "dog", "forest"]


@pytest.fixture(scope="module")
def browser_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """30 captioned images, two of them hostile by name, and a failure with a very long name."""
    folder = tmp_path_factory.mktemp("report")
    picture = encode(base_picture(), "JPEG")
    rows = [
        image_row(
            folder / "images",
            f"{i:02d}.jpg",
            picture,
            key=f"photos/img {i:02d}.jpg",
            caption=f"a {NAMES[i % 4]} number {i}",
            log_prob=-0.2 * (1 + (i * 7) % 30),
            alternatives=[{"caption": f"maybe a zebra {i}", "log_prob": -5.0}],
        )
        for i in range(28)
    ]
    rows.append(image_row(folder / "images", "evil", picture, key=EVIL_KEY, caption=EVIL_CAPTION, log_prob=None))
    rows.append(row("x" * 300 + ".jpg", "a dog " + "w" * 200))
    rows += [row("y" * 400, None, error="z" * 400), row("s.txt", None, status="skipped", error_code="not_an_image")]
    summary = summary_of(rows, source="s3://bucket/" + "long" * 60)
    return write_report(write_output(folder / "out", rows, summary=summary, settings={"model": "m" * 300}))


@pytest.fixture
def page(browser: Any, browser_output: str) -> Any:
    """The report, freshly loaded in a window of a desktop."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    emulate(browser)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(Path(browser_output).as_uri())
    return browser


def emulate(page: Any, **features: str) -> None:
    """Media features of the user; without smooth scrolling, during which nothing can be clicked."""
    values = {"prefers-reduced-motion": "reduce"} | {name.replace("_", "-"): value for name, value in features.items()}
    settings = [{"name": name, "value": value} for name, value in values.items()]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": settings})


def css(page: Any, selector: str) -> list[Any]:
    return list(page.find_elements("css selector", selector))


def shown_captions(page: Any) -> list[str]:
    script = "return [...document.querySelectorAll('.tile:not([hidden]) .caption')].map(each => each.textContent)"
    return list(page.execute_script(script))


def search_for(page: Any, text: str) -> list[str]:
    field = css(page, "#search")[0]
    field.clear()
    field.send_keys(text)
    return shown_captions(page)


def choose(page: Any, value: str) -> None:
    css(page, f"#sort option[value={value}]")[0].click()


@pytest.mark.integration
def test_browser_runs_the_page_without_errors_requests_or_foreign_script(page: Any, browser_output: str) -> None:
    assert page.title.endswith("raycap report")
    css(page, "#more")[0].click()
    page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.execute_script("return document.querySelectorAll('script').length") == 1
    loaded = (
        "return [...document.images].every(each => (each.loading = 'eager', each.complete && each.naturalWidth > 0))"
    )
    wait_until(page, loaded)
    assert EVIL_CAPTION in shown_captions(page)
    assert EVIL_KEY in [each.get_attribute("textContent") for each in css(page, ".key")]
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("data:")} == {Path(browser_output).as_uri()}


@pytest.mark.integration
def test_browser_policy_blocks_injected_script_and_network(page: Any) -> None:
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.owned = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
    )
    assert page.execute_script("return window.owned") is None
    messages = " ".join(entry["message"] for entry in page.get_log("browser"))
    assert "script-src" in messages and "img-src" in messages


def wait_until(page: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 30).until(lambda driver: driver.execute_script(script))


@pytest.mark.integration
def test_browser_shows_the_first_tiles_and_more_on_demand(page: Any) -> None:
    assert len(shown_captions(page)) == 24
    assert css(page, "#shown")[0].text == "24 of 30 shown"
    more = css(page, "#more")[0]
    assert more.text == "Show all 30"
    more.send_keys("\n")
    assert len(shown_captions(page)) == 30
    assert not more.is_displayed()
    assert page.switch_to.active_element.tag_name == "summary"  # the keyboard goes on at the first new tile


@pytest.mark.integration
def test_browser_search_filters_captions_keys_and_alternatives(page: Any) -> None:
    assert search_for(page, "CAT") == [f"a cat number {i}" for i in range(1, 28, 4)]
    assert css(page, "#shown")[0].text == "7 of 30 match"
    assert search_for(page, "cat 13") == ["a cat number 13"]
    assert search_for(page, "img 05") == ["a cat number 5"]
    assert search_for(page, "zebra 17") == ["a cat number 17"]
    assert search_for(page, "<script>") == [EVIL_CAPTION]
    assert search_for(page, "no such thing") == []
    assert css(page, "#none")[0].is_displayed()


@pytest.mark.integration
def test_browser_sorts(page: Any) -> None:
    css(page, "#more")[0].click()
    confidences = (
        "return [...document.querySelectorAll('.tile')].map(each => each.dataset.confidence)"
        ".filter(each => each !== '').map(Number)"
    )
    choose(page, "low")
    values = page.execute_script(confidences)
    assert len(values) == 29 and values == sorted(values)
    assert shown_captions(page)[-1] == EVIL_CAPTION  # without a confidence: last either way
    choose(page, "high")
    values = page.execute_script(confidences)
    assert values == sorted(values, reverse=True)
    assert shown_captions(page)[-1] == EVIL_CAPTION
    choose(page, "caption")
    cats = [each for each in shown_captions(page) if "cat" in each]
    assert cats == [f"a cat number {i}" for i in range(1, 28, 4)]  # 5 before 13
    assert shown_captions(page)[0] == "a beach number 0"
    choose(page, "key")
    keys = [each.get_attribute("textContent") for each in css(page, ".key")]
    assert keys == sorted(keys)


@pytest.mark.integration
def test_browser_keyboard(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    body = css(page, "body")[0]
    body.send_keys("/")
    active = page.switch_to.active_element
    assert active.get_attribute("id") == "search" and active.get_attribute("value") == ""
    active.send_keys("forest/")
    assert active.get_attribute("value") == "forest/"
    active.send_keys(Keys.ESCAPE)
    assert active.get_attribute("value") == "" and len(shown_captions(page)) == 24
    active.send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("id") == "sort"
    page.switch_to.active_element.send_keys(Keys.TAB)
    summary = page.switch_to.active_element
    assert summary.tag_name == "summary"
    details = summary.find_element("xpath", "..")
    where = details.find_element("css selector", ".where")
    assert not where.is_displayed()
    summary.send_keys(Keys.ENTER)
    assert where.is_displayed() and details.get_attribute("open") is not None


@pytest.mark.integration
def test_browser_word_buttons_search(page: Any) -> None:
    button = next(each for each in css(page, ".words .find") if each.text == "forest")
    button.send_keys("\n")
    assert shown_captions(page) == [f"a forest number {i}" for i in range(3, 28, 4)]
    assert page.switch_to.active_element.get_attribute("id") == "search"


@pytest.mark.integration
@pytest.mark.parametrize("width", [320, 375, 768, 1200])
def test_browser_has_no_horizontal_scroll(page: Any, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.refresh()
    css(page, "#more")[0].click()
    page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    sizes = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = page.execute_script(sizes)
    assert scroll <= client <= width


CONTRAST = """
const luminance = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const color = getComputedStyle(each).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
  return "rgb(255, 255, 255)";
};
const bad = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || element.closest("svg, script, .label, [hidden], .skip") || !element.getClientRects().length) continue;
  const [a, b] = [getComputedStyle(element).color, behind(element)].map(luminance).sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) bad.push([element.className, element.textContent.trim().slice(0, 30), ratio]);
}
return bad;
"""


@pytest.mark.integration
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_text_has_contrast_in_both_schemes(page: Any, scheme: str) -> None:
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 to 1."""
    emulate(page, prefers_color_scheme=scheme)
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")
    assert page.execute_script(CONTRAST) == []
