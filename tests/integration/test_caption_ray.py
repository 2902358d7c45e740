"""`raycap caption` on real Ray: one row for every object, whatever happens to the run."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from raycap import cli
from raycap.bulk.config import CaptionConfig, Selection
from raycap.bulk.layout import CHUNK_ROWS, RUN, SUMMARY, Round, num_chunks, part_key
from raycap.bulk.on_ray import _CaptionActor
from raycap.bulk.report import REPORT
from raycap.bulk.rows import OUTPUT_SCHEMA
from raycap.bulk.run import caption
from raycap.errors import ConfigurationError, NotFoundError, StorageError
from raycap.model.bundle import Bundle
from tests.bundles import WORDS, random_bundle
from tests.commands import Command, check_one_line, wait_until
from tests.hostile import encode, hostile_files
from tests.s3 import S3Keys, S3Server

pytestmark = pytest.mark.integration

FIRST = Round(0)
NUM_GOOD = 2 * CHUNK_ROWS  # with the hostile files, three chunks
ROOT = Path(__file__).parents[2]
DEADLINE_S = 180


def good_picture(number: int) -> bytes:
    return encode(Image.new("RGB", (40, 30), (number % 256, 7 * number % 256, number // 256)), "JPEG")


def good_pictures(number: int) -> dict[str, bytes]:
    return {f"good/{n:04d}.jpg": good_picture(n) for n in range(number)}


def expected_codes() -> dict[str, str]:
    return {key: code for key, (_, code) in hostile_files().items()}


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    for key, data in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def rows_of(output: Path) -> list[dict[str, Any]]:
    """All rows of the final files, without what differs from run to run."""
    rows = [row for path in sorted((output / "captions").iterdir()) for row in pq.read_table(path).to_pylist()]
    return [{name: value for name, value in row.items() if name != "captioned_at"} for row in rows]


def summary_of(output: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((output / SUMMARY).read_bytes())
    return summary


def chunk_times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / FIRST.chunks).iterdir()}


def check_codes(rows: list[dict[str, Any]], expected: dict[str, str]) -> None:
    """`expected` maps keys to "ok" or error codes; all other rows are good pictures."""
    assert [row["row_id"] for row in rows] == list(range(len(rows)))
    found = {row["key"]: row["error_code"] or "ok" for row in rows}
    assert len(found) == len(rows)
    assert {key: found[key] for key in expected} == expected
    assert {code for key, code in found.items() if key not in expected} <= {"ok"}
    for row in rows:
        assert (row["status"] == "ok") == (row["caption"] is not None) == (row["error"] is None)
        assert row["status"] != "ok" or set(row["caption"].split()) <= set(WORDS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_all(folder, good_pictures(NUM_GOOD) | {key: data for key, (data, _) in hostile_files().items()})
    return folder


@pytest.fixture(scope="module")
def config(source: Path, tmp_path_factory: pytest.TempPathFactory, tiny_bundle: str) -> CaptionConfig:
    output = tmp_path_factory.mktemp("finished")
    return CaptionConfig(source=str(source), output=str(output), model=tiny_bundle, selection=Selection(all_files=True))


@pytest.fixture(scope="module")
def finished(config: CaptionConfig, local_ray: None) -> Path:
    """A finished output; tests that change it work on a copy."""
    outcome = caption(config)
    assert outcome.within_limits
    assert outcome.summary["counts"]["ok"] > NUM_GOOD
    return Path(config.output)


@pytest.fixture
def copy(finished: Path, tmp_path: Path, config: CaptionConfig) -> CaptionConfig:
    """The same run, in a copy of its output."""
    shutil.copytree(finished, tmp_path / "copy", copy_function=shutil.copy2)
    return replace(config, output=str(tmp_path / "copy"))


# A local folder


def test_every_file_is_one_row_with_its_own_status(finished: Path) -> None:
    rows = rows_of(finished)
    assert len(rows) == NUM_GOOD + len(hostile_files())
    check_codes(rows, expected_codes())
    assert len({row["model_id"] for row in rows}) == 1
    assert all(len(row["alternatives"]) == 2 for row in rows if row["status"] == "ok")


def test_summary_counts_the_rows(finished: Path, source: Path) -> None:
    summary, codes = summary_of(finished), expected_codes()
    num_failed = sum(code != "ok" for code in codes.values())
    assert summary["status"] == "complete"
    assert summary["num_objects"] == NUM_GOOD + len(codes)
    assert summary["counts"] == {"ok": NUM_GOOD + len(codes) - num_failed, "failed": num_failed, "skipped": 0}
    assert {error["code"]: error["count"] for error in summary["errors"]} == {
        code: list(codes.values()).count(code) for code in codes.values() if code != "ok"
    }
    assert summary["num_bytes"] == sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    assert summary["num_files"] == len(list((finished / "captions").iterdir())) == 1
    assert set(summary["stage_s"]) == {"fetch", "decode", "caption"}


def test_output_is_readable_by_pandas_and_has_the_documented_columns(finished: Path) -> None:
    frame = pd.read_parquet(finished / "captions")
    assert list(frame.columns) == OUTPUT_SCHEMA.names
    assert frame["status"].value_counts().to_dict() == {
        status: count for status, count in summary_of(finished)["counts"].items() if count
    }


def test_report_is_written(finished: Path) -> None:
    assert b"</html>" in (finished / REPORT).read_bytes()


def test_nothing_half_written_is_left(finished: Path) -> None:
    assert not [path for path in finished.rglob("*") if path.name.startswith(".raycap-tmp-")]


def test_second_call_does_nothing(copy: CaptionConfig) -> None:
    output = Path(copy.output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    outcome = caption(copy)
    assert outcome.steady_images_per_s is None
    assert outcome.summary == summary_of(output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_exit_code_says_whether_too_many_rows_failed(copy: CaptionConfig, capsys: pytest.CaptureFixture[str]) -> None:
    counts = summary_of(Path(copy.output))["counts"]
    share = counts["failed"] / (counts["ok"] + counts["failed"])
    command = ["caption", copy.source, copy.output, "--model", str(copy.model), "--all-files"]
    assert cli.run([*command, "--max-failed", str(share - 1e-6)]) == cli.EXIT_FAILED_ROWS
    assert cli.run([*command, "--max-failed", str(share + 1e-6)]) == cli.EXIT_OK
    printed = capsys.readouterr()
    assert f"{counts['ok']} captioned, {counts['failed']} failed, 0 skipped" in printed.out
    assert printed.err.count("nothing to do") == 2


def test_missing_report_is_written_by_the_next_call(copy: CaptionConfig) -> None:
    report = Path(copy.output) / REPORT
    report.unlink()
    caption(replace(copy, report=False))
    assert not report.exists()
    caption(copy)
    assert report.exists()


# Interrupted runs


def test_only_missing_chunks_are_done_again(copy: CaptionConfig, finished: Path) -> None:
    output = Path(copy.output)
    shutil.rmtree(output / "captions")
    (output / SUMMARY).unlink()
    (output / FIRST.chunk(1)).unlink()
    before = chunk_times(output)
    caption(copy)
    after = chunk_times(output)
    assert {name for name in after if after[name] != before.get(name)} == {Path(FIRST.chunk(1)).name}
    assert rows_of(output) == rows_of(finished)
    assert summary_of(output)["counts"] == summary_of(finished)["counts"]


def test_run_that_died_while_joining_leaves_no_stale_files(copy: CaptionConfig, finished: Path) -> None:
    output = Path(copy.output)
    for file_size_mb, num_files in ((1e-3, 3), (128, 1)):
        (output / SUMMARY).unlink()
        caption(replace(copy, file_size_mb=file_size_mb))
        assert len(list((output / "captions").iterdir())) == num_files
        assert rows_of(output) == rows_of(finished)


def test_damaged_chunk_stops_the_run_by_name(copy: CaptionConfig) -> None:
    output = Path(copy.output)
    (output / SUMMARY).unlink()
    (output / FIRST.chunk(2)).write_bytes(b"damaged")
    with pytest.raises(StorageError, match=f"{FIRST.chunk(2)}: not a Parquet file any more") as raised:
        caption(copy)
    assert type(raised.value) is StorageError  # not what Ray wraps it in
    assert not (output / SUMMARY).exists()


def test_storage_error_of_a_worker_is_told_as_it_is(copy: CaptionConfig) -> None:
    output = Path(copy.output)
    (output / SUMMARY).unlink()
    (output / FIRST.chunk(2)).unlink()
    (output / FIRST.shard(0, 0)).write_bytes(b"damaged")
    with pytest.raises(StorageError, match=r"00000-00000\.parquet: not a manifest shard") as raised:
        caption(copy)
    assert type(raised.value) is StorageError
    assert "Failed to" not in str(raised.value), "nothing of Ray's is added"


def test_other_settings_are_refused(copy: CaptionConfig, tmp_path: Path) -> None:
    other_model, other_source = str(tmp_path / "other"), tmp_path / "images"
    random_bundle(seed=1).save(other_model)
    write_all(other_source, good_pictures(1))
    for name, changed in {
        "model_id": replace(copy, model=other_model),
        "decoding": replace(copy, beam_size=1),
        "limits": replace(copy, max_bytes=1000),
        "selection": replace(copy, selection=Selection()),
        "source": replace(copy, source=str(other_source)),
    }.items():
        with pytest.raises(ConfigurationError, match=f"other settings: {name} was .*choose another output"):
            caption(changed)
    assert summary_of(Path(copy.output))["num_objects"] == NUM_GOOD + len(hostile_files())


def test_empty_source_does_not_bind_the_output(tmp_path: Path, config: CaptionConfig) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with pytest.raises(NotFoundError, match="there are no objects here"):
            caption(replace(config, source=str(tmp_path / name), output=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / RUN).read_bytes())["source"] == str(tmp_path / "second")


def test_output_that_is_the_source_is_refused(source: Path, config: CaptionConfig) -> None:
    for output in (str(source), f"{source}/"):
        with pytest.raises(ConfigurationError, match="is the source"):
            caption(replace(config, output=output))


# The command as a process of its own


@pytest.mark.timeout(900)  # three starts of Ray
def test_killed_and_interrupted_runs_end_in_one_row_each(
    tmp_path: Path, tiny_bundle: str, start: Callable[..., Command]
) -> None:
    files = good_pictures(5 * CHUNK_ROWS - 100) | {key: data for key, (data, _) in hostile_files().items()}
    num_images = len(files)
    write_all(tmp_path / "images", files)
    output = tmp_path / "out"
    options = ("--model", tiny_bundle, "--all-files", "--max-failed", "1")
    command = ("caption", str(tmp_path / "images"), str(output), *options)
    slowly = (*command, "--batch-size", "1")  # a signal falls into the middle of a run
    chunks = output / FIRST.chunks

    def num_done() -> int:
        return len(list(chunks.glob("*.parquet")))

    killed = start(*slowly)
    wait_until(lambda: num_done() >= 1 or killed.process.poll() is not None, "the first chunk")
    killed.process.kill()
    assert killed.finish()[0] == -signal.SIGKILL
    killed.end()
    done = chunk_times(output)
    assert 1 <= len(done) < num_chunks(num_images)
    assert not (output / SUMMARY).exists()

    interrupted = start(*slowly)
    wait_until(lambda: num_done() > len(done) or interrupted.process.poll() is not None, "one more chunk")
    os.killpg(interrupted.process.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
    code, _, err = interrupted.finish()
    assert code == cli.EXIT_INTERRUPTED
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("raycap: interrupted; ")
    wait_until(lambda: not interrupted.others(), "the end of all processes")
    assert not (output / SUMMARY).exists()

    code, out, err = start(*command).finish()
    assert code == cli.EXIT_OK, err
    num_failed = sum(code != "ok" for code in expected_codes().values())
    assert f"{num_images - num_failed} captioned, {num_failed} failed, 0 skipped" in out
    assert "done already" in err
    rows = rows_of(output)
    assert sorted(row["key"] for row in rows) == sorted(files)
    check_codes(rows, expected_codes())
    assert {name: at for name, at in chunk_times(output).items() if name in done} == done


# A bucket


@pytest.mark.timeout(600)
def test_bucket_to_bucket(s3_server: S3Server, tiny_bundle: str, start: Callable[..., Command]) -> None:
    bucket, client = s3_server.make_bucket(), s3_server.client()
    files = good_pictures(20) | {key: data for key, (data, _) in hostile_files().items()}
    files |= {"new\nline.jpg": good_picture(1), "notes.txt": b"no picture", "100%.jpg": good_picture(2)}
    for key, data in files.items():
        client.put_object(Bucket=bucket, Key=f"photos/{key}", Body=data)
    client.put_object(Bucket=bucket, Key="photos-old/not-this.jpg", Body=good_picture(3))
    for name in ("config.json", "vocabulary.json", "model.safetensors", "metrics.json", "README.md"):
        client.upload_file(f"{tiny_bundle}/{name}", bucket, f"models/tiny/{name}")

    # The output is inside the source: it must not be taken for images.
    arguments = ("caption", f"s3://{bucket}/photos", f"s3://{bucket}/photos/captioned")
    command = (*arguments, "--model", f"s3://{bucket}/models/tiny", "--max-failed", "0.2")
    code, out, err = start(*command, env=s3_server.env()).finish()
    assert code == cli.EXIT_FAILED_ROWS, err
    assert "Traceback" not in err

    def read(key: str) -> bytes:
        data: bytes = client.get_object(Bucket=bucket, Key=f"photos/captioned/{key}")["Body"].read()
        return data

    table = pq.read_table(io.BytesIO(read(part_key(0))))
    assert table.schema.equals(OUTPUT_SCHEMA)
    rows = table.to_pylist()
    assert {row["key"] for row in rows} == set(files)
    check_codes(rows, expected_codes() | {"notes.txt": "other_suffix"})
    assert {row["uri"] for row in rows} == {f"s3://{bucket}/photos/{key}" for key in files}
    summary = json.loads(read(SUMMARY))
    assert summary["counts"]["skipped"] == 1
    assert summary["num_objects"] == len(files)
    assert f"s3://{bucket}/photos/captioned" in out
    assert b"</html>" in read(REPORT)

    code, _, err = start(*command, env=s3_server.env()).finish()
    assert code == cli.EXIT_FAILED_ROWS
    assert "nothing to do" in err
    assert "Ray" not in err


@pytest.mark.parametrize(
    ("location", "changes", "message"),
    [
        ("s3://{bucket}/photos", {"AWS_ACCESS_KEY_ID": "AKWRONG"}, "does not know this access key"),
        ("s3://{bucket}/photos", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "secret key does not belong to this access key"),
        ("s3://raycap-no-such-bucket/photos", {}, "there is no such bucket"),
        ("s3://{bucket}/phtos", {}, "there is nothing below this prefix"),
        ("s3://{bucket}/photos", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "refuses the connection"),
    ],
    ids=["access-key", "secret-key", "no-bucket", "empty-prefix", "refused"],
)
def test_unusable_storage_is_one_line_before_ray_starts(
    s3_server: S3Server,
    start: Callable[..., Command],
    tmp_path: Path,
    location: str,
    changes: dict[str, str],
    message: str,
) -> None:
    bucket = s3_server.make_bucket()
    s3_server.client().put_object(Bucket=bucket, Key="photos/a.jpg", Body=good_picture(0))
    env = s3_server.env() | changes
    code, out, err = start("caption", location.format(bucket=bucket), str(tmp_path / "out"), env=env).finish()
    assert code == cli.EXIT_USAGE
    assert out == ""
    check_one_line(err, message)
    assert s3_server.secret_key not in err
    assert not (tmp_path / "out").exists()


def test_output_that_may_not_be_written_is_one_line(
    s3_server: S3Server, start: Callable[..., Command], source: Path
) -> None:
    bucket, keys = s3_server.make_bucket(), s3_server.reader
    assert isinstance(keys, S3Keys)
    code, _, err = start("caption", str(source), f"s3://{bucket}/out", env=s3_server.env(keys)).finish()
    assert code == cli.EXIT_USAGE
    check_one_line(err, "access denied")


def test_complete_output_of_another_source_is_refused(copy: CaptionConfig, tmp_path: Path) -> None:
    shutil.rmtree(Path(copy.output) / "_raycap")
    assert caption(copy).summary["status"] == "complete", "what is internal may be deleted from a finished output"
    write_all(tmp_path / "others", good_pictures(1))
    with pytest.raises(ConfigurationError, match="other settings: source was"):
        caption(replace(copy, source=str(tmp_path / "others")))


def test_actor_that_cannot_have_its_model_tells_why(config: CaptionConfig, tiny_bundle: str, local_ray: None) -> None:
    bundle = ray.put(Bundle.load(tiny_bundle))
    actor = _CaptionActor(bundle, replace(config, precision="float16"), "cpu", 1, None)
    with pytest.raises(ConfigurationError, match="float16 needs a GPU"):
        actor(OUTPUT_SCHEMA.empty_table())
