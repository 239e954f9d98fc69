"""Laws of slices: they part the whole, each is the evaluation of its own images, small ones are never judged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from eagleray.assure import report as blocks
from eagleray.assure.slices import slice_by
from eagleray.assure.slices_report import slices_blocks
from eagleray.core.errors import ConfigError
from eagleray.pages.page import render
from eagleray.vision import metrics
from eagleray.vision.bootstrap import Estimate, Resampling
from eagleray.vision.metrics import Answers


def answers_of(n: int = 240, classes: int = 4, *, is_multi: bool = False) -> Answers:
    rng = np.random.default_rng(5)
    if is_multi:
        targets = rng.random((n, classes)) < 0.4
        p = 1 / (1 + np.exp(-(rng.normal(size=(n, classes)) + 2 * targets - 1)))
    else:
        targets = rng.integers(0, classes, n)
        logits = rng.normal(size=(n, classes)) + 2 * (targets[:, None] == np.arange(classes))
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Answers(p.astype(np.float32), targets)


def sites(n: int = 240) -> list[str]:
    return [("north", "south", "", "east")[min(3, at * 7 % 11 // 3)] for at in range(n)]


@pytest.mark.parametrize("is_multi", [False, True])
def test_slices_part_the_whole(is_multi: bool) -> None:
    answers = answers_of(is_multi=is_multi)
    slicing = slice_by("site", sites(), answers, Resampling(240, 30))
    assert {part.value for part in slicing.slices} == {"north", "south", "", "east"}
    assert sum(part.num_images for part in slicing.slices) == 240
    for name in ("top1", "top5"):
        whole = metrics.measure(answers, Resampling(240, 0)).scalars[name].value
        parts = sum(part.num_images * (part.metrics[name].value or 0) for part in slicing.slices) / 240
        assert parts == pytest.approx(whole)


def test_a_slice_is_the_evaluation_of_its_own_images() -> None:
    answers, values = answers_of(), np.array(sites())
    groups = np.arange(240) // 3
    way = Resampling(240, 50, groups=groups)
    for part in slice_by("site", values.tolist(), answers, way).slices:
        mask = values == part.value
        own = np.unique(groups[mask], return_inverse=True)[1]
        alone = metrics.measure(answers.subset(mask), Resampling(int(mask.sum()), 50, groups=own))
        assert part.metrics == alone.scalars
        assert part.units == len(set(groups[mask]))


def test_the_gap_is_that_of_a_loop_over_resamples() -> None:
    answers, values = answers_of(), np.array(sites())
    way = Resampling(240, 40)
    slicing = slice_by("site", values.tolist(), answers, way)
    assert slicing.level == pytest.approx(1 - 0.05 / 4)
    right = answers.right.astype(float)
    for part in slicing.slices:
        mask = values == part.value
        drawn = []
        for weights in way.weights(1):
            w = weights[:, 0]
            drawn.append((right * w)[mask].sum() / w[mask].sum() - (right * w)[~mask].sum() / w[~mask].sum())
        low, high = np.quantile(drawn, [(1 - slicing.level) / 2, (1 + slicing.level) / 2])
        assert part.gap.value == pytest.approx(right[mask].mean() - right[~mask].mean())
        assert (part.gap.low, part.gap.high) == pytest.approx((low, high))


def test_a_small_slice_is_marked_and_never_judged_and_a_bad_one_is_found() -> None:
    answers = answers_of()
    wrong = np.argsort(answers.right, kind="stable")  # the wrong ones first
    values = np.full(240, "good", object)
    values[wrong[:40]] = "bad"
    values[wrong[40:45]] = "tiny and bad"
    assert not answers.right[wrong[:45]].any()
    by_name = {part.value: part for part in slice_by("site", values.tolist(), answers, Resampling(240, 200)).slices}
    assert by_name["bad"].is_lower
    assert not by_name["good"].is_lower
    assert by_name["tiny and bad"].is_small
    assert not by_name["tiny and bad"].is_lower
    by_group = slice_by("site", values.tolist(), answers, Resampling(240, 20, groups=np.arange(240) // 20))
    assert all(part.is_small for part in by_group.slices)  # 12 groups in all: no 30 independent ones


def test_one_value_has_no_rest_to_differ_from() -> None:
    (part,) = slice_by("site", ["a"] * 240, answers_of(), Resampling(240, 20)).slices
    assert part.gap == Estimate(None)
    assert not part.is_lower


def test_a_column_of_single_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="240 values on 240 images"):
        slice_by("file_name", [str(at) for at in range(240)], answers_of(), Resampling(240, 20))


def test_the_page_draws_every_slice_and_says_which_are_small() -> None:
    answers = answers_of()
    slicing = slice_by("<site>", ["b" if at < 7 else "a" for at in range(240)], answers, Resampling(240, 20))
    whole = metrics.measure(answers, Resampling(240, 20)).scalars["top1"]
    forest, table = slices_blocks([slicing], "top1", whole)
    assert isinstance(forest, blocks.Intervals)
    assert isinstance(table, blocks.Table)
    assert [row.is_weak for row in forest.intervals] == [False, True]
    assert [row[-1] for row in table.rows] == ["", "too few to judge"]
    report = blocks.Report("t", "2026-01-31T12:00:00Z", (forest, table))
    assert blocks.Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    html = render(report)
    assert "&lt;site&gt;" in html
    assert html.count('class="whisker"') == 2
    bare = replace(forest, intervals=(blocks.Interval("no bounds", 0.5),), reference=None)
    assert 'class="whisker"' not in render(replace(report, blocks=(bare,)))
