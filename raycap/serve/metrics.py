"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from raycap.errors import ImageError
from raycap.serve.backend import Result

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_WORDS = tuple(range(1, 21))
_LOG_PROBS = (-40, -30, -25, -20, -17.5, -15, -12.5, -10, -8, -6, -4, -2, 0)


class Metrics:
    """The numbers of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "raycap_requests", "Answers by route and HTTP status", ["route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            "raycap_request_seconds",
            "From a request to its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stages = Histogram(
            "raycap_stage_seconds",
            "Of a request: read, decode; of an image: queue, model",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._images = Counter("raycap_images", "Images captioned", ["model"], registry=self.registry)
        self._failures = Counter(
            "raycap_failures", "Images and requests that failed, by code", ["code"], registry=self.registry
        )
        self._batch_size = Histogram(
            "raycap_batch_size",
            "Images of the batch that an image was captioned in",
            ["model"],
            buckets=_SIZES,
            registry=self.registry,
        )
        self._words = Histogram(
            "raycap_caption_words", "Words of a caption", ["model"], buckets=_WORDS, registry=self.registry
        )
        self._log_prob = Histogram(
            "raycap_caption_log_prob",
            "Log-probability of a caption; when images drift from what the model knows, it falls",
            ["model"],
            buckets=_LOG_PROBS,
            registry=self.registry,
        )

    def queue(self, length: Callable[[], float]) -> None:
        """Ask `length` how many images are in work, whenever the metrics are read."""
        gauge = Gauge("raycap_queue", "Images taken in and not yet answered", registry=self.registry)
        gauge.set_function(length)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def failure(self, code: str) -> None:
        """Count an error by its code."""
        self._failures.labels(code).inc()

    def stage(self, stage: str, seconds: float) -> None:
        """Observe a stage's time."""
        self._stages.labels(stage).observe(seconds)

    def captioned(self, model: str, results: Sequence[Result | ImageError]) -> None:
        """Observe each image."""
        for each in results:
            if isinstance(each, ImageError):
                self.failure(each.code)
                continue
            text, log_prob = each.captions[0]
            self._images.labels(model).inc()
            self.stage("queue", each.queue_s)
            self.stage("model", each.model_s)
            self._batch_size.labels(model).observe(each.batch_size)
            self._words.labels(model).observe(len(text.split()))
            self._log_prob.labels(model).observe(log_prob)

    def families(self) -> list[Metric]:
        """The numbers as they are now, to be sent to another process."""
        return list(self.registry.collect())

    def text(self) -> bytes:
        """In Prometheus's own format."""
        return generate_latest(self.registry)

    async def told(self) -> bytes:
        """What /metrics answers: `text`, or that of all processes where there are several."""
        return self.text()


class UnionOfMetrics(Collector):
    """The numbers of several processes. Each series has the name of its process as the label `ingress`."""

    def __init__(self, processes: Mapping[str, Iterable[Metric]]) -> None:
        self._families: dict[str, Metric] = {}
        for ingress, families in processes.items():
            for each in families:
                family = self._families.setdefault(each.name, Metric(each.name, each.documentation, each.type))
                family.samples += (
                    sample._replace(labels={**sample.labels, "ingress": ingress}) for sample in each.samples
                )

    def collect(self) -> Iterable[Metric]:
        """For Prometheus's own functions."""
        return self._families.values()

    def text(self) -> bytes:
        """In Prometheus's own format."""
        return generate_latest(self)
