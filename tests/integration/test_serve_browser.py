"""The endpoint's page in a real browser, in front of the real application and the shipped model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from raycap.model.bundle import Bundle
from raycap.model.captioner import Captioner
from raycap.serve.config import ServeConfig
from raycap.serve.model import OnlineCaptioner
from tests.integration.test_report_browser import CONTRAST, browser, emulate, wait_until
from tests.serving import running

__all__ = ["browser"]  # the fixture

pytestmark = pytest.mark.integration

SAMPLES = Path(str(files("raycap"))) / "samples"
DOG = str(SAMPLES / "dog.jpg")
KEY = "a-key-of-32-characters-0123456789"


def shipped() -> OnlineCaptioner:
    """A captioner with the model that ships with raycap."""
    return OnlineCaptioner(Bundle.load(), device="cpu")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(ServeConfig(max_body_mb=1.0), shipped()) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Any:
    return opened(browser, address)


def opened(browser: Any, address: str) -> Any:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    emulate(browser)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(address)
    return browser


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def texts(page: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent.trim())"
    return list(page.execute_script(script, selector))


def answered(page: Any, number: int = 1) -> None:
    """Wait until so many images have their answer."""
    wait_until(
        page,
        f"return document.querySelectorAll('.card').length === {number} && !document.querySelector('.card[aria-busy]')",
    )


def upload(page: Any, *paths: str) -> None:
    one(page, "#file").send_keys("\n".join(paths))


def press(page: Any, key: str) -> None:
    """On whatever has the focus."""
    page.execute_script("window.focus()")
    webdriver = pytest.importorskip("selenium.webdriver")
    webdriver.ActionChains(page).send_keys(key).perform()


TAB = "\ue004"


@pytest.fixture(scope="module")
def expected() -> Callable[[str], str]:
    captioner = Captioner.load(device="cpu")
    return lambda path: captioner.caption([captioner.prepare(Path(path).read_bytes())])[0].text


def test_an_uploaded_photo_gets_its_caption(page: Any, expected: Callable[[str], str]) -> None:
    upload(page, DOG)
    answered(page)
    assert texts(page, ".caption") == [expected(DOG)]
    assert one(page, ".picture img").get_attribute("alt") == expected(DOG)
    assert page.execute_script("return document.querySelector('.picture img').naturalWidth") > 0
    rows = texts(page, "tbody td")
    assert rows[0] == expected(DOG)
    assert len(rows) >= 4, "the caption and its alternatives, with probabilities"
    assert all(re.fullmatch(r"[\d.e-]+ %", each) for each in rows[1::2])
    assert len(set(rows[::2])) == len(rows[::2])
    assert page.get_log("browser") == [], "its own policy lets all of the page through"
    assert page.execute_script(CONTRAST) == []


def test_words_show_where_the_model_looked(page: Any) -> None:
    upload(page, DOG)
    answered(page)
    canvas = one(page, "canvas")
    shown = "const c = document.querySelector('canvas'); return c.hidden ? '' : c.toDataURL()"
    assert page.execute_script(shown) == ""
    words = page.find_elements("css selector", ".caption button")
    pictures = []
    words[0].click()
    pictures.append(page.execute_script(shown))
    press(page, "\ue014")  # the right arrow key
    assert page.switch_to.active_element == words[1]
    pictures.append(page.execute_script(shown))
    assert all(pictures)
    assert pictures[0] != pictures[1]
    assert [word.get_attribute("aria-pressed") for word in words[:2]] == ["false", "true"]
    assert canvas.size == one(page, ".picture img").size
    press(page, "\ue00c")  # Escape
    assert page.execute_script(shown) == ""


SHADES = """
const canvas = document.querySelector("canvas");
const { data } = canvas.getContext("2d").getImageData(0, canvas.height / 2, canvas.width, 1);
return [0.02, 0.5, 0.98].map((x) => data[4 * Math.round(x * canvas.width) + 3]);
"""
"""How dark the overlay is at the picture's left edge, in the middle, and at its right edge: 0 to 255."""


def test_the_overlay_lies_over_what_the_model_saw(browser: Any) -> None:
    bundle = Bundle.load()
    crops = replace(bundle, preprocessing=replace(bundle.preprocessing, resize="crop"))
    with running(ServeConfig(), OnlineCaptioner(crops, device="cpu")) as address:
        page = opened(browser, address)
        upload(page, DOG)
        answered(page)
        page.find_elements("css selector", ".caption button")[1].click()
        picture = one(page, ".picture img").size
        assert picture["width"] > 1.1 * picture["height"], "a part of it is cropped at both sides"
        left, middle, right = page.execute_script(SHADES)
        assert left == right == 217 > middle
        page.execute_script("draw(document.querySelector('canvas'), [[1]], [0.25, -1, 0.75, 2])")
        assert page.execute_script(SHADES) == [217, 0, 217]


