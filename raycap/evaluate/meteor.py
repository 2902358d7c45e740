"""METEOR 1.5 (Denkowski and Lavie 2014) through its Java program, which ships inside `pycocoevalcap`.

The numbers are those of `pycocoevalcap.meteor.Meteor`. That class waits for ever when Java hangs, and locks up in its
own `__del__` when Java dies, so the conversation with the program is held here.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

from raycap.errors import ConfigurationError
from raycap.evaluate.java import NO_JAVA, UTF8, find_java, jar, java_environment

__all__ = ["meteor"]

_START_TIMEOUT_S = 180.0
"""Loading the paraphrase table takes 4 to 10 s on one core."""
_IMAGE_TIMEOUT_S = 0.1
"""One image of five references takes about 2 ms."""
_ADVICE = "leave 'meteor' out of the metrics to score without it"


def meteor(
    references: Sequence[Sequence[str]], candidates: Sequence[str], *, timeout_s: float | None = None
) -> tuple[float, list[float]]:
    """METEOR of the corpus and of each image, between 0 and 1. Both arguments are tokenized, and of one length.

    Raises:
        ConfigurationError: there is no Java, or the program dies, hangs or answers with something else than scores.
    """
    java = find_java()
    if java is None:
        raise ConfigurationError(f"METEOR needs Java and {NO_JAVA}; {_ADVICE}")
    path = jar("pycocoevalcap.meteor", "meteor-1.5.jar")
    timeout_s = timeout_s if timeout_s is not None else _START_TIMEOUT_S + _IMAGE_TIMEOUT_S * len(candidates)
    with tempfile.TemporaryFile() as said:  # a pipe that nobody reads would stop the program when full
        try:
            process = subprocess.Popen(
                [java, "-Xmx2G", *UTF8, "-jar", str(path), "-", "-", "-stdio", "-l", "en", "-norm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=java_environment(),
            )
        except OSError as error:
            raise ConfigurationError(f"METEOR cannot be started: {error}; {_ADVICE}") from error
        assert process.stdin is not None and process.stdout is not None
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        watchdog = threading.Timer(timeout_s, stop)
        watchdog.daemon = True
        watchdog.start()
        try:
            return _converse(process.stdin, process.stdout, references, candidates)
        except (OSError, ValueError) as error:  # a broken pipe; a line that is no number, such as the end of the file
            if timed_out.is_set():
                raise ConfigurationError(
                    f"METEOR was stopped: no scores of {len(candidates)} images after {timeout_s:g} s; {_ADVICE}"
                ) from None
            process.kill()
            code = process.wait()
            said.seek(0)
            words = said.read().decode("utf-8", "replace").strip()[-500:] or "nothing"
            raise ConfigurationError(
                f"METEOR's Java process failed (exit code {code}), saying: {words}; it needs 2 GB of memory; {_ADVICE}"
            ) from error
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # what was still unsent cannot be sent any more
                process.stdin.close()


def _converse(
    to_java: IO[bytes], from_java: IO[bytes], references: Sequence[Sequence[str]], candidates: Sequence[str]
) -> tuple[float, list[float]]:
    """SCORE each image, which gives match statistics, then EVAL them all, which gives each score and the corpus'."""

    def ask(line: str) -> None:
        to_java.write(f"{line}\n".encode("utf-8", "replace"))
        to_java.flush()

    def answer() -> str:
        line = from_java.readline().decode("utf-8", "replace").strip()
        if not line:
            raise ValueError("the process ended")
        return line

    statistics = []
    for image_references, candidate in zip(references, candidates, strict=True):
        ask(" ||| ".join(["SCORE", *map(_clean, image_references), _clean(candidate)]))
        statistics.append(answer())
    ask(" ||| ".join(["EVAL", *statistics]))
    per_image = [float(answer()) for _ in candidates]
    return float(answer()), per_image


def _clean(words: str) -> str:
    """Without the separator of the protocol."""
    return words.replace("|||", "").replace("  ", " ")
