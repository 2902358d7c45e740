"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Generator, Iterator

import pytest

from tests.s3 import S3Server, running_s3_server

if "PYTEST_XDIST_WORKER" in os.environ:  # each of the processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main() -> Generator[None, int, int]:
    """Where Ray was loaded, end the process with the tests' exit code and no native destructors.

    Of each session of Ray after the first, threads run on (Ray 2.60: the exporter of metrics; Ray Serve's router), and
    what they use may be destroyed under them at the exit: a run that passed has ended by SIGSEGV. Commands of raycap
    start Ray once, and the tests of their exit codes have processes of their own.
    """
    code = yield
    if "ray" in sys.modules:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server of its own for this test session. Tests that use it are marked `integration`."""
    with running_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def no_aws_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No S3 keys or settings of this machine: neither environment, nor files, nor instance role."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a saved bundle of random weights."""
    from tests.bundles import random_bundle  # torch: only where it is needed

    path = str(tmp_path_factory.mktemp("bundle") / "tiny")
    random_bundle().save(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What raycap keeps on a machine goes into the session's own folder, also of the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYCAP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
