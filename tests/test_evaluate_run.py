"""`raycap evaluate`: the files that it writes, and its page."""

from __future__ import annotations

import base64
import csv
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raycap.errors import ConfigurationError, StorageError
from raycap.evaluate import ALL_METRICS, Scores
from raycap.evaluate.config import EvaluateConfig
from raycap.evaluate.overlay import attention_overlay, shrink
from raycap.evaluate.page import render
from raycap.evaluate.rows import ScoredImage, best_and_worst
from raycap.evaluate.run import evaluate
from raycap.evaluate.tiles import Tile
from raycap.model.captioner import Captioner
from tests.hostile import base_picture, encode
from tests.report_outputs import EVIL, EVIL_CAPTION, EVIL_KEY, Page
from tests.small import lite0_bundle

REFERENCES = {
    3: ["a red dog runs", "the dog runs fast"],
    1: ["two men play football", "men play"],
    2: ["a crowd at the beach", 'people say "hello"'],
    7: ["a cat sleeps", "a cat on a sofa"],
}


@pytest.fixture
def no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without METEOR, which takes seconds to start."""
    monkeypatch.setenv("PATH", str(tmp_path))


pytestmark = pytest.mark.usefixtures("no_java")


def write_annotations(folder: Path, references: dict[int, list[str]]) -> str:
    entries = [{"image_id": id_, "caption": text} for id_, texts in references.items() for text in texts]
    images = [{"id": id_, "file_name": f"{id_}.png"} for id_ in references]
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": entries}))
    return str(folder / "annotations.json")


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Four annotated images that differ; one of them, 2.png, is damaged."""
    (tmp_path / "images").mkdir()
    for place, number in enumerate(REFERENCES):
        picture = base_picture().rotate(90 * place, expand=True)
        (tmp_path / f"images/{number}.png").write_bytes(encode(picture, "PNG"))
    (tmp_path / "images/2.png").write_bytes(b"damaged")
    return {"annotations": write_annotations(tmp_path, REFERENCES), "images": str(tmp_path / "images")}


def saved(tmp_path: Path, kind: Any = "attention") -> str:
    lite0_bundle(kind).save(str(tmp_path / kind))
    return str(tmp_path / kind)


def decoded(uri: str | None) -> Image.Image:
    head, _, data = (uri or "").partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(data)))


# Files of scores


def test_json_holds_every_metric_of_every_image(tmp_path: Path, data: dict[str, str]) -> None:
    output, results = tmp_path / "scores.json", tmp_path / "results.json"
    model = saved(tmp_path)
    scores = evaluate(EvaluateConfig(**data, model=model, output=str(output), results_output=str(results)))
    content = json.loads(output.read_text())
    assert content["model_id"] == Captioner.load(model).model_id
    assert content["scores"] == {**scores.values, "meteor": None}
    assert [row["image_id"] for row in content["per_image"]] == list(REFERENCES)
    captions = {entry["image_id"]: entry["caption"] for entry in json.loads(results.read_text())}
    for row in content["per_image"]:
        image_id = row["image_id"]
        assert (row["file_name"], row["references"]) == (f"{image_id}.png", REFERENCES[image_id])
        assert row["caption"] == captions[image_id] and bool(row["caption"]) == (image_id != 2)
        assert {name: row[name] for name in ALL_METRICS if name != "meteor"} == scores.per_image[image_id]
        assert ("begin with b'damaged'" in (row["error"] or "")) == (image_id == 2)


def test_csv_has_one_row_for_each_image(tmp_path: Path) -> None:
    captions = {3: 'a "red" dog, fast', 1: "two men", 2: "=cmd()\nbeach", 7: ""}
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": id_, "caption": text} for id_, text in captions.items()]))
    annotations, output = write_annotations(tmp_path, REFERENCES), tmp_path / "scores.CSV"
    scores = evaluate(EvaluateConfig(annotations=annotations, results=str(results), output=str(output)))
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["image_id"]): row["caption"] for row in rows} == captions
    assert [json.loads(row["references"]) for row in rows] == list(REFERENCES.values())
    assert [float(row["cider_d"]) for row in rows] == [scores.per_image[id_]["cider_d"] for id_ in REFERENCES]
    assert list(rows[0])[:5] == ["image_id", "file_name", "caption", "references", "error"]


