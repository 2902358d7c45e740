"""docs/serving.md names options, codes and metrics that there are."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from raycap.benchmark.config import BenchmarkConfig
from raycap.serve.config import ServeConfig
from raycap.serve.schemas import Options
from tests.test_serve_grafana import exported

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "serving.md").read_text()
OF_OTHERS = {"--data-binary", "--json", "--help"}


def test_options_are_there() -> None:
    known = {f"--{each.name.replace('_', '-')}" for config in (ServeConfig, BenchmarkConfig) for each in fields(config)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", TEXT)) <= known | OF_OTHERS
    table = TEXT.partition("| option | |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(Options.model_fields)


def test_codes_are_all_of_the_endpoint() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "raycap" / "serve").glob("*.py"))
    given = set(re.findall(r"(?:ProblemError|retry_later)\(\s*\d{3},\s*\"(\w+)\"", sources))
    images = set(
        re.findall(
            r'^    code = "(\w+)"', (ROOT / "raycap" / "errors.py").read_text().partition("class ImageError")[2], re.M
        )
    )
    rows = re.findall(r"^\| [\d, ]+\| (.*) \|$", TEXT.partition("| status | codes |")[2], re.M)
    told = set(re.findall(r"`(\w+)`", " ".join(rows))) - {"request_id"}
    assert given | (images - {"image_error"}) <= told
    assert told <= given | images | {"not_found", "method_not_allowed", "bad_request"}


def test_metrics_are_there() -> None:
    assert {each.removesuffix("_total") for each in re.findall(r"`(raycap_\w+)`", TEXT)} == {
        re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in exported()
    }
