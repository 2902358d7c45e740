"""`raycap status`: what an output says of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raycap.bulk import status as module
from raycap.bulk.commit import commit_chunk, write_json
from raycap.bulk.config import StatusConfig
from raycap.bulk.layout import CHUNK_ROWS, LOCK, RUN, SUMMARY, Round
from raycap.bulk.listing import make_manifest
from raycap.bulk.manifest import Manifest, ManifestReader
from raycap.bulk.status import status
from raycap.errors import ConfigurationError
from raycap.storage import LocalStore
from raycap.storage.lock import OutputLock
from tests.outputs import FakeSource, captioned, commit_all, join, numbered

NUM_ROWS = 4 * CHUNK_ROWS
FAILING = [f"{number:06d}.jpg" for number in range(0, NUM_ROWS, 10)]


@pytest.fixture
def output(tmp_path: Path) -> LocalStore:
    output = LocalStore(str(tmp_path))
    write_json(output, RUN, {"source": "/nowhere", "round": 0})
    return output


@pytest.fixture
def manifest(output: LocalStore) -> Manifest:
    return make_manifest(FakeSource(numbered(NUM_ROWS)), output, Round(0))


def told(output: LocalStore) -> dict[str, Any]:
    return status(StatusConfig(output=output.location))


def commit_some(output: LocalStore, manifest: Manifest, chunks: list[int]) -> None:
    for chunk in chunks:
        commit_chunk(captioned(ManifestReader(output, manifest).chunk(chunk), FAILING), output, manifest)


def test_run_that_lists(output: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    with OutputLock(output, LOCK, status=lambda: {"state": "listing", "num_listed": 12_000}, beat_s=0.05):
        assert told(output)["state"] == "listing"
    assert "12,000 objects so far" in capsys.readouterr().out


def test_run_that_captions(output: LocalStore, manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    commit_some(output, manifest, [0, 2])
    with OutputLock(output, LOCK, status=lambda: {"state": "captioning", "images_per_s": 8.0}, beat_s=0.05):
        result = told(output)
    assert (result["state"], result["num_done"], result["num_rows"]) == ("captioning", 2 * CHUNK_ROWS, NUM_ROWS)
    assert (result["images_per_s"], result["seconds_left"]) == (8.0, 2 * CHUNK_ROWS / 8)
    num_failed = sum(int(key[:6]) // CHUNK_ROWS in (0, 2) for key in FAILING)
    assert result["counts"] == {"ok": 2 * CHUNK_ROWS - num_failed, "failed": num_failed}
    assert result["errors"] == {"fetch_failed": num_failed}
    printed = capsys.readouterr().out
    assert f"512 of {NUM_ROWS:,} objects (50.0%)" in printed
    assert "1m04s" in printed


def test_run_that_died(output: LocalStore, manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    commit_some(output, manifest, [3])
    result = told(output)
    assert (result["state"], result["num_done"]) == ("stopped", CHUNK_ROWS)
    assert result["seconds_left"] is None
    assert "the same raycap caption command goes on from here" in capsys.readouterr().out


def test_only_some_chunk_files_are_opened(
    output: LocalStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "NUM_CHUNKS_READ", 2)
    commit_all(output, manifest, FAILING)
    result = told(output)
    assert (result["num_done"], result["num_rows_looked_at"]) == (NUM_ROWS, 2 * CHUNK_ROWS)
    assert f"of {2 * CHUNK_ROWS} looked at" in capsys.readouterr().out


def test_complete_output(output: LocalStore, manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    commit_all(output, manifest, FAILING)
    summary = join(output, manifest).to_dict() | {"round": 0, "images_per_s": 3.0, "finished_at": "2026-01-01"}
    write_json(output, SUMMARY, {"source": "/nowhere"} | summary)
    result = told(output)
    assert (result["state"], result["num_done"], result["num_rows"]) == ("complete", NUM_ROWS, NUM_ROWS)
    assert result["errors"] == {"fetch_failed": len(FAILING)}
    write_json(output, RUN, {"source": "/nowhere", "round": 1})  # another round was begun
    assert told(output)["state"] == "stopped"
    capsys.readouterr()
    status(StatusConfig(output=output.location, json=True))
    assert json.loads(capsys.readouterr().out)["state"] == "stopped"


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    for name in (".", "nowhere"):
        with pytest.raises(ConfigurationError, match="is not an output of raycap caption"):
            told(LocalStore(str(tmp_path / name)))
