"""Laws of a release's gates: what is allowed passes to the last image, a class is lost only where that is real."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from eagleray.assure import report as blocks
from eagleray.assure.comparison import Comparison, Contestant, compare
from eagleray.assure.release_report import About, release_report
from eagleray.assure.release_table import Gate, Limits, StepRow, judge
from eagleray.pages.page import render
from eagleray.vision.bootstrap import Estimate, Resampling
from eagleray.vision.metrics import Answers

IDS = ("a", "b", "c", "d")


def found_of(num_lost: int, n: int = 200, *, lost_class: int | None = None, resamples: int = 200) -> Comparison:
    """A parent that is always right, and a step that is wrong on so many images, of one class or of all in turn."""
    targets = np.arange(n) % 4
    own = np.flatnonzero(targets == lost_class) if lost_class is not None else np.arange(n)
    said = targets.copy()
    said[own[:num_lost]] = (said[own[:num_lost]] + 1) % 4
    sides = [Answers(np.eye(4, dtype=np.float32)[answers], targets) for answers in (targets, said)]
    first, second = (Contestant(name, IDS, side) for name, side in zip(("parent", "this"), sides, strict=True))
    return compare(first, second, Resampling(n, resamples))


def test_the_drop_may_be_what_is_allowed_and_not_an_image_more() -> None:
    for lost, is_passed in ((0, True), (1, True), (2, False)):  # 1 of 200 images is half a point
        accuracy, _ = judge(found_of(lost), Limits(max_drop_points=0.5, max_class_drop_points=100))
        assert accuracy.is_passed is is_passed
    assert "a drop of 1.00 points" in judge(found_of(2), Limits())[0].seen


def test_the_far_end_of_the_interval_asks_for_more_than_the_estimate() -> None:
    found = found_of(1)
    assert judge(found, Limits(0.5))[0].is_passed
    assert not judge(found, Limits(0.5, gate_on="bound"))[0].is_passed
    assert judge(found, Limits(3.0, gate_on="bound"))[0].is_passed
    assert not judge(found_of(0, resamples=0), Limits(100, gate_on="bound"))[0].is_passed  # nothing is shown


def test_a_class_is_lost_where_its_loss_is_over_the_limit_and_real() -> None:
    lost = judge(found_of(10, lost_class=2), Limits(100, 5.0))[1]
    assert not lost.is_passed
    assert lost.seen == "c loses 20.0"
    assert judge(found_of(10, lost_class=2), Limits(100, 20.0))[1].is_passed
    one = judge(found_of(1, n=40, lost_class=2), Limits(100, 5.0))[1]  # one image of ten: 10 points, and chance
    assert one.is_passed


def row(name: str = "parent", **more: Any) -> StepRow:
    given = {
        "name": name, "what": "w", "model_digest": "d", "architecture": "a", "precision": "fp32", "engine": "onnx",
        "accuracy": Estimate(0.9, 0.85, 0.95), "model_bytes": 18_000_000, "parameters": 4_000_000, "macs": 385_000_000,
        "latency_ms_p50": 12.5, "latency_ms_p95": 14.0, "images_per_s": 80.0, "best_batch": 8, "core_s_per_image": 0.01,
    }  # fmt: skip
    return StepRow(**{**given, **more})


def test_a_row_goes_to_json_and_back() -> None:
    full = row(
        "int8", change=Estimate(-0.01, -0.02, 0.0), agreement=Estimate(0.98, 0.97, 0.99), speedup=1.7,
        recalls={"a": Estimate(-0.1, -0.2, 0.0)}, gates=(Gate("accuracy", True, "s", "a"),), notes=("n",), seconds=3.0,
    )  # fmt: skip
    for each in (row(), full):
        assert StepRow.from_json(json.loads(json.dumps(each.to_json(), allow_nan=False))) == each


@pytest.mark.parametrize("is_passed", [True, False])
def test_the_page_draws_every_step_and_says_what_stopped(is_passed: bool) -> None:
    gates = (Gate("accuracy", is_passed, "a drop of 3.00 points", "at most 0.5"),)
    recalls = {"a": Estimate(-0.2, -0.3, -0.1), "b": Estimate(0.0, 0.0, 0.0)}
    more = {"change": Estimate(-0.03, -0.05, -0.01), "agreement": Estimate(0.95), "speedup": 1.75, "recalls": recalls}
    rows = [row(), row("int8", gates=gates, latency_ms_p50=7.0, model_bytes=6_000_000, macs=None, **more)]
    report = release_report(rows, About("Release of x", "2026-01-31T12:00:00Z", notes=("dropped",), labels={"a": "A!"}))
    assert blocks.Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    assert report.verdict is not None
    assert report.verdict.is_good is is_passed
    html = render(report)
    assert ("nothing is published" in html) is not is_passed
    assert ("1.75 times as fast, 3.0 times as small" in html) is is_passed
    assert html.count('<circle class="point') >= 2
    assert "A!" in html
    assert "dropped" in html
