"""How report.html behaves in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from raycap.bulk.report import write_report
from tests.hostile import base_picture, encode
from tests.report_outputs import EVIL_CAPTION, EVIL_KEY, NOW, image_row, row, summary_of, write_output

pytestmark = pytest.mark.integration


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
            captioned_at=NOW + timedelta(seconds=10 * i),
            alternatives=[{"caption": f"maybe a zebra {i}", "log_prob": -5.0}],
        )
        for i in range(28)
    ]
    rows.append(image_row(folder / "images", "evil", picture, key=EVIL_KEY, caption=EVIL_CAPTION, log_prob=None))
    rows.append(row("x" * 300 + ".jpg", "a dog " + "w" * 200))
    rows += [row("y" * 400, None, error="z" * 400), row("s.txt", None, status="skipped", error_code="not_an_image")]
    summary = summary_of(rows, source="s3://bucket/" + "long" * 60)
    return write_report(write_output(folder / "out", rows, summary=summary, settings={"model": "m" * 300}))


@pytest.fixture(scope="module")
def large_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000 captioned images, a fifth of them with the same caption, made in two stretches of time."""
    folder = tmp_path_factory.mktemp("large")
    picture = encode(base_picture().resize((64, 48)), "JPEG")
    rows = [
        image_row(
            folder / "images",
            f"{i:04d}.jpg",
            picture,
            caption="a dog runs" if i % 5 == 0 else f"a cat, number {i}",
            log_prob=-0.01 * (1 + (i * 7) % 997),
            captioned_at=NOW + timedelta(seconds=i if i < 600 else 9000 + i),
        )
        for i in range(1000)
    ]
    return write_report(write_output(folder / "out", rows, summary=summary_of(rows)), max_images=1000)


def load(browser: Any, location: str) -> None:
    """Load a page freshly in a window of a desktop."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    emulate(browser)
    browser.get("about:blank")  # ends what the page before, at first the browser's own, is still loading
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(Path(location).as_uri())
    # Chromedriver's own wait may end with the blank page.
    wait_until(browser, "return location.protocol === 'file:' && document.readyState === 'complete'")


@pytest.fixture
def page(browser: Any, browser_output: str) -> Any:
    """The report, freshly loaded."""
    load(browser, browser_output)
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


def test_browser_shows_the_first_tiles_and_more_on_demand(page: Any) -> None:
    assert len(shown_captions(page)) == 24
    assert css(page, "#shown")[0].text == "24 of 30 shown"
    more = css(page, "#more")[0]
    assert more.text == "Show all 30"
    more.send_keys("\n")
    assert len(shown_captions(page)) == 30
    assert not more.is_displayed()
    assert page.switch_to.active_element.tag_name == "summary"  # the keyboard goes on at the first new tile


def test_browser_search_filters_captions_keys_and_alternatives(page: Any) -> None:
    assert search_for(page, "CAT") == [f"a cat number {i}" for i in range(1, 28, 4)]
    assert css(page, "#shown")[0].text == "7 of 30 match"
    assert search_for(page, "cat 13") == ["a cat number 13"]
    assert search_for(page, "img 05") == ["a cat number 5"]
    assert search_for(page, "zebra 17") == ["a cat number 17"]
    assert search_for(page, "<script>") == [EVIL_CAPTION]
    assert search_for(page, "no such thing") == []
    assert css(page, "#none")[0].is_displayed()


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


def test_browser_word_buttons_search(page: Any) -> None:
    button = next(each for each in css(page, ".words .find") if each.text == "forest")
    button.send_keys("\n")
    assert shown_captions(page) == [f"a forest number {i}" for i in range(3, 28, 4)]
    assert page.switch_to.active_element.get_attribute("id") == "search"


def test_browser_frequent_captions_show_their_images_and_search(browser: Any, large_output: str) -> None:
    load(browser, large_output)
    entry = css(browser, ".ranking li")[0]
    images = entry.find_elements("css selector", "img")
    script = "return [...arguments[0].querySelectorAll('img')].map(each => each.complete && each.naturalWidth > 0)"
    assert browser.execute_script(script, entry) == [True] * 6
    assert [image.get_attribute("alt") for image in images] == [f"{i:04d}.jpg" for i in range(0, 30, 5)]
    assert entry.text.splitlines()[1:] == ["200 images · 20%", "200 in the gallery"]
    entry.find_element("css selector", ".find").send_keys("\n")
    assert shown_captions(browser) == ["a dog runs"] * 24
    assert css(browser, "#shown")[0].text == "200 of 1,000 match"


def test_browser_searches_and_sorts_a_thousand_images(browser: Any, large_output: str) -> None:
    load(browser, large_output)
    assert css(browser, "#shown")[0].text == "24 of 1,000 shown"
    assert search_for(browser, "cat 0777") == ["a cat, number 777"]
    assert len(search_for(browser, "cat")) == 24 and css(browser, "#shown")[0].text == "800 of 1,000 match"
    css(browser, "#search")[0].clear()
    css(browser, "#more")[0].click()
    assert len(shown_captions(browser)) == 1000
    shown = "return [...document.querySelectorAll('.tile:not([hidden])')].map(each => Number(each.dataset.confidence))"
    for order, reverse in (("low", False), ("high", True)):
        choose(browser, order)
        values = browser.execute_script(shown)
        assert len(values) == 1000 and values == sorted(values, reverse=reverse) and values[0] != values[-1]


def test_browser_draws_throughput(browser: Any, large_output: str) -> None:
    load(browser, large_output)
    boxes = (
        "const plot = document.querySelector('svg[aria-label^=\"Throughput over time\"]');"
        "const box = (each) => { const r = each.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom]; };"
        "return ['rect:not(.pause)', 'rect.pause'].map(which => [...plot.querySelectorAll(which)].map(box))"
        ".concat([[box(plot)]])"
    )
    bars, pauses, ((left, right, top, bottom),) = browser.execute_script(boxes)
    assert len(bars) > 50 and len(pauses) == 1
    for box in [*bars, *pauses]:
        assert left - 1 <= box[0] < box[1] <= right + 1 and top - 1 <= box[2] < box[3] <= bottom + 1
    assert not [bar for bar in bars if bar[0] < pauses[0][1] and bar[1] > pauses[0][0]]


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_text_has_contrast_in_both_schemes(page: Any, scheme: str) -> None:
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 to 1."""
    emulate(page, prefers_color_scheme=scheme)
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")
    assert page.execute_script(CONTRAST) == []
