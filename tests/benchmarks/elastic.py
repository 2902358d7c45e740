"""A training on two nodes that loses one and gets it back: says when, and with how many workers it goes on.

    python -m tests.benchmarks.elastic

Takes minutes, since Ray Train looks for new nodes once a minute.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.commands import starting_commands, wait_until
from tests.integration.test_train_faults_ray import arguments, checkpoints_seen
from tests.integration.test_train_ray import write_dataset
from tests.ray_cluster import RayCluster

EPOCHS = 40  # of a few seconds each


def main() -> None:
    started = time.monotonic()

    def say(what: str) -> None:
        sys.stdout.write(f"{time.monotonic() - started:4.0f} s  {what}\n")

    with tempfile.TemporaryDirectory() as directory, RayCluster(head_cpus=1) as cluster, starting_commands() as start:
        folder = Path(directory)
        write_dataset(folder)
        node = cluster.add_node(num_cpus=1)
        given = arguments(folder, directory, f"{directory}/model", f"{directory}/runs")
        given += ["--epochs", str(EPOCHS), "--checkpoint-every", "1", "--min-workers", "1"]
        command = start(*given, "--ray-address", cluster.address, env=cluster.env)
        run, seen = folder / "runs" / "model", set[str]()
        wait_until(lambda: checkpoints_seen(run, seen) >= 2, "two checkpoints")
        node.end()
        say("a node is killed")
        before = len(seen)
        wait_until(lambda: checkpoints_seen(run, seen) >= before + 3, "three more checkpoints")
        cluster.add_node(num_cpus=1)
        say("it has come back")
        code, _, err = command.finish(deadline_s=900)
        say(f"exit code {code}")
    told = [line for line in err.splitlines() if "resuming" in line or "failed" in line or "wrote" in line]
    sys.stdout.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main()
