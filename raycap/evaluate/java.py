"""The Java programs inside `pycocoevalcap` (PTB tokenizer, METEOR): where they are and how they are started."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from raycap.errors import ConfigurationError

__all__ = ["NO_JAVA", "UTF8", "find_java", "jar", "java_environment"]

NO_JAVA = (
    "no working Java was found on the PATH; install a Java runtime (version 8 or newer, for example the "
    "package default-jre-headless)"
)

_PROBE_TIMEOUT_S = 60.0
"""`java -version` takes 0.1 s; a loaded machine may take long."""

UTF8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")
"""LC_ALL=C makes ASCII of every pipe, these make it UTF-8 again: the first for Java up to 17, the second from 18 on."""


def find_java() -> str | None:
    """Path of a `java` that runs, or None. A stub that only says that Java is not installed counts as none."""
    java = shutil.which("java")
    return java if java is not None and _runs(java) else None


@functools.lru_cache
def _runs(java: str) -> bool:
    try:
        result = subprocess.run([java, "-version"], capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


def java_environment() -> dict[str, str]:
    """This process's environment with the locale that the scorers were written for."""
    return {**os.environ, "LC_ALL": "C"}


def jar(package: str, name: str) -> Path:
    """Path of a jar that ships inside a package, found without importing the package's modules.

    Raises:
        ConfigurationError: the package is not installed, or without its jar.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(directory) / name
        if path.is_file():
            return path
    raise ConfigurationError(
        f"expected {name} inside the package {package}; pip install --force-reinstall pycocoevalcap"
    )
