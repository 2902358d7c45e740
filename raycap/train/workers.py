"""What the workers of a training do together, in torch.distributed. Knows nothing of Ray."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from raycap.errors import ConfigurationError
from raycap.storage import Store

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """All workers, as seen by one. Each calls the same methods in the same order."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first worker makes, on all."""
        if self.world_size == 1:
            return make()
        box: list[Any] = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box)
        made: T = box[0]
        return made

    def gathered(self, mine: dict[T, str]) -> dict[T, str]:
        """What all have."""
        if self.world_size == 1:
            return mine
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine)
        return {key: text for part in parts for key, text in part.items()}

    def check_shared(self, store: Store) -> None:
        """Raise ConfigurationError if what the first one writes is not there for all."""
        if self.world_size == 1:
            return

        def mark() -> str:
            key = f"shared-{uuid.uuid4().hex}"
            store.write(key, b"The first worker looks whether the others see this.\n")
            return key

        key = self.from_first(mark)
        if not store.exists(key):
            raise ConfigurationError(
                f"worker {self.rank} does not see what the first one writes to {store.location}: all workers must "
                "share --run-dir; give an s3:// prefix, or a directory that is the same on all nodes"
            )
        self.barrier()
        if self.rank == 0:
            store.delete(key)
