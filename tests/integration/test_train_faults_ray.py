"""Trainings that are killed end with the weights of those that are not; on disk and on S3."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from raycap.model.bundle import Bundle
from raycap.storage import open_store
from tests.commands import Command, process_title, wait_until
from tests.integration.test_train_ray import write_dataset
from tests.s3 import S3Server

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_aws_settings"), pytest.mark.timeout(900)]

SMALL = """
size-px = 64
hidden-size = 32
attention-size = 16
min-count = 1
max-length = 5
batch-size = 4
learning-rate = 0.01
log-every-s = 0
num-workers = 2
cpus-per-worker = 1
"""
# Two batches an epoch, a checkpoint after each: ten chances to be killed at.
STAGES = ["--epochs", "3", "--scst-epochs", "2", "--checkpoint-every", "1"]
ALL_STAGES = ["--epochs", "1", "--fine-tune-epochs", "1", "--scst-epochs", "1"]


def arguments(directory: Path, data: str, output: str, run_dir: str) -> list[str]:
    """Of a training on the files of `data`; its small settings go into `directory`."""
    (directory / "small.toml").write_text(SMALL)
    captions = f"{data}/captions.json"
    return [
        "train", "--config", str(directory / "small.toml"), "--images", f"{data}/images", "--annotations", captions,
        "--val-annotations", captions, "--output", output, "--run-dir", run_dir,
    ]  # fmt: skip


def checkpoints_seen(run: Path, seen: set[str]) -> int:
    """The number of different checkpoints that Ray Train has taken note of, a second or two after they are written."""
    with suppress(OSError, ValueError):  # not there yet; being written
        noted = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
        seen.add(json.dumps(noted["latest_checkpoint_result"]))
    return len(seen)


def test_killed_workers_and_a_killed_driver_change_nothing(tmp_path: Path, start: Callable[..., Command]) -> None:
    write_dataset(tmp_path)
    runs = tmp_path / "runs"

    def command(name: str) -> Command:
        return start(*arguments(tmp_path, str(tmp_path), str(tmp_path / name), str(runs)), *STAGES)

    code, _, err = command("undisturbed").finish()
    assert code == 0, err

    seen: set[str] = set()
    disturbed = command("disturbed")
    wait_until(lambda: checkpoints_seen(runs / "disturbed", seen) >= 2, "two checkpoints")
    workers = [pid for pid in disturbed.others() if process_title(pid).startswith("ray::RayTrainWorker")]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: checkpoints_seen(runs / "disturbed", seen) >= 5, "five checkpoints")
    disturbed.process.kill()
    _, _, err = disturbed.finish()
    assert "a worker failed" in err
    assert "resuming" in err
    wait_until(lambda: not disturbed.others(), "the end of what the command had started")

    again = command("disturbed")
    code, _, err = again.finish()
    assert code == 0, err
    assert "resuming" in err
    assert Bundle.load(str(tmp_path / "disturbed")).model_id == Bundle.load(str(tmp_path / "undisturbed")).model_id


def test_everything_may_be_on_s3(
    tmp_path: Path, s3_server: S3Server, start: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    write_dataset(tmp_path)
    bucket = f"s3://{s3_server.make_bucket()}"
    for path in sorted(tmp_path.rglob("*.*")):
        open_store(bucket).write(str(path.relative_to(tmp_path)), path.read_bytes())
    given = arguments(tmp_path, bucket, f"{bucket}/models/tiny", f"{bucket}/runs")
    given += [*ALL_STAGES, "--cache-dir", str(tmp_path / "cache")]
    code, _, err = start(*given, env=s3_server.env()).finish()
    assert code == 0, err
    keys = {info.key for info in open_store(f"{bucket}/runs").list()}
    assert any(key.startswith("tiny/tensorboard/events.") for key in keys)
    assert any(key.startswith("tiny/checkpoint_") for key in keys)
    assert any(key.startswith("features/") for key in keys)
    model_id = Bundle.load(f"{bucket}/models/tiny").model_id

    code, _, err = start(*given, env=s3_server.env()).finish()
    assert code == 0, err
    assert "encoding" not in err and "done in" not in err, "all of it was done"
    assert Bundle.load(f"{bucket}/models/tiny").model_id == model_id