@pytest.mark.parametrize("option", ["output", "report", "results_output"])
def test_files_that_cannot_be_written_stop_it_at_once(tmp_path: Path, data: dict[str, str], option: str) -> None:
    (tmp_path / "file").write_text("")
    config = EvaluateConfig(**data, model="no such model", **{option: str(tmp_path / "file/under")})
    with pytest.raises(StorageError, match="file"):
        evaluate(config)


@pytest.mark.parametrize("option", ["output", "report", "results_output"])
def test_files_of_before_stay_when_it_fails(tmp_path: Path, data: dict[str, str], option: str) -> None:
    (tmp_path / "scores").write_text("of last week")
    config = EvaluateConfig(**data, model=str(tmp_path / "no such model"), **{option: str(tmp_path / "scores")})
    with pytest.raises(ConfigurationError, match="no such model"):
        evaluate(config)
    assert (tmp_path / "scores").read_text() == "of last week"
    (tmp_path / "scores").unlink()
    with pytest.raises(ConfigurationError, match="no such model"):
        evaluate(config)
    assert not (tmp_path / "scores").exists(), "nor is one left that looks like a result"


def test_a_folder_is_no_file_to_write(tmp_path: Path, data: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="expected the full path of one file, got the folder"):
        evaluate(EvaluateConfig(**data, model="no such model", output=str(tmp_path)))


def test_images_of_which_none_can_be_read_are_refused(tmp_path: Path, data: dict[str, str]) -> None:
    for image in Path(data["images"]).iterdir():
        image.write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"none of the 4 images can be read; the first: 3\.png: .*zero bytes"):
        evaluate(EvaluateConfig(**data, model=saved(tmp_path)))


def test_a_page_of_no_images_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--report-images must be at least 1, got 0"):
        EvaluateConfig(annotations="a.json", images="images", report="page.html", report_images=0)


