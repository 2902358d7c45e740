"""The Grafana dashboard names what the endpoint tells, and all of it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from raycap.serve.backend import Result
from raycap.serve.metrics import Metrics, UnionOfMetrics

DASHBOARD = json.loads((Path(__file__).parents[1] / "cluster" / "grafana.json").read_text())
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
OF_PROMETHEUS = {"instance"}


def counted() -> Metrics:
    """Of a process in which everything has happened once."""
    metrics = Metrics()
    metrics.queue(lambda: 0)
    metrics.request("/v1/caption", 200, 0.1)
    metrics.failure("overloaded")
    metrics.captioned(
        "default",
        [Result(captions=(("a dog", -1.0),), attention_TRC=None, model_id="a", queue_s=0, model_s=0.1, batch_size=1)],
    )
    return metrics


def exported() -> dict[str, set[str]]:
    """Every series that /metrics has, with its labels."""
    series: dict[str, set[str]] = defaultdict(set)
    text = UnionOfMetrics({"a": counted().families()}).text()
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            series[sample.name] |= sample.labels.keys()
    return series


def test_every_series_and_label_of_the_dashboard_is_there() -> None:
    series = exported()
    shown = set()
    for target in TARGETS:
        names = set(re.findall(r"\braycap_\w+", target["expr"]))
        assert names
        assert names <= series.keys(), target["expr"]
        shown |= {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in names}
        labels = set(re.findall(r"(\w+)=~?\"", target["expr"]))
        for group in re.findall(r"\bby \(([^)]*)\)", target["expr"]):
            labels |= set(group.split(", "))
        for name in names:
            assert labels <= series[name] | OF_PROMETHEUS, target["expr"]
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels | OF_PROMETHEUS
    unshown = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in series} - shown
    assert not unshown


def test_the_numbers_of_several_processes_stand_side_by_side() -> None:
    first, second = counted(), counted()
    second.request("/v1/caption", 200, 0.1)
    text = UnionOfMetrics({"a": first.families(), "b": second.families()}).text().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families.keys() == {family.name for family in text_string_to_metric_families(first.text().decode())}
    assert all(family.documentation and family.type != "unknown" for family in families.values())
    requests = [sample for sample in families["raycap_requests"].samples if sample.name.endswith("_total")]
    assert {sample.labels["ingress"]: sample.value for sample in requests} == {"a": 1.0, "b": 2.0}
    assert text.count("# TYPE raycap_requests_total ") == 1


def test_panels_have_their_own_places_and_what_they_show_a_description() -> None:
    places = [tuple(panel["gridPos"][name] for name in "xy") for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    assert all(panel["title"] and panel["description"] for panel in DASHBOARD["panels"])
