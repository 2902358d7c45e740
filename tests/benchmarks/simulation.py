"""A run of the bulk job as events: nodes take tasks as they have room, are lost, and come back."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field

from raycap.bulk.layout import CHUNK_ROWS, CHUNKS_PER_SHARD, num_chunks
from raycap.bulk.sizing import images_per_s, num_fetch_tasks
from tests.benchmarks.world import World


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one size of cluster."""

    num_nodes: int
    listing_h: float
    captioning_h: float
    joining_h: float
    images_per_s: float
    """While captioning."""
    gpu_share: float
    """Of the GPUs' time while captioning that went into captions that were kept."""
    gpu_share_of_all: float
    """The same over the whole run."""
    cost: float
    """Of all nodes for the whole run; S3 requests are not in it."""
    num_losses: int
    captions_lost: float
    reads_lost: float
    """Images that were fetched and had to be fetched again."""
    busy: dict[str, float]
    """Share of the time of captioning that each resource was in use, the busiest first."""
    committed: list[tuple[int, int]] = field(repr=False)
    """First chunk and number of chunks of what was committed at a time."""

    @property
    def hours(self) -> float:
        """From start to end."""
        return self.listing_h + self.captioning_h + self.joining_h

    @property
    def bottleneck(self) -> str:
        """What took the longest: the listing, or what captioning waited for."""
        return "listing" if self.listing_h > self.captioning_h else next(iter(self.busy))

    @property
    def next_bottleneck(self) -> str:
        """What it would be if the bottleneck were gone."""
        return next(name for name in self.busy if name != self.bottleneck)


class _Shared:
    """A resource that all nodes share and that serves them one after another."""

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.free_at = self.busy_s = 0.0

    def take(self, at: float, amount: float) -> tuple[float, float]:
        """When it begins with so much of its work, and when it is done with it."""
        start = max(at, self.free_at)
        self.free_at = start + amount / self.per_s
        self.busy_s += amount / self.per_s
        return start, self.free_at


@dataclass(frozen=True, slots=True)
class _Task:
    """Chunks that one node fetches, captions and commits."""

    first: int
    chunks: int
    images: int
    fetch_from: float
    fetch_to: float
    caption_from: float
    done: float

    def chunks_at(self, time: float) -> float:
        """How many are committed by then; the fraction is of the one in work."""
        return self.chunks * min(1.0, max(0.0, (time - self.caption_from) / (self.done - self.caption_from)))

    def fetched_at(self, time: float) -> float:
        """How many images are fetched by then."""
        return self.images * min(1.0, max(0.0, (time - self.fetch_from) / (self.fetch_to - self.fetch_from)))


@dataclass(slots=True)
class _Node:
    feed_free: float = 0.0
    caption_free: float = 0.0
    life: int = 0
    """How often it was lost: what was planned before does not count."""
    tasks: deque[_Task] = field(default_factory=deque)