@pytest.mark.parametrize("option", ["output", "results_output"])
def test_no_file_is_written_over_another(option: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a\.json is given twice; each file .* needs its own name"):
        EvaluateConfig(annotations="a.json", images="images", **{option: "a.json"})


# Which images


def scored(number: int, cider_d: float, rouge_l: float = 0.0, **fields: Any) -> ScoredImage:
    scores = {"rouge_l": rouge_l, "cider_d": cider_d}
    given: dict[str, Any] = {"file_name": f"{number}.jpg", "caption": "a dog", "references": ("a cat",)} | fields
    return ScoredImage(image_id=number, scores=scores, **given)


def test_best_and_worst_are_apart_and_in_order() -> None:
    images = [scored(1, 0.5), scored(2, 0.0, 0.1), scored(3, 2.0), scored(4, 0.0), scored(5, 1.0), scored(6, 0.0, 0.3)]
    unread = [scored(7, 0.0, caption="", error="no such file")]

    def chosen(images: list[ScoredImage], num_images: int) -> tuple[list[int], ...]:
        return tuple([image.image_id for image in part] for part in best_and_worst(images, num_images))

    assert chosen(images + unread, 2) == ([3, 5], [4, 2])
    assert chosen(images + unread, 24) == ([3, 5, 1], [4, 2, 6])
    assert chosen(images[:3], 24) == ([3, 1], [2])
    assert chosen(images[:1], 24) == ([1], [])
    assert chosen(unread, 24) == ([], [])


# The page


def test_the_page_shows_where_the_model_looked(tmp_path: Path, data: dict[str, str]) -> None:
    captioner = Captioner.load(saved(tmp_path))
    pixels = {id_: captioner.prepare(Path(data["images"], f"{id_}.png").read_bytes()) for id_ in (7, 3)}
    captions = {id_: caption.text for id_, caption in zip(pixels, captioner.caption([*pixels.values()]), strict=True)}
    write_annotations(tmp_path, REFERENCES | {7: [captions[7]]})  # so 7 is the best; of 1 and 3, both 0, 3 is last
    report = tmp_path / "page.html"
    scores = evaluate(EvaluateConfig(**data, model=saved(tmp_path), report=str(report), report_images=1))
    page = Page(str(report))

    images, words = iter(page.images()), re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    for image_id, pixels_HWC in pixels.items():
        picture = next(images)
        assert picture["alt"] == captions[image_id]
        assert is_close(picture, pixels_HWC.numpy())
        (weights_TRC,) = captioner.attention([pixels_HWC], [captions[image_id]]) or []
        for weights_RC in weights_TRC:
            assert is_close(next(images), attention_overlay(shrink(pixels_HWC.numpy()), weights_RC))
        assert f"CIDEr-D {100 * scores.per_image[image_id]['cider_d']:.1f}" in page.text
    assert next(images, None) is None
    assert words == [*captions[7].split(), "(end)", *captions[3].split(), "(end)"]
    for text in (captioner.model_id, data["annotations"], *REFERENCES[3], "where the model looked for each word"):
        assert text in page.text
    assert "1 image could not be read" in page.text and "2.png" in page.text


def is_close(image: dict[str, str | None], pixels_HWC: np.ndarray) -> bool:
    """Whether an image of the page shows these pixels, as far as a JPEG does: with its colours at half the size."""
    shown_HWC = np.asarray(decoded(image["src"]), int)
    return shown_HWC.shape == pixels_HWC.shape and np.abs(shown_HWC - pixels_HWC).mean() < 6


def test_a_model_without_attention_gives_pictures_without_maps(tmp_path: Path, data: dict[str, str]) -> None:
    evaluate(EvaluateConfig(**data, model=saved(tmp_path, "show_tell"), report=str(tmp_path / "page.html")))
    page = Page(str(tmp_path / "page.html"))
    assert [decoded(image["src"]).size for image in page.images()] == [(64, 64)] * 3
    assert "figcaption" not in page.source and "where the model looked" not in page.text


def test_captions_of_a_file_give_a_page_without_pictures(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": id_, "caption": texts[0]} for id_, texts in REFERENCES.items()]))
    annotations = write_annotations(tmp_path, REFERENCES)
    evaluate(EvaluateConfig(annotations=annotations, results=str(results), report=str(tmp_path / "page.html")))
    page = Page(str(tmp_path / "page.html"))
    assert page.images() == []
    assert str(results) in page.text
    for text in (text for texts in REFERENCES.values() for text in texts):
        assert text in page.text
    assert page.source.count('class="card tile bare"') == 4


def page_of(tmp_path: Path, images: list[ScoredImage], **options: Any) -> Page:
    values = {"cider_d": float(np.mean([image.scores["cider_d"] for image in images]))}
    per_image = {image.image_id: image.scores for image in images}
    scores = Scores(values=values, per_image=per_image, tokenizer="python", num_images=len(images), **options)
    best, worst = ([Tile(image) for image in part] for part in best_and_worst(images, 2))
    (tmp_path / "page.html").write_text(render({"Captions": EVIL}, scores, images, best, worst))
    return Page(str(tmp_path / "page.html"))


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    images = [
        scored(1, 1.0, file_name=EVIL_KEY, caption=EVIL_CAPTION, references=(EVIL_CAPTION, f"reference {EVIL}")),
        scored(2, 0.0, file_name=f"bad{EVIL}", caption="", error=f"got {EVIL}"),
    ]
    page = page_of(tmp_path, images)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "img" not in tags and tags.count("style") == 1
    assert EVIL not in page.source
    for text in (EVIL_KEY, EVIL_CAPTION, f"reference {EVIL}", f"bad{EVIL}", f"got {EVIL}"):
        assert text in page.text
    policy = next(a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    assert not re.search(r"@import|url\(", page.contents["style"][0])


def test_the_histogram_counts_every_image(tmp_path: Path) -> None:
    values = [0.0, 0.049, 0.05, 0.3, 0.31, 1.2]
    page = page_of(tmp_path, [scored(number, value) for number, value in enumerate(values)], unavailable=("meteor",))
    label = next(a["aria-label"] for tag, a in page.tags if tag == "svg" and "plot" in (a.get("class") or ""))
    assert label == "CIDEr-D of the images: 0 to 5: 2; 5 to 10: 1; 30 to 35: 2; 120 to 125: 1"
    assert "The mean of the images is 31.8, their median 17.5." in page.text
    assert "METEOR - " in page.text


@pytest.mark.parametrize(("value", "last"), [(0.0, "0 to 5"), (1.5, "150 to 160"), (10.0, "1000 to 1050")])
def test_the_histogram_holds_its_highest_value(tmp_path: Path, value: float, last: str) -> None:
    assert f"CIDEr-D of the images: {last}: 1" in page_of(tmp_path, [scored(1, value)]).source
