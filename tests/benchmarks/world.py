"""What the simulation of tests/benchmarks/simulate.py assumes of machines, S3 and raycap, with where it is from."""

from __future__ import annotations

from dataclasses import dataclass

from raycap.bulk.sizing import Rates


@dataclass(frozen=True, kw_only=True)
class World:
    """What is assumed, with where it is from. "Measured" is docs/sizing.md, by the commands that it gives."""

    num_images: int = 10**9
    image_bytes: float = 40_000
    """Measured: Flickr8k at its natural size, 400 to 500 px."""

    node_cpus: int = 8
    node_gpus: int = 1
    """With 0, the CPUs caption too."""
    node_mb_per_s: float = 625
    """Published: the 5 Gb/s that EC2 names as the baseline of g5.2xlarge."""
    node_price_per_hour: float = 1.212
    """Published: EC2 on demand, g5.2xlarge, us-east-1, dollars. Spot costs less, by how much changes daily."""
    buffer_chunks: int = 120
    """Fetched ahead on a node. Assumed: half of Ray's object store, which is 30% of 32 GB, over 38.5 MB a chunk."""

    gpu_images_per_s: float = 1000
    """Assumed: not measured on any GPU yet; what bulk/on_ray.py shares out its committers for."""
    caption_core_s: float = 0.025
    """On nodes without GPUs. Measured: shipped bundle, 3 beams."""
    feed_core_s: float = 0.005
    """Fetching and decoding such a file. Measured: CPU time, from an S3 server on the same machine."""

    keys_per_s: float = 22_800
    """Listing. Measured: docs/exactly-once.md, 16 parts at a time in one process."""
    driver_core_s: float = 0.01
    """Of the driver for each chunk. Measured at 39 chunks/s."""
    start_s: float = 60.0
    """From the manifest to the first fetching task on every node: actors load the model. Assumed."""
    commit_core_s: float = 0.007
    """Of a committer for each chunk. Measured."""
    actors_per_committer: int = 4
    """And how many it writes at a time. Of bulk/on_ray.py, which knows Ray and so is not imported here."""
    join_core_s: float = 0.0025
    """Of reading, checking and joining each chunk. Measured."""
    row_bytes: float = 150.0
    """Of a caption in captions/. Assumed."""

    s3_latency_s: float = 0.15
    """Of a small GET or PUT. Published: AWS, Best practices design patterns, "roughly 100-200 milliseconds"."""
    s3_gets_per_s: float = 5500
    """For each partition of the bucket. Published: same place."""
    s3_puts_per_s: float = 3500
    """The same of PUT requests; all chunks of a run have one prefix."""
    s3_partitions: int = 16
    """That S3 has cut the source's keys into, evenly. Assumed; S3 cuts as it sees load and tells nobody."""
    in_key_order: bool = False
    """What is in flight lies side by side in the listing. False, as raycap reads: spread over all partitions."""
    requests_in_flight: int = 16
    """Of each fetching task: the default of `raycap caption`."""

    losses_per_node_hour: float = 0.01
    """Assumed: 30 times the worst class of EC2's Spot Instance Advisor, above 20% a month."""
    restart_s: float = 300.0
    """Until a lost node is replaced and captions. Assumed."""
    seed: int = 0

    @property
    def rates(self) -> Rates:
        """As `raycap plan` has them."""
        captions_per_s = self.gpu_images_per_s if self.node_gpus else 1 / self.caption_core_s
        return Rates(
            captions_per_s=captions_per_s,
            feed_core_s=self.feed_core_s,
            read_s=self.s3_latency_s,
            image_bytes=self.image_bytes,
            pixel_bytes=0,
        )

    @property
    def num_actors(self) -> int:
        """Captioning actors on a node."""
        return self.node_gpus or self.node_cpus
