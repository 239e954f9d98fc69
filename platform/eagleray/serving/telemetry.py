"""Every number that serving tells: the names, kinds and labels in one table, and what counts them.

Why one table: the dashboard, the alerts and the code must name the same things (a test compares them), and a label
whose values a caller chooses would grow without end. So labels take values from small closed sets, and past MOST_SERIES
of a metric every further combination is counted under ``other``. What Ray Serve counts already (``ray_serve_*``) is not
counted here: these metrics know the model, the reason and the batch, which Ray does not.

A metric goes out under Ray's prefix: ``eagleray_serving_requests_total`` is scraped as
``ray_eagleray_serving_requests_total`` (flows/serve_metrics.py binds it to Ray's registry).

Example:
    >>> meter = MemoryMeter()
    >>> meter.add(REQUESTS, model="lite0", route="predict", status="200")
    >>> meter.observe(QUEUE, 0.004, model="lite0")
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
PREFIX = "ray_"  # what Ray puts before every metric of an application
OTHER = "other"
MOST_SERIES = 1_000  # combinations of labels of one metric in one process; Prometheus' advice is tens, not thousands
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}

# Seconds; the edges stand where an SLO may: 50, 100, 250 ms. Below 1 ms nothing of a request is worth a bucket.
LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LOAD_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
BYTES = (1e3, 1e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 2.5e6, 5e6, 1e7, 2e7, 5e7)


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        name: As Prometheus asks: ``eagleray_serving_<what>_<base unit>``, a counter with ``_total``.
        kind: "counter", "gauge" or "histogram".
        help: What it counts, in one line.
        labels: The names of its labels; each must be given, and takes values of a small closed set.
        buckets: Upper edges of a histogram's buckets, rising.
    """

    name: str
    kind: Kind
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names under which Prometheus sees it."""
        return tuple(f"{PREFIX}{self.name}{suffix}" for suffix in SUFFIXES[self.kind])


def _counter(what: str, text: str, *labels: str) -> Metric:
    return Metric(f"eagleray_serving_{what}_total", "counter", text, labels)


def _gauge(what: str, text: str, *labels: str) -> Metric:
    return Metric(f"eagleray_serving_{what}", "gauge", text, labels)


def _histogram(what: str, text: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"eagleray_serving_{what}", "histogram", text, labels, buckets)


# model: a configured name, or "none" before one is chosen. route: predict, embed, infer, page ... status: HTTP's.
REQUESTS = _counter("requests", "Requests answered, refused ones too.", "model", "route", "status")
REQUEST = _histogram(
    "request_seconds", "From a whole request to its answer, below 400 only.", LATENCY_S, "model", "route"
)
BODY = _histogram("body_bytes", "Size of the bodies that were read.", BYTES, "route")
REFUSALS = _counter("refusals", "Requests refused, by the refusal's code.", "code")
ADMISSIONS = _counter("admissions", "Requests of a tenant: admitted, or a refusal's code.", "tenant", "outcome")
# status: scored or quarantined. reason: a code of vision.images.Reason, "" when scored.
IMAGES = _counter("images", "Images answered.", "model", "status", "reason")
DECISIONS = _counter("decisions", "What the threshold policy did: decided, abstained, none.", "model", "kind")

QUEUE = _histogram("queue_seconds", "An image's wait for the engine.", LATENCY_S, "model")
DECODE = _histogram("decode_seconds", "Decoding of one image.", LATENCY_S, "model")
INFER = _histogram("infer_seconds", "One batch in the engine.", LATENCY_S, "model")
BATCH = _histogram("batch_images", "Images in one batch.", BATCHES, "model")
QUEUED = _gauge("queued_images", "Images that wait for the engine now.", "model")
QUEUE_DELAY = _gauge("queue_delay_seconds", "The wait that a new image would have, estimated.", "model")
UTILIZATION = _gauge("utilization_ratio", "Share of the time in which the engine ran, 0..1.", "model")
DROPPED = _counter("dropped", "Images that left the queue unanswered: cancelled, expired.", "model", "why")
SPLIT_BATCHES = _counter("split_batches", "Batches that failed and were run image by image.", "model")

CANARY = _counter("canary_checks", "Canary checks: ok, drift, timeout, error.", "model", "outcome")
CANARY_TIME = _histogram("canary_seconds", "One canary through the batch path.", LATENCY_S, "model")
CANARY_DRIFT = _gauge("canary_drift_ratio", "The canary's largest difference over its tolerance; bad > 1.", "model")

LOADED = _gauge("models_loaded", "Models in this replica's memory.")
LOAD = _histogram("model_load_seconds", "Loading and warming of a model.", LOAD_S, "model")
EVICTIONS = _counter("model_evictions", "Models put out of memory for another.", "model")
# version: the first 12 hex digits of the model's digest
MODEL = _gauge(
    "model_info", "1 for each loaded model, 0 once it is put away.", "model", "version", "runtime", "precision"
)

METRICS: tuple[Metric, ...] = (
    *(REQUESTS, REQUEST, BODY, REFUSALS, ADMISSIONS, IMAGES, DECISIONS),
    *(QUEUE, DECODE, INFER, BATCH, QUEUED, QUEUE_DELAY, UTILIZATION, DROPPED, SPLIT_BATCHES),
    *(CANARY, CANARY_TIME, CANARY_DRIFT, LOADED, LOAD, EVICTIONS, MODEL),
)


class Meter(Protocol):
    """What counts: MemoryMeter in tests and in-process, NullMeter where nothing listens, Ray's in a cluster."""

    def add(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        """Adds to a counter."""

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Puts a value into a histogram."""

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Sets a gauge."""


class NullMeter:
    """Counts nothing."""

    def add(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        """Nothing."""

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Nothing."""

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Nothing."""


class SeriesLimit:
    """Keeps a metric's label combinations finite: past `most` new ones become ``other`` in every label.

    Args:
        most: Combinations that one metric may have in this process.
    """

    def __init__(self, most: int = MOST_SERIES) -> None:
        self._most, self._seen = most, dict[str, set[Labels]]()

    def values(self, metric: Metric, labels: Mapping[str, str]) -> Labels:
        """The labels' values in the metric's order.

        Raises:
            ValueError: A label that the metric does not have, or one that is missing: a fault of the caller.
        """
        if len(labels) != len(metric.labels):
            raise ValueError(f"{metric.name} has the labels {metric.labels}, got {tuple(labels)}")
        try:
            given = tuple(labels[name] for name in metric.labels)
        except KeyError:
            raise ValueError(f"{metric.name} has the labels {metric.labels}, got {tuple(labels)}") from None
        seen = self._seen.setdefault(metric.name, set())
        if given in seen:
            return given
        if len(seen) >= self._most:
            return tuple(OTHER for _ in given)
        seen.add(given)
        return given


@dataclass
class Distribution:
    """A histogram's series: counts by bucket (the last is everything above), their sum and number."""

    buckets: list[int]
    total: float = 0.0
    count: int = 0


@dataclass
class MemoryMeter:
    """Counts in this process, and refuses a wrong name or kind.

    Attributes:
        numbers: Counters and gauges by (metric name, values of its labels).
        distributions: Histograms likewise.
    """

    numbers: dict[tuple[str, Labels], float] = field(default_factory=dict)
    distributions: dict[tuple[str, Labels], Distribution] = field(default_factory=dict)
    limit: SeriesLimit = field(default_factory=SeriesLimit)

    def add(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        """Adds to a counter.

        Raises:
            ValueError: Not a counter, a value below 0, or wrong labels.
        """
        key = self._key(metric, "counter", labels)
        if value < 0:
            raise ValueError(f"{metric.name} only rises, got {value}")
        self.numbers[key] = self.numbers.get(key, 0.0) + value

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Puts a value into a histogram.

        Raises:
            ValueError: Not a histogram, or wrong labels.
        """
        key = self._key(metric, "histogram", labels)
        found = self.distributions.setdefault(key, Distribution([0] * (len(metric.buckets) + 1)))
        found.buckets[bisect_left(metric.buckets, value)] += 1
        found.total += value
        found.count += 1

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Sets a gauge.

        Raises:
            ValueError: Not a gauge, or wrong labels.
        """
        self.numbers[self._key(metric, "gauge", labels)] = value

    def number(self, metric: Metric, /, **labels: str) -> float:
        """A counter's or gauge's value: the sum over all series that have these labels; 0 when there is none."""
        wanted = {metric.labels.index(name): value for name, value in labels.items()}
        return sum(
            number
            for (name, values), number in self.numbers.items()
            if name == metric.name and all(values[place] == value for place, value in wanted.items())
        )

    def _key(self, metric: Metric, kind: Kind, labels: Mapping[str, str]) -> tuple[str, Labels]:
        if metric.kind != kind:
            raise ValueError(f"{metric.name} is a {metric.kind}, used as a {kind}")
        return metric.name, self.limit.values(metric, labels)
