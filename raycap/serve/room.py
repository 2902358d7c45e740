"""Who is let in: no more images at a time than fit, and none that would wait for too long."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raycap.serve.config import ServeConfig
from raycap.serve.problems import draining, overloaded

MEMORY_S = 5.0
"""After so long a request says a third of what it said at first of how long requests take."""
EXPECTED_SHARE = 0.65
"""Of the longest latency, what a request may be expected to take: at 150% of saturation one in a hundred took 1.5 times
as long as half of them (`raycap benchmark --parts serve`)."""


class _Recent:
    """What requests took of late, for each image that was in work when they came."""

    def __init__(self, clock: Callable[[], float], memory_s: float) -> None:
        self._clock = clock
        self._memory_s = memory_s
        self._at_s = clock()
        self._seconds = self._images = 0.0
        """Both summed, and fading."""

    def add(self, num_images: int, seconds: float) -> None:
        now_s = self._clock()
        fading = math.exp((self._at_s - now_s) / MEMORY_S)
        self._seconds, self._images = self._seconds * fading + seconds, self._images * fading + num_images
        self._at_s = now_s

    @property
    def cost_s(self) -> float | None:
        """Seconds an image; None if there was no request of late."""
        is_known = self._images and self._clock() - self._at_s <= self._memory_s
        return self._seconds / self._images if is_known else None


class Room:
    """How many images may be in work at a time: so many, and no more than are captioned in time."""

    def __init__(
        self,
        size: int,
        *,
        max_latency_s: float | None = None,
        always: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            size: most images.
            max_latency_s: requests that would take longer get no room.
            always: so many images get room however long they take: with fewer, models would have less to do, be
                slower for that, and let in still fewer.
            clock: seconds.
        """
        self.taken = 0
        self.is_leaving = False
        self.is_closing = False
        self._size = size
        self._max_latency_s = math.inf if max_latency_s is None else max_latency_s
        self._always = always
        longest_s = MEMORY_S if max_latency_s is None else max(MEMORY_S, max_latency_s)
        self._full, self._all = (_Recent(clock, longest_s) for _ in range(2))
        """Requests that came when the models had all that they can take at a time; and all requests."""
        self._emptied = asyncio.Event()

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A request's place, for one image at first, until the block ends. Raises ProblemError if there is no room."""
        place = Place(self)
        place.hold(1)
        try:
            yield place
        finally:
            self.taken -= place.num_images
            if not self.taken:
                self._emptied.set()

    def take(self, num_images: int, *, has: int) -> None:
        """Take room for so many images in place of those that the request has. Raises ProblemError at once if there is
        none."""
        taken = self.taken - has + num_images
        if taken > self._size:
            raise overloaded()
        # A request that comes alone is let in, too, however many images it has.
        if self.taken > has and taken > self._always and self.expected_s(taken) > EXPECTED_SHARE * self._max_latency_s:
            raise overloaded()
        self.taken = taken

    def learn(self, num_in_work: int, seconds: float) -> None:
        """A request that came when so many images were in work, its own among them, was answered after so long."""
        self._all.add(num_in_work, seconds)
        if num_in_work >= self._always:
            self._full.add(num_in_work, seconds)

    def expected_s(self, num_images: int) -> float:
        """How long it takes now until so many are answered, in the order in which they come; 0 if that is not known, as
        where nobody was answered in the longest time that a request may take.

        Requests that came to models with little to do say too much, since there a few images take as long as many: they
        count only where there are no others.
        """
        return num_images * (self._full.cost_s or self._all.cost_s or 0.0)

    def leave(self) -> None:
        """Say that the server is about to end, so that load balancers turn away; who comes is answered as before."""
        self.is_leaving = True

    async def close(self) -> None:
        """Have requests that come from now on refused; return when those that came before are answered."""
        self.is_leaving = self.is_closing = True
        while self.taken:
            self._emptied.clear()
            await self._emptied.wait()

    def check_open(self) -> None:
        """Raise ProblemError if it is closing."""
        if self.is_closing:
            raise draining()

    def check_stays(self) -> None:
        """Raise ProblemError if it is about to close."""
        if self.is_leaving:
            raise draining()


class Place:
    """What one request has of the room."""

    def __init__(self, room: Room) -> None:
        self.num_images = 0
        self._room = room

    def hold(self, num_images: int) -> None:
        """Have room for so many images. Raises ProblemError at once if there is none."""
        self._room.take(num_images, has=self.num_images)
        self.num_images = num_images


def room_for(config: ServeConfig) -> Room:
    """Of one ingress with these settings."""
    always = config.calls.max_partial(config.num_replicas) * config.batch_size
    return Room(config.max_queue, max_latency_s=config.max_latency_s, always=min(config.max_queue, always))
