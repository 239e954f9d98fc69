"""Metrics under Ray's registry: each row becomes the instrument of its kind, once, with its labels."""

from __future__ import annotations

from typing import Any

import pytest
from eagleray.flows import serve_metrics
from eagleray.flows.serve_metrics import RayMeter
from eagleray.serving.telemetry import METRICS, QUEUE, QUEUED, REQUESTS, Metric


class Recorder:
    """What stands for Ray's instruments: it writes down the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, dict[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("inc", value, tags))

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("observe", value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("set", value, tags))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Instruments by metric name, as they are made."""
    found: dict[str, Recorder] = {}

    def make(metric: Metric) -> Recorder:
        assert metric.name not in found, "an instrument is made once"
        return found.setdefault(metric.name, Recorder())

    monkeypatch.setattr(serve_metrics, "_instrument", make)
    return found


def test_calls_reach_the_instrument_of_the_metric(made: dict[str, Recorder]) -> None:
    meter = RayMeter()
    meter.add(REQUESTS, status="200", route="predict", model="a")
    meter.add(REQUESTS, 2, model="a", route="predict", status="503")
    meter.add(REQUESTS, 0, model="a", route="predict", status="503")  # Ray refuses a counter that adds nothing
    meter.observe(QUEUE, 0.5, model="a")
    meter.set(QUEUED, 3, model="a")
    labels = {"model": "a", "route": "predict"}
    assert made[REQUESTS.name].calls == [
        ("inc", 1.0, {**labels, "status": "200"}),
        ("inc", 2, {**labels, "status": "503"}),
    ]
    assert made[QUEUE.name].calls == [("observe", 0.5, {"model": "a"})]
    assert made[QUEUED.name].calls == [("set", 3, {"model": "a"})]


def test_nothing_is_made_before_it_is_used(made: dict[str, Recorder]) -> None:
    RayMeter()
    assert made == {}


def test_wrong_labels_are_refused(made: dict[str, Recorder]) -> None:
    with pytest.raises(ValueError, match="labels"):
        RayMeter().add(REQUESTS, model="a")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_ray_takes_every_row(metric: Metric, recwarn: pytest.WarningsRecorder) -> None:
    """Ray's own classes take name, buckets and labels, and warn of nothing; no cluster is started for it."""
    from ray.util import metrics

    made: Any = serve_metrics._instrument(metric)
    assert isinstance(made, getattr(metrics, metric.kind.capitalize()))
    assert made.info["name"] == metric.name
    assert made.info["tag_keys"] == metric.labels
    assert not recwarn.list
