"""The `raycap` command: parse, set up logging, call one function.

Options, defaults and help are those of the configuration dataclasses. What needs torch or Ray is imported by the command
that needs it, so `raycap --help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.logging import RichHandler

import raycap
from raycap.bulk.config import BenchmarkConfig, CaptionConfig, ReportConfig
from raycap.errors import RaycapError
from raycap.evaluate.config import EvaluateConfig
from raycap.train.config import TrainConfig

EXIT_OK, EXIT_FAILED_ROWS, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

Command = (
    Annotated[CaptionConfig, tyro.conf.subcommand("caption")]
    | Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
    | Annotated[BenchmarkConfig, tyro.conf.subcommand("benchmark")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with 0 (all done), 1 (too many rows failed), 2 (bad usage, settings or storage) or 130 (Ctrl-C)."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    if list(argv) in (["--version"], ["-V"]):
        sys.stdout.write(f"raycap {raycap.__version__}\n")
        return EXIT_OK
    _set_up_logging()
    try:
        config = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="raycap",
            description="Image captioning on Ray: a folder or a bucket in, a caption for every image out.",
            args=list(argv),
        )
        return _dispatch(config)
    except RaycapError as error:
        sys.stderr.write(f"raycap: error: {error}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        sys.stderr.write("raycap: interrupted; what was written stays, and the same command goes on from there\n")
        return EXIT_INTERRUPTED


def _dispatch(config: object) -> int:
    match config:
        case CaptionConfig():
            from raycap.bulk.on_ray import caption
            from raycap.bulk.table import print_outcome

            outcome = caption(config)
            print_outcome(outcome.summary, config)
            return EXIT_OK if outcome.within_limits else EXIT_FAILED_ROWS
        case TrainConfig():
            from raycap.train.on_ray import train

            train(config)
        case EvaluateConfig():
            from raycap.evaluate.run import evaluate

            evaluate(config)
        case ReportConfig():
            from raycap.bulk.report import write_report

            location = write_report(config.output, s3=config.s3, max_images=config.max_images, seed=config.seed)
            sys.stdout.write(f"{location}\n")
        case BenchmarkConfig():
            from raycap.bulk.benchmark import benchmark

            benchmark(config)
        case _:
            raise AssertionError(config)
    return EXIT_OK


def _set_up_logging() -> None:
    """`raycap` loggers to standard error: pretty on a terminal, plain lines elsewhere."""
    logger = logging.getLogger("raycap")
    if logger.handlers:
        return
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(show_path=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