class Captioning:
    """The run from the first fetching task to the last chunk. Times in seconds from its beginning."""

    def __init__(self, world: World, num_nodes: int) -> None:
        self.world, self.num_nodes = world, num_nodes
        self.num_chunks = num_chunks(world.num_images)
        self.per_task = min(CHUNKS_PER_SHARD, max(1, self.num_chunks // (8 * world.node_cpus * num_nodes)))
        self.most_tasks = max(2, world.buffer_chunks // self.per_task)
        self.caption_rate = images_per_s(world.rates, world.node_cpus, 0)[0]
        if world.node_gpus:
            self.caption_rate = world.node_gpus * world.gpu_images_per_s
        self.feed_rate, self.feed_name = self._feeding()
        committers = -(-world.num_actors * num_nodes // world.actors_per_committer)
        self.shared = {
            "driver": _Shared(1 / world.driver_core_s),
            "S3 GETs": _Shared(world.s3_gets_per_s * self._partitions()),
            "S3 PUTs": _Shared(world.s3_puts_per_s),
            "committers": _Shared(committers * self._commits_per_s()),
        }
        self.committed: list[tuple[int, int]] = []
        self.num_losses, self.captions_lost, self.reads_lost, self.caption_s, self.feed_s = 0, 0.0, 0.0, 0.0, 0.0
        self._next_chunk, self._again = 0, list[tuple[int, int]]()
        self._nodes = [_Node() for _ in range(num_nodes)]
        self._idle: set[int] = set()
        self._events: list[tuple[float, int, int, bool]] = []
        self._random = random.Random(world.seed)

    def _feeding(self) -> tuple[float, str]:
        """Images a second that a node fetches and decodes at most, and what keeps it from more."""
        world = self.world
        tasks = num_fetch_tasks(world.node_cpus, world.node_gpus)
        return min(
            (min(tasks, world.node_cpus) / world.feed_core_s, "cores that fetch and decode"),
            (tasks * world.requests_in_flight / world.s3_latency_s, "requests in flight"),
            (1e6 * world.node_mb_per_s / world.image_bytes, "network"),
        )

    def _commits_per_s(self) -> float:
        """Chunks a second of one committer, which writes as many at a time as it has actors, with one core."""
        world = self.world
        return min(world.actors_per_committer / (world.s3_latency_s + world.commit_core_s), 1 / world.commit_core_s)

    def _partitions(self) -> float:
        """How many partitions of the bucket are read at a time, on average."""
        world = self.world
        if not world.in_key_order:
            return world.s3_partitions
        in_flight = self.num_nodes * self.most_tasks * self.per_task * CHUNK_ROWS
        return min(world.s3_partitions, 1 + in_flight / (world.num_images / world.s3_partitions))

    def run(self) -> float:
        """Everything that happens; gives the time of the last commit."""
        end, left = 0.0, self.num_chunks
        for number in range(self.num_nodes):
            self._join(number, 0.0)
        while left:
            now, number, life, is_loss = heapq.heappop(self._events)
            node = self._nodes[number]
            if life != node.life:
                continue
            if is_loss:
                self._idle.discard(number)
                left -= self._lose(node, now)
                self._join(number, now + self.world.restart_s)
                continue
            while node.tasks and node.tasks[0].done <= now:
                task = node.tasks.popleft()
                end = max(end, task.done)
                left -= self._commit(task.first, task.chunks)
            if len(node.tasks) >= self.most_tasks or not self._has_work():
                if node.tasks:
                    self._at(node.tasks[0].done, number)
                else:
                    self._idle.add(number)
                continue
            task = self._start(node, now)
            node.tasks.append(task)
            self._at(task.fetch_to, number)
        return end

    def _at(self, time: float, number: int) -> None:
        heapq.heappush(self._events, (time, number, self._nodes[number].life, False))

    def _join(self, number: int, time: float) -> None:
        """A node comes, and the moment when it goes is drawn."""
        self._at(time, number)
        if self.world.losses_per_node_hour:
            lost_at = time + self._random.expovariate(self.world.losses_per_node_hour / 3600)
            heapq.heappush(self._events, (lost_at, number, self._nodes[number].life, True))

    def _has_work(self) -> bool:
        return bool(self._again) or self._next_chunk < self.num_chunks

    def _start(self, node: _Node, now: float) -> _Task:
        if self._again:
            first, chunks = self._again.pop()
        else:
            first, chunks = self._next_chunk, min(self.per_task, self.num_chunks - self._next_chunk)
            self._next_chunk += chunks
        images = min((first + chunks) * CHUNK_ROWS, self.world.num_images) - first * CHUNK_ROWS
        driver_from, driver_to = self.shared["driver"].take(now, chunks)
        reads_from, reads_to = self.shared["S3 GETs"].take(now, images)
        fetch_from = max(now, node.feed_free, driver_from, reads_from)
        fetch_to = max(fetch_from + images / self.feed_rate, driver_to, reads_to)
        caption_from = max(node.caption_free, fetch_from + images / chunks / self.feed_rate)
        caption_to = max(caption_from + images / self.caption_rate, fetch_to + images / chunks / self.caption_rate)
        written = caption_to + self.world.s3_latency_s + self.world.commit_core_s
        done = max(written, *(self.shared[name].take(now, chunks)[1] for name in ("S3 PUTs", "committers")))
        node.feed_free, node.caption_free = fetch_to, caption_to
        self.caption_s += images / self.caption_rate
        self.feed_s += images / self.feed_rate
        return _Task(first, chunks, images, fetch_from, fetch_to, caption_from, done)

    def _commit(self, first: int, chunks: int) -> int:
        if chunks:
            self.committed.append((first, chunks))
        return chunks

    def _lose(self, node: _Node, now: float) -> int:
        """Chunks whose file is there stay, the others are done again; gives the number of the former."""
        num_kept = 0
        self.num_losses += 1
        for task in node.tasks:
            done = task.chunks_at(now)
            kept = int(done)
            num_kept += self._commit(task.first, kept)
            if kept == task.chunks:
                continue
            self._again.append((task.first + kept, task.chunks - kept))
            per_chunk = task.images / task.chunks
            self.captions_lost += (done - kept) * per_chunk
            self.reads_lost += max(0.0, task.fetched_at(now) - kept * per_chunk)
            self.caption_s -= (task.chunks - kept) * per_chunk / self.caption_rate
        node.tasks.clear()
        node.life += 1
        node.feed_free = node.caption_free = 0.0
        if self._again:
            for number in self._idle:
                self._at(now, number)
            self._idle.clear()
        return num_kept


def simulate(world: World, num_nodes: int) -> Result:
    """One run on so many nodes."""
    captioning = Captioning(world, num_nodes)
    captioning_s = captioning.run()
    listing_s = world.num_images / world.keys_per_s
    joining_s = _joining_s(world, num_nodes * world.node_cpus)
    busy = {name: shared.busy_s / captioning_s for name, shared in captioning.shared.items()}
    busy["captioning"] = captioning.caption_s / (num_nodes * captioning_s)
    busy[captioning.feed_name] = captioning.feed_s / (num_nodes * captioning_s)
    all_s = listing_s + world.start_s + captioning_s + joining_s
    return Result(
        num_nodes=num_nodes,
        listing_h=listing_s / 3600,
        captioning_h=(world.start_s + captioning_s) / 3600,
        joining_h=joining_s / 3600,
        images_per_s=world.num_images / captioning_s,
        gpu_share=busy["captioning"],
        gpu_share_of_all=captioning.caption_s / (num_nodes * all_s),
        cost=num_nodes * all_s / 3600 * world.node_price_per_hour,
        num_losses=captioning.num_losses,
        captions_lost=captioning.captions_lost,
        reads_lost=captioning.reads_lost,
        busy=dict(sorted(busy.items(), key=lambda item: -item[1])),
        committed=captioning.committed,
    )


def _joining_s(world: World, num_cores: int) -> float:
    """Names of all chunks, a page of 1,000 after the other; then a task for each output file of 128 MB, which reads its
    chunks one by one."""
    chunks = num_chunks(world.num_images)
    files = math.ceil(world.num_images * world.row_bytes / 128e6)
    waves = math.ceil(files / num_cores)
    per_chunk_s = world.s3_latency_s + world.join_core_s
    return chunks / 1000 * world.s3_latency_s + waves * chunks / files * per_chunk_s
