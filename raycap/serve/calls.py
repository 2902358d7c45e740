"""How many calls the ingresses make at a time of the replicas of a model. Plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

IN_WORK = 2
"""Calls to each replica, from all ingresses together: a batch in work and the next one waiting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """Of one model. What waits beyond them waits in the ingress, where it can still go away.

    Ray counts calls to start and end replicas. Where their number may grow, calls that are full go beyond `IN_WORK`
    for each replica that is there, so Ray sees by them that there is more to do than these can.
    """

    num_ingress: int
    num_replicas: int
    max_replicas: int

    def max_partial(self, num_replicas: int) -> int:
        """Calls of one ingress to so many replicas, while what waits does not fill another."""
        return math.ceil(IN_WORK * num_replicas / self.num_ingress)

    @property
    def per_replica(self) -> float:
        """Calls of all ingresses to each replica: more than `IN_WORK` where an ingress has no whole number of them."""
        return self.max_partial(self.num_replicas) * self.num_ingress / self.num_replicas

    @property
    def max_running(self) -> int:
        """Calls of one ingress, if they are full."""
        return math.ceil(self.per_replica * self.max_replicas / self.num_ingress)