def test_several_photos_and_other_beams(page: Any) -> None:
    page.execute_script("document.querySelector('#beams').value = '1'")
    upload(page, DOG, str(SAMPLES / "cat.jpg"))
    answered(page, 2)
    assert sorted(texts(page, "figcaption")) == ["cat.jpg", "dog.jpg"]
    assert len(texts(page, "tbody tr")) == 2, "greedy: one caption each"
    assert all("beam_size=1" in command for command in texts(page, ".copy code"))


DROP = """
const [base64, name, type, kind] = arguments;
const bytes = Uint8Array.from(atob(base64), each => each.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name, { type }));
const event = kind === 'paste'
  ? new ClipboardEvent('paste', { clipboardData: data, bubbles: true })
  : new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
document.body.dispatchEvent(event);
"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_photos_are_dropped_and_pasted(page: Any, kind: str, expected: Callable[[str], str]) -> None:
    import base64

    page.execute_script(DROP, base64.b64encode(Path(DOG).read_bytes()).decode(), "image.jpg", "image/jpeg", kind)
    answered(page)
    assert texts(page, ".caption") == [expected(DOG)]


def test_the_curl_command_is_the_request(page: Any, address: str, tmp_path: Path) -> None:
    photo = tmp_path / "it's a dog.jpg"
    photo.write_bytes(Path(DOG).read_bytes())
    upload(page, str(photo))
    answered(page)
    assert texts(page, ".copy code") == [
        f"curl -F 'image=@it'\\''s a dog.jpg' '{address}v1/caption?attention=true'",
    ]
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"], "origin": address})
    one(page, ".copy button").click()
    wait_until(page, "return document.querySelector('.copy button').textContent !== 'Copy as curl'")
    assert one(page, ".copy button").text in ("Copied", "Marked: press Ctrl-C")


def test_what_goes_wrong_is_said(page: Any, tmp_path: Path) -> None:
    broken, large = tmp_path / "broken.jpg", tmp_path / "large.jpg"
    broken.write_bytes(Path(DOG).read_bytes()[:2000])
    large.write_bytes(Path(DOG).read_bytes() + bytes(2_000_000))
    upload(page, str(broken))
    answered(page)
    assert "cut off" in texts(page, ".error")[0]
    assert one(page, ".error").is_displayed()
    assert not one(page, ".again").is_displayed(), "the same image would fail again"
    upload(page, str(large))
    answered(page, 2)
    assert one(page, ".card:first-child .error").text


def test_a_server_that_is_gone_is_said_and_asked_again(browser: Any, expected: Callable[[str], str]) -> None:
    with running(ServeConfig(), shipped()) as address:
        page = opened(browser, address)
    upload(page, DOG)
    answered(page)
    assert texts(page, ".error") == ["The server cannot be reached."]
    assert one(page, ".again").is_displayed()


def test_a_file_that_is_no_image_is_named_beside_those_that_are(page: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("not a picture")
    upload(page, DOG, str(notes))
    answered(page)
    assert texts(page, "#status") == ["No image file: notes.txt"]
    upload(page, DOG)
    answered(page, 2)
    assert texts(page, "#status") == [""]


def test_a_key_is_asked_for(browser: Any, tmp_path: Path, expected: Callable[[str], str]) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me {KEY}\n")
    with running(ServeConfig(keys_file=str(keys)), shipped()) as address:
        page = opened(browser, address)
        assert not one(page, "#key").is_displayed()
        upload(page, DOG)
        answered(page)
        assert "API key" in texts(page, ".error")[0]
        assert page.switch_to.active_element == one(page, "#key")
        one(page, "#key").send_keys(KEY)
        one(page, ".again").click()
        wait_until(page, "return document.querySelector('.caption').textContent.length > 5")
        assert texts(page, ".caption") == [expected(DOG)]
        assert KEY not in texts(page, ".copy code")[0]


def test_the_keyboard_alone_is_enough(page: Any) -> None:
    seen = []
    for _ in range(2):
        press(page, TAB)
        seen.append(page.switch_to.active_element.get_attribute("id"))
    assert seen == ["file", "beams"]
    upload(page, DOG)
    answered(page)
    words = len(texts(page, ".caption button"))
    reached = []
    for _ in range(words + 1):
        press(page, TAB)
        reached.append(page.switch_to.active_element.text)
    assert reached == [*texts(page, ".caption button"), "Copy as curl"]


@pytest.mark.parametrize("width", [320, 375, 1200])
def test_it_fits_the_screen(page: Any, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    upload(page, DOG)
    answered(page)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_by_day_and_by_night(browser: Any, address: str, scheme: str) -> None:
    page = opened(browser, address)
    emulate(page, prefers_color_scheme=scheme)
    upload(page, DOG)
    answered(page)
    assert page.execute_script(CONTRAST) == []
