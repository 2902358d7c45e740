"""TensorBoard files on a real S3 server: up to each checkpoint, and no reason to stop when they cannot be written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raycap.storage import S3Options, open_store
from raycap.train.monitor import Monitor
from tests.integration.test_storage_outage import proxy_of
from tests.s3 import S3Server
from tests.training import tiny_job

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_aws_settings")]


def test_curves_are_on_s3_as_far_as_each_checkpoint(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    run_dir = f"s3://{s3_server.make_bucket()}/runs"
    copies = open_store(f"{run_dir}/o/tensorboard")
    lines: list[str] = []

    def steps() -> list[int]:
        (tmp_path / "copies").mkdir(exist_ok=True)
        for info in copies.list():
            (tmp_path / "copies" / info.key).write_bytes(copies.read(info.key))
        found = EventAccumulator(str(tmp_path / "copies"), size_guidance={"scalars": 0})
        found.Reload()
        return [event.step for event in found.Scalars("train/loss")]

    with proxy_of(s3_server) as proxy:
        s3 = S3Options(endpoint_url=proxy.endpoint_url, max_attempts=1, max_outage_s=0.0)
        job = tiny_job(tmp_path, epochs=2)
        job = replace(job, config=replace(job.config, run_dir=run_dir, s3=s3, log_every_s=1e9))

        def batches(monitor: Monitor, *numbers: int) -> None:
            for step in numbers:
                monitor.on_step(step, {"train/loss": 1.0})
            monitor.on_checkpoint()

        monitor = Monitor(job, lines.append)
        monitor.begin(job.config.stages[0], 4, 0)
        batches(monitor, 1, 2)
        assert steps() == [1, 2]
        proxy.stop()
        batches(monitor, 3)
        assert len(lines) == 1 and lines[0].startswith("the TensorBoard files are not up to date: ")
        proxy.start()
        batches(monitor, 4)
        assert steps() == [1, 2, 3, 4]
        monitor.end()

        resumed = Monitor(job, lines.append)
        resumed.begin(job.config.stages[0], 4, 2)
        batches(resumed, 3)
        assert steps() == [1, 2, 3]
        resumed.end()
