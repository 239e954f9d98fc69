"""The table of metrics keeps Prometheus' rules and its own; meters count; label values cannot grow without end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from eagleray.serving import telemetry
from eagleray.serving.telemetry import (
    METRICS,
    OTHER,
    QUEUE,
    QUEUED,
    REFUSALS,
    REQUESTS,
    MemoryMeter,
    Meter,
    Metric,
    NullMeter,
    SeriesLimit,
)

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("seconds", "bytes", "ratio", "images", "info", "loaded")  # base units, or what is counted
RESERVED = {"le", "quantile", "job", "instance", "WorkerId", "NodeAddress", "SessionName", "Version", "Component"}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_prometheus(metric: Metric) -> None:
    """https://prometheus.io/docs/practices/naming: one prefix, base units, counters end in _total and nothing else."""
    assert re.fullmatch(r"eagleray_serving_[a-z][a-z_]*[a-z]", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    if metric.kind != "counter":
        assert metric.name.rpartition("_")[2] in UNITS, metric.name
    assert "_ms" not in metric.name
    assert metric.help.endswith(".")
    assert not set(metric.labels) & RESERVED
    assert len(set(metric.labels)) == len(metric.labels) <= 4


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_only_histograms_have_buckets_and_these_rise(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert all(edge > 0 for edge in metric.buckets)  # Ray refuses others


def test_names_stand_once_and_every_constant_is_in_the_table() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    constants = [value for value in vars(telemetry).values() if isinstance(value, Metric)]
    assert {metric.name for metric in constants} == {metric.name for metric in METRICS}


def test_every_metric_is_counted_somewhere() -> None:
    """A row that nothing tells would be a flat line on the dashboard for ever."""
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("serving", "flows")
        for path in (ROOT / "platform" / "eagleray" / folder).glob("*.py")
        if path.name != "telemetry.py"
    ]
    constants = {name: value for name, value in vars(telemetry).items() if isinstance(value, Metric)}
    told = re.compile(r"\.(?:add|observe|set)\(\s*([A-Z_]+)\b")
    named = {name for text in sources for name in told.findall(text)}
    assert sorted(set(constants) - named) == []


def test_no_metric_doubles_one_of_ray_serve() -> None:
    for metric in METRICS:
        assert "serve_" not in metric.name.removeprefix("eagleray_serving_")
        assert all(name.startswith("ray_eagleray_serving_") for name in metric.exported)


def test_a_counter_adds_and_a_gauge_is_set() -> None:
    meter = MemoryMeter()
    meter.add(REQUESTS, model="a", route="predict", status="200")
    meter.add(REQUESTS, 2, model="a", route="predict", status="503")
    meter.set(QUEUED, 7, model="a")
    meter.set(QUEUED, 3, model="a")
    assert meter.number(REQUESTS, model="a") == 3
    assert meter.number(REQUESTS, status="503") == 2
    assert meter.number(REQUESTS, status="404") == 0
    assert meter.number(QUEUED) == 3


@pytest.mark.parametrize("value", [0.001, 0.00100001, 0.0024, 0.1, 9.99, 10.0, 10.1, 1e9])
def test_a_histogram_counts_in_the_first_bucket_whose_edge_is_not_below(value: float) -> None:
    """The slow way: go through the edges."""
    meter = MemoryMeter()
    meter.observe(QUEUE, value, model="a")
    ((_, found),) = meter.distributions.items()
    expected = next((place for place, edge in enumerate(QUEUE.buckets) if value <= edge), len(QUEUE.buckets))
    assert found.buckets.index(1) == expected
    assert (found.count, found.total) == (1, value)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda meter: meter.add(QUEUED, model="a"),
        lambda meter: meter.observe(REQUESTS, 1.0, model="a", route="b", status="c"),
        lambda meter: meter.set(QUEUE, 1.0, model="a"),
        lambda meter: meter.add(REQUESTS, model="a", route="predict"),
        lambda meter: meter.add(REQUESTS, model="a", route="predict", state="200"),
        lambda meter: meter.add(REQUESTS, -1, model="a", route="predict", status="200"),
    ],
)
def test_a_wrong_kind_label_or_value_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="eagleray_serving"):
        wrong(MemoryMeter())  # type: ignore[operator]


def test_label_values_are_finite_whatever_comes() -> None:
    """A caller who could choose a label would fill the memory of Prometheus; the known go on, the new become other."""
    limit = SeriesLimit(most=3)
    assert [limit.values(REFUSALS, {"code": str(number)}) for number in range(5)] == [
        ("0",), ("1",), ("2",), (OTHER,), (OTHER,),
    ]  # fmt: skip
    assert limit.values(REFUSALS, {"code": "1"}) == ("1",)
    assert limit.values(QUEUED, {"model": "a"}) == ("a",)  # another metric has its own


def test_order_of_labels_does_not_matter() -> None:
    limit = SeriesLimit()
    one = limit.values(REQUESTS, {"status": "200", "model": "a", "route": "predict"})
    assert one == limit.values(REQUESTS, {"model": "a", "route": "predict", "status": "200"}) == ("a", "predict", "200")


def test_a_null_meter_takes_everything() -> None:
    meter: Meter = NullMeter()
    meter.add(REQUESTS, model="a", route="predict", status="200")
    meter.observe(QUEUE, 1.0, model="a")
    meter.set(QUEUED, 1.0, model="a")
