"""The `raycap` command: fast help, exit codes, and one clear line for every mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raycap
from raycap import cli
from raycap.bulk.config import CaptionConfig
from raycap.errors import CredentialsError

COMMANDS = ["caption", "serve", "train", "evaluate", "report", "benchmark"]
ROOT = Path(__file__).parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with exit code 2; give the one line it writes, beside dated lines of progress."""

    def run(*arguments: str) -> str:
        assert cli.run(arguments) == cli.EXIT_USAGE
        printed = capsys.readouterr()
        assert printed.out == ""
        lines = [line for line in printed.err.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("raycap: error: ")
        assert not set(lines[0]) & set("╭│─╯|")
        return lines[0].removeprefix("raycap: error: ")

    return run


# Help and version


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_neither_torch_nor_ray(arguments: list[str]) -> None:
    code = f"""
import sys
from raycap.cli import run
try:
    run({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "torchvision", "timm", "ray", "boto3", "pyarrow", "pandas"}} & sys.modules.keys()
assert not heavy, heavy
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "usage: raycap" in result.stdout


def help_of(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.run([command, "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        cli.run(["--help"])
    text = capsys.readouterr().out
    assert [command for command in COMMANDS if command not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_a_user_types(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, capsys, monkeypatch)
    assert "{None}|" not in text
    assert "--s3." not in text
    groups = re.findall(r"^[^a-z\n]*([a-z0-9 ]+(?:options|arguments)) ", text, re.MULTILINE)
    assert groups[-1] == "s3 options"
    assert text.index("s3 options") < text.index("--endpoint-url STR")


def test_positional_arguments_have_names_and_come_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of("caption", capsys, monkeypatch)
    assert text.startswith("usage: raycap caption [-h] [CAPTION OPTIONS] SOURCE OUTPUT\n")
    assert text.index(" SOURCE  ") < text.index(" OUTPUT  ") < text.index("--model STR")
    assert "--beam-size INT" in text
    assert help_of("report", capsys, monkeypatch).startswith("usage: raycap report [-h] [REPORT OPTIONS] OUTPUT\n")


def test_version() -> None:
    for arguments in (["-m", "raycap", "--version"], ["-m", "raycap", "-V"]):
        result = python(*arguments)
        assert (result.returncode, result.stdout, result.stderr) == (0, f"raycap {raycap.__version__}\n", "")


@pytest.mark.parametrize("script", ["caption", "train", "evaluate"])
def test_jobs_are_the_commands(script: str) -> None:
    result = python(f"jobs/{script}.py", "--help")
    assert result.returncode == 0, result.stderr
    assert f"usage: raycap {script}" in result.stdout


# Options


def parsed(*arguments: str) -> Any:
    return cli._parse(arguments)


def test_options_reach_the_config() -> None:
    config = parsed(
        *("caption", "in", "out", "--beam-size", "5", "--length-penalty", "0.5", "--model", "None", "--no-report"),
        *("--all-files", "--endpoint-url", "http://minio:9000", "--path-style", "True", "--gpus-per-actor", "0.25"),
    )
    assert isinstance(config, CaptionConfig)
    assert (config.source, config.output, config.model) == ("in", "out", "None")
    assert (config.beam_size, config.length_penalty, config.max_length) == (5, 0.5, None)
    assert (config.report, config.selection.all_files, config.gpus_per_actor) == (False, True, 0.25)
    assert (config.s3.endpoint_url, config.s3.path_style, config.s3.profile) == ("http://minio:9000", True, None)


def test_defaults_of_the_command_are_those_of_the_config() -> None:
    assert parsed("caption", "in", "out") == CaptionConfig(source="in", output="out")


@pytest.mark.parametrize("given", [["--config", "{}"], ["--config={}"]], ids=str)
def test_options_may_stand_in_a_file_and_the_command_line_wins(tmp_path: Path, given: list[str]) -> None:
    (tmp_path / "a=b.toml").write_text('beam-size = 5\nbatch_size = 7\nreport = false\nmodel = "m"')
    words = [word.format(tmp_path / "a=b.toml") for word in given]
    for arguments in ((*words, "in", "out"), ("in", "out", *words)):
        config = parsed("caption", *arguments, "--batch-size", "9")
        assert config == CaptionConfig(source="in", output="out", beam_size=5, batch_size=9, report=False, model="m")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_of_the_file(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--config FILE.toml" in help_of(command, capsys, monkeypatch)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "{caption, plan, status, export, serve, train, evaluate, ensemble, report, benchmark}"),
        (["bogus"], "Unrecognized options: bogus; Available subcommands: caption, plan"),
        (["caption"], "Missing from raycap caption: SOURCE"),
        (["caption", "only-one"], "Missing from raycap caption: OUTPUT"),
        (["caption", "a", "b", "c"], "Unrecognized options: c"),
        (["caption", "a", "b", "--bogus"], "Unrecognized options: --bogus"),
        (["caption", "a", "b", "--beam-size", "many"], "Error parsing --beam-size: "),
        (["caption", "a", "b", "--precision", "float8"], "invalid choice 'float8' for argument '--precision'"),
        (["caption", "a", "b", "--device", "gpu"], "invalid choice 'gpu' for argument '--device'"),
        (["caption", "a", "b", "--max-failed", "7"], "--max-failed is a share from 0 to 1, got 7.0"),
        (["caption", "a", "b", "--max-failed", "few"], "Error parsing --max-failed: "),
        (["caption", "a", "b", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (
            ["caption", "a", "b", "--endpoint-url", "minio"],
            "expected an S3 endpoint like http://host:port, got 'minio'",
        ),
        (["train"], "Missing from raycap train: --annotations"),
        (["train", "--config"], "--config: expected a TOML file, got nothing"),
        (["train", "--config=none.toml"], "--config: cannot read none.toml: No such file"),
        (["evaluate", "--annotations", "a.json"], "give either --images"),
        (["report"], "Missing from raycap report: OUTPUT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line(mistake: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in mistake(*arguments)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_mistakes_are_one_line_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "raycap", "bogus"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert result.returncode == cli.EXIT_USAGE
    assert result.stderr.startswith("raycap: error: Unrecognized options: bogus; Available subcommands: caption, ")
    assert result.stderr.count("\n") == 1


def test_messages_say_where_help_is(mistake: Callable[..., str]) -> None:
    assert mistake("caption").endswith("; For full helptext, run: raycap caption --help")


def test_bad_locations_are_one_line(mistake: Callable[..., str], tmp_path: Path, tiny_bundle: str) -> None:
    images, empty, out = tmp_path / "images", tmp_path / "empty", str(tmp_path / "out")
    for folder in (images, empty):
        folder.mkdir()
    (images / "a.jpg").write_bytes(b"")
    model = ["--model", tiny_bundle]

    assert "there is no file or directory" in mistake("caption", str(tmp_path / "nope"), out, *model)
    assert "gs:// locations are not supported" in mistake("caption", "gs://bucket/photos", out, *model)
    assert "gs:// locations are not supported" in mistake("caption", str(images), "gs://bucket/out", *model)
    assert "there are no objects here" in mistake("caption", str(empty), out, *model)
    assert "is a file" in mistake("caption", str(images), str(images / "a.jpg"), *model)
    assert "is the source" in mistake("caption", str(images), str(images), *model)
    assert "not a model bundle" in mistake("caption", str(images), out, "--model", str(empty))
    assert "beam_size must be from 1 to 64" in mistake("caption", str(images), out, *model, "--beam-size", "99")
    assert "not an output of raycap caption" in mistake("report", str(empty))


def test_output_that_may_not_be_written_is_one_line(mistake: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert "cannot write to /proc/raycap" in mistake("caption", str(tmp_path / "images"), "/proc/raycap")


# Exit codes


def with_dispatch(monkeypatch: pytest.MonkeyPatch, outcome: int | BaseException) -> int:
    def dispatch(config: object) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    return cli.run(["caption", "a", "b"])


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_dispatch(monkeypatch, cli.EXIT_OK) == 0
    assert with_dispatch(monkeypatch, cli.EXIT_FAILED_ROWS) == 1
    assert capsys.readouterr().err == ""
    assert with_dispatch(monkeypatch, CredentialsError("two\n lines")) == 2
    assert capsys.readouterr().err == "raycap: error: two lines\n"
    assert with_dispatch(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.startswith("raycap: interrupted; ")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        with_dispatch(monkeypatch, ZeroDivisionError())


def test_an_error_of_ours_is_no_exit_code_that_means_something_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> int:
        raise ZeroDivisionError("no more memory")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == cli.EXIT_OTHER
    assert "no more memory" in capsys.readouterr().err
