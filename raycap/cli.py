"""The `raycap` command: parse, set up logging, call one function.

Options, defaults and help are those of the configuration dataclasses. What needs torch or Ray is imported by the
command that needs it, so `raycap --help` answers at once.
"""

from __future__ import annotations

import io
import logging
import re
import signal
import sys
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro
from rich.console import Console
from rich.logging import RichHandler

import raycap
from raycap.benchmark.config import BenchmarkConfig
from raycap.bulk.config import CaptionConfig, ExportConfig, PlanConfig, ReportConfig, StatusConfig
from raycap.ensemble.config import EnsembleConfig
from raycap.errors import ConfigurationError, RaycapError, StalledError
from raycap.evaluate.config import EvaluateConfig
from raycap.serve.config import ServeConfig
from raycap.train.config import TrainConfig

EXIT_OK, EXIT_FAILED_ROWS, EXIT_USAGE, EXIT_OTHER, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 70, 130, 143

Command = (
    Annotated[CaptionConfig, tyro.conf.subcommand("caption")]
    | Annotated[PlanConfig, tyro.conf.subcommand("plan")]
    | Annotated[StatusConfig, tyro.conf.subcommand("status")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
    | Annotated[ServeConfig, tyro.conf.subcommand("serve")]
    | Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[EnsembleConfig, tyro.conf.subcommand("ensemble")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
    | Annotated[BenchmarkConfig, tyro.conf.subcommand("benchmark")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 all done, 1 too many rows failed, 2 bad usage, settings or storage, 130 Ctrl-C, 143
    SIGTERM.

    70 (sysexits.h: EX_SOFTWARE) is anything else, with its traceback: a lost cluster, no memory, an error of ours; and
    a run in which nothing happens any more, with a line that says so.
    """
    # What Kubernetes, Slurm and spot nodes send before they kill: leave as at Ctrl-C.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = run(sys.argv[1:] if argv is None else argv)
    except Exception:
        traceback.print_exc()
        code = EXIT_OTHER
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    if list(argv) in (["--version"], ["-V"]):
        sys.stdout.write(f"raycap {raycap.__version__}\n")
        return EXIT_OK
    try:
        with _logging():
            return _dispatch(_parse(argv))
    except RaycapError as error:
        sys.stderr.write(f"raycap: error: {' '.join(str(error).split())}\n")
        return EXIT_OTHER if isinstance(error, StalledError) else EXIT_USAGE
    except KeyboardInterrupt as stop:
        name, code = (
            ("terminated", EXIT_TERMINATED) if isinstance(stop, _Terminated) else ("interrupted", EXIT_INTERRUPTED)
        )
        sys.stderr.write(f"raycap: {name}; what was written stays, and caption and train go on from there\n")
        return code


class _Terminated(KeyboardInterrupt):
    """SIGTERM: everything ends as it does at Ctrl-C, but for the exit code."""


def _terminated(number: int, frame: object) -> None:
    raise _Terminated


def _parse(argv: Sequence[str]) -> object:
    """The command's settings. Raises ConfigurationError, and SystemExit after `--help`."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                Command,
                prog="raycap",
                description="Image captioning on Ray: a folder or a bucket in, a caption for every image out.",
                args=_with_options_file(argv),
                registry=_registry(),
            )
    except SystemExit as stop:
        if not stop.code:
            sys.stdout.write(f"\n{_ABOUT_OPTIONS_FILE}\n")
            raise
        has_file = any(word.partition("=")[0] == "--config" for word in argv)
        where = " (on the command line or in the file of --config)" if has_file else ""
        raise ConfigurationError(_one_line(complaint.getvalue()) + where) from None


_ABOUT_OPTIONS_FILE = "Options may stand in a TOML file: --config FILE.toml. The command line wins."


def _with_options_file(argv: Sequence[str]) -> list[str]:
    """The arguments, with `--config FILE.toml` or `--config=FILE.toml` replaced by the options in that file; those of
    the command line follow, and so win.

    Raises ConfigurationError if the file cannot be read.
    """
    given = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in given[1:]:
        return given
    place = given.index("--config")
    if place + 1 == len(given):
        raise ConfigurationError("--config: expected a TOML file, got nothing")
    path = given[place + 1]
    try:
        options = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigurationError(f"--config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config: {path} is not TOML: {error}") from error
    return [given[0], *_flags(options, path), *given[1:place], *given[place + 2 :]]


def _flags(options: dict[str, Any], path: str) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, dict):
            raise ConfigurationError(f"--config: {path}: expected options by name, got the table [{name}]")
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield f"--{flag}"
            yield from map(str, value if isinstance(value, list) else [value])


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Options that may be left out take what their type says. tyro's own rule would show `{None}|INT`, and make None of
    the text "None"."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def optional(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        kinds = get_args(info.type)
        kind = kinds[0] if len(kinds) == 2 and kinds[1] is type(None) else None
        if kind not in (str, int, float):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=lambda texts: kind(texts[0]),
            is_instance=lambda value: value is None or isinstance(value, kind),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _one_line(box: str) -> str:
    """What tyro wrote into a box, as one line: its parts without the title and without the help of the option.

    Where the terminal is not UTF-8, the box is drawn with |, + and -.
    """
    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()[1:]]
    parts = [" ".join(part.split()).rstrip(".") for part in re.split(r"[─-]{8,}", " ".join(lines))]
    return "; ".join(part for part in parts if part and not part.startswith("Argument helptext"))


def _dispatch(config: object) -> int:
    match config:
        case CaptionConfig():
            from raycap.bulk.run import caption
            from raycap.bulk.table import print_outcome

            outcome = caption(config)
            print_outcome(outcome.summary, config)
            if outcome.within_limits:
                return EXIT_OK
            sys.stderr.write(f"raycap: more than --max-failed {config.max_failed:g} of the tried objects failed\n")
            return EXIT_FAILED_ROWS
        case PlanConfig():
            from raycap.bulk.plan import plan

            plan(config)
        case StatusConfig():
            from raycap.bulk.status import status

            status(config)
        case ExportConfig():
            from raycap.bulk.export import export

            export(config)
        case TrainConfig():
            with _extra("train"):
                from raycap.train.on_ray import train
            train(config)
        case ServeConfig():
            with _extra("serve"):
                from raycap.serve.on_ray import serve
            return serve(config)
        case EvaluateConfig():
            from raycap.evaluate.run import evaluate

            evaluate(config)
        case EnsembleConfig():
            from raycap.ensemble.run import make_ensemble

            make_ensemble(config)
        case ReportConfig():
            from raycap.bulk.report import write_report

            location = write_report(config.output, s3=config.s3, max_images=config.max_images, seed=config.seed)
            sys.stdout.write(f"{location}\n")
        case BenchmarkConfig():
            from raycap.benchmark.run import benchmark

            benchmark(config)
        case _:
            raise AssertionError(config)
    return EXIT_OK


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Imports of packages that an extra of ours brings."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"raycap {name} needs packages that are not installed ({error.name}): pip install 'raycap[{name}]'"
        ) from error


@contextmanager
def _logging() -> Iterator[None]:
    """`raycap` loggers to standard error: pretty on a terminal, plain lines elsewhere."""
    logger, handler = logging.getLogger("raycap"), _log_handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _log_handler() -> logging.Handler:
    if sys.stderr.isatty():
        return RichHandler(show_path=False, log_time_format="[%X]", console=Console(stderr=True))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    return handler
