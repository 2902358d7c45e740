"""API keys out of a file that changes, and how often each may ask."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from raycap.errors import ConfigurationError
from raycap.serve.keys import BURST_S, ApiKeys, RateLimit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# whose   key\nana  secret-of-ana\n\nben secret-of-ben\n")
    return file


def change(path: Path, text: str) -> None:
    stamp = path.stat().st_mtime_ns
    path.write_text(text)
    os.utime(path, ns=(stamp + 1, stamp + 1))  # whatever the clock of the file system


def test_each_key_has_its_name(path: Path) -> None:
    keys = ApiKeys(str(path))
    assert keys.name_of("secret-of-ana") == "ana"
    assert keys.name_of("secret-of-ben") == "ben"
    for wrong in ("", "ana", "secret-of-an", "secret-of-ana ", "# whose", "schlüssel", "\udcff"):
        assert keys.name_of(wrong) is None


def test_keys_change_with_their_file(path: Path) -> None:
    keys = ApiKeys(str(path))
    change(path, "ana new-secret-of-ana\n")
    assert keys.name_of("new-secret-of-ana") == "ana"
    assert keys.name_of("secret-of-ana") is None
    assert keys.name_of("secret-of-ben") is None


def test_a_file_that_is_wrong_later_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys(str(path))
    change(path, "ana\n")
    with caplog.at_level(logging.WARNING):
        assert keys.name_of("secret-of-ana") == "ana"
    assert "expected NAME KEY" in caplog.text
    path.unlink()
    assert keys.name_of("secret-of-ben") == "ben"
    path.write_text("ana newest\n")
    assert keys.name_of("newest") == "ana"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("ana\n", "line 1: expected NAME KEY"),
        ("ana one two\n", "line 1: expected NAME KEY"),
        ("ana one\nana two\n", "line 2: expected NAME KEY"),
    ],
)
def test_a_wrong_file_is_refused_without_repeating_it(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as error:
        ApiKeys(str(path))
    assert "one" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        ApiKeys(str(tmp_path / "none"))


def test_a_bucket_fills_with_time() -> None:
    now = [100.0]
    limit = RateLimit(4.0, clock=lambda: now[0])
    burst = int(4 * BURST_S)
    assert [limit.take("ana") for _ in range(burst)] == [0.0] * burst
    assert limit.take("ana") == pytest.approx(0.25)
    assert limit.take("ben") == 0.0, "each has a bucket"
    now[0] += 0.2
    assert limit.take("ana") == pytest.approx(0.05)
    now[0] += 0.06
    assert limit.take("ana") == 0.0
    now[0] += 1000
    assert [limit.take("ana") for _ in range(burst)] == [0.0] * burst, "no more than the bucket holds"
    assert limit.take("ana") > 0


def test_slow_rates_still_let_one_through() -> None:
    now = [0.0]
    limit = RateLimit(0.1, clock=lambda: now[0])
    assert limit.take("ana") == 0.0
    assert limit.take("ana") == pytest.approx(10)
    now[0] += 10.001
    assert limit.take("ana") == 0.0
