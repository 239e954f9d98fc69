"""Binds the table of metrics to Ray's registry: every process of Serve counts, Ray's agents export to Prometheus.

Ray adds where a value comes from (WorkerId, NodeAddress ...), so replicas of one node stay apart. What is worth knowing
of Ray 2.60: a histogram's ``_sum`` is made from the middles of its buckets, so an average of it is an estimate (take
quantiles from the buckets), and a gauge that its process no longer tells goes after two report intervals.

Example:
    >>> meter = RayMeter()  # inside an actor: a replica or a proxy
    >>> meter.add(REQUESTS, model="lite0", route="predict", status="200")
"""

from __future__ import annotations

from typing import Any

from eagleray.serving.telemetry import Metric, SeriesLimit


class RayMeter:
    """Counts under Ray's registry; one a process. An instrument is made when it is first used."""

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}
        self._limit = SeriesLimit()

    def add(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        """Adds to a counter; nothing for 0, which Ray refuses.

        Raises:
            ValueError: Wrong labels: a fault of the caller.
        """
        if value:
            self._instrument(metric).inc(value, self._tags(metric, labels))

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Puts a value into a histogram.

        Raises:
            ValueError: Wrong labels: a fault of the caller.
        """
        self._instrument(metric).observe(value, self._tags(metric, labels))

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Sets a gauge.

        Raises:
            ValueError: Wrong labels: a fault of the caller.
        """
        self._instrument(metric).set(value, self._tags(metric, labels))

    def _tags(self, metric: Metric, labels: dict[str, str]) -> dict[str, str]:
        return dict(zip(metric.labels, self._limit.values(metric, labels), strict=True))

    def _instrument(self, metric: Metric) -> Any:
        found = self._instruments.get(metric.name)
        if found is None:
            found = self._instruments[metric.name] = _instrument(metric)
        return found


def _instrument(metric: Metric) -> Any:
    from ray.util import metrics

    if metric.kind == "counter":
        return metrics.Counter(metric.name, metric.help, metric.labels)
    if metric.kind == "gauge":
        return metrics.Gauge(metric.name, metric.help, metric.labels)
    return metrics.Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)
