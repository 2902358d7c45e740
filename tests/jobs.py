"""A cluster as `cluster/` makes them, jobs that are submitted to it by Ray's own commands, and what becomes of them."""

from __future__ import annotations

import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.commands import ROOT, clean_environment, end_with_parent, wait_until
from tests.ray_cluster import Node, RayCluster
from tests.s3 import S3Server


class Platform:
    """The cluster, a bucket that its nodes reach, and Ray's commands for both."""

    def __init__(self, server: S3Server, bucket: str, cluster: RayCluster) -> None:
        self.server = server
        self.bucket = bucket
        self.cluster = cluster
        self.head = cluster.nodes[0]
        self.cpu = cluster.add_node(num_cpus=1)
        self.gpu = cluster.add_node(num_cpus=1, num_gpus=1)
        self.commands: list[subprocess.Popen[str]] = []

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """One of Ray's programs, as a user runs it."""
        process = subprocess.Popen(
            [sys.executable, str(Path(sysconfig.get_path("scripts")) / program), *arguments],
            env=clean_environment() | self.cluster.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=partial(end_with_parent, signal.SIGKILL),
        )
        self.commands.append(process)
        return process

    def run(self, program: str, *arguments: str) -> str:
        """What it prints."""
        process = self.start(program, *arguments)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return said

    def end(self) -> None:
        """Kill the commands that still run."""
        for process in self.commands:
            with process:  # which closes its output, and waits
                process.kill()

    def ask(self, path: str, method: str = "GET", **params: Any) -> httpx.Response:
        """Ask the dashboard's interface."""
        headers = {"Authorization": f"Bearer {self.cluster.env['RAY_AUTH_TOKEN']}"}
        return httpx.request(method, self.cluster.dashboard + path, params=params, headers=headers, timeout=60)

    def keys(self, prefix: str) -> list[str]:
        """Of the objects in the bucket."""
        pages = self.server.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [each["Key"] for page in pages for each in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        """An object of the bucket."""
        body: bytes = self.server.client().get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return body

    def write(self, key: str, data: bytes) -> None:
        """Make it one."""
        self.server.client().put_object(Bucket=self.bucket, Key=key, Body=data)

    def job(self, name: str, script: str, *arguments: str) -> Job:
        """Submit one."""
        return Job(self, name, script, *arguments)

    def make_whole(self) -> None:
        """Bring back what crashed, or was given up by Ray."""
        if self.cpu.has_ended():
            self.cpu = self.cluster.bring_back(self.cpu)
        if self.gpu.has_ended():
            self.gpu = self.cluster.bring_back(self.gpu)


class Job:
    """`ray job submit` of a script of jobs/."""

    def __init__(self, platform: Platform, name: str, script: str, *arguments: str) -> None:
        self.name = name
        self._platform = platform
        submit = ("job", "submit", "--address", platform.cluster.dashboard, "--submission-id", name)
        entrypoint = ("--working-dir", str(ROOT / "jobs"), "--", sys.executable, f"{script}.py", *arguments)
        self._process = platform.start("ray", *submit, *entrypoint)

    def has_ended(self) -> bool:
        """Whether the command has, and so the job."""
        return self._process.poll() is not None

    def finish(self) -> tuple[int, str]:
        """The command's exit code, and what it printed, the job's own lines among them."""
        said, _ = self._process.communicate()
        return self._process.returncode, said

    def info(self) -> dict[str, Any]:
        """What the cluster says of it."""
        info: dict[str, Any] = self._platform.ask(f"/api/jobs/{self.name}").json()
        return info

    def driver(self) -> int:
        """The process id of the script."""
        titles = self._platform.head.processes().items()
        (pid,) = (pid for pid, title in titles if title.startswith(sys.executable) and ".py s3://" in title)
        return pid

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Return when the condition holds, before the job ends."""
        wait_until(lambda: self.has_ended() or condition(), what, every_s=0.1)
        assert not self.has_ended(), self.finish()[1]

    def process(self, node: Node, title: str) -> int:
        """The id of one that calls itself so, as soon as there is one."""

        def found() -> list[int]:
            return [pid for pid, each in node.processes().items() if each.startswith(f"ray::{title}")]

        self.wait_until(lambda: bool(found()), title)
        return found()[0]

    def nodes(self, kind: str, title: str) -> set[str]:
        """The ids of the nodes that its "actors" or "tasks" with such a title are and were on."""
        found = self._platform.ask(f"/api/v0/{kind}", limit=10_000, detail=True).json()["data"]["result"]["result"]
        field, job = {"actors": "class_name", "tasks": "name"}[kind], self.info()["job_id"]
        return {each["node_id"] for each in found if each["job_id"] == job and each[field].startswith(title)}
