"""What the report counts over rows, in bounded memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raycap.bulk.report.digest import Digest, Distinct, Sample, TopCounter, confidence
from tests.report_outputs import report, row, table, write_output


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


def test_distinct_is_exact_until_it_is_full_and_near_afterwards() -> None:
    random = np.random.default_rng(0)
    values = [f"v{n}" for n in random.integers(0, 20_000, 30_000)]
    exact, near, other_order = Distinct(capacity=20_000), Distinct(capacity=2000), Distinct(capacity=2000)
    for start in range(0, len(values), 700):
        exact.add(pa.chunked_array([values[start : start + 700]]))
        near.add(pa.chunked_array([values[start : start + 700]]))
    other_order.add(pa.chunked_array([[*values[::-1], None]]))
    counts = Counter(values)
    num_unique = sum(count == 1 for count in counts.values())
    assert not exact.is_estimate and near.is_estimate
    assert (exact.num_values, exact.num_unique) == (len(counts), num_unique)
    assert near.num_values == pytest.approx(len(counts), rel=0.1)
    assert near.num_unique == pytest.approx(num_unique, rel=0.15)
    assert (near.num_values, near.num_unique) == (other_order.num_values, other_order.num_unique)


def test_estimates_are_called_so(tmp_path: Path) -> None:
    rows = [row(f"{i}.jpg", f"dog number {i // 2}") for i in range(60)]
    assert "30 different captions. 0% of the images have one" in report(write_output(tmp_path / "few", rows)).text
    rows = [row("1.jpg", f"dog number {i % 45_000}") for i in range(60_000)]
    text = report(write_output(tmp_path / "many", rows), max_images=0).text
    found = re.search(
        r"About ([\d,]+) different captions\. About (\d+)% of the images have one .* \(estimates\)\.", text
    )
    assert found is not None
    assert int(found[1].replace(",", "")) == pytest.approx(45_000, rel=0.03)
    assert int(found[2]) == pytest.approx(50, abs=2)
