"""Laws of an evaluation: its document is as the issue says and JSON, its Report shows what was found and only that."""

from __future__ import annotations

import json

import numpy as np
import pytest
from eagleray.assure import report as blocks
from eagleray.assure.evaluation import Evaluation, evaluate
from eagleray.assure.evaluation_report import MEANINGS, NAMES, About, evaluation_report
from eagleray.assure.report import Report
from eagleray.pages.page import render
from eagleray.vision.bootstrap import Resampling
from eagleray.vision.metrics import MULTI_ONLY, SCALARS, Answers
from eagleray.vision.prediction import Label


def found_of(classes: int = 4, n: int = 90, *, is_multi: bool = False, resamples: int = 40) -> Evaluation:
    rng = np.random.default_rng(classes)
    if is_multi:
        targets = rng.random((n, classes)) < 0.4
        p = 1 / (1 + np.exp(-(rng.normal(size=(n, classes)) + 2 * targets - 1)))
    else:
        targets = rng.integers(0, max(1, classes - 1), n)  # the last class does not occur
        logits = rng.normal(size=(n, classes)) + 2 * (targets[:, None] == np.arange(classes))
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = [Label(f"id{c}", f"name {c}") for c in range(classes)]
    return evaluate(Answers(p.astype(np.float32), targets), labels, Resampling(n, resamples))


def about(found: Evaluation, **more: object) -> About:
    n = found.num_images
    uris, truths = [f"file:///{at}.jpg" for at in range(n)], [["name 0"]] * n
    return About("t", "2026-01-31T12:00:00Z", uris=uris, truths=truths, **more)  # type: ignore[arg-type]


def of_kind(report: Report, kind: type) -> list[blocks.Block]:
    return [block for block in report.blocks if isinstance(block, kind)]


@pytest.mark.parametrize("is_multi", [False, True])
def test_the_document_is_as_the_issue_says(is_multi: bool) -> None:
    found = found_of(is_multi=is_multi)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    for name in ("top1", "top5", "balanced_accuracy", "f1_macro", "roc_auc", "ece"):
        assert set(document[name]) == {"value", "low", "high"}
        assert 0 <= document[name]["low"] <= document[name]["high"] <= 1
    assert {*SCALARS, *(MULTI_ONLY if is_multi else ())} <= set(document)
    assert document["n"] == 90
    assert document["task"] == ("multi_label" if is_multi else "single_label")
    head = document["per_class"]["id0"]
    assert set(head) == {*("name", "support", "answered", "precision", "recall", "f1", "average_precision", "roc_auc")}
    assert sum(row["support"] for row in document["per_class"].values()) == int(found.metrics.support.sum())
    assert sum(row[2] for row in document["confusions"]) == (0 if is_multi else 90)
    assert sum(row["count"] for row in document["reliability"]) == (90 * 4 if is_multi else 90)
    assert document["interval"]["units"] == 90


def test_the_same_answers_give_the_same_document() -> None:
    assert found_of().to_json() == found_of().to_json()


def test_every_figure_has_a_name_and_a_meaning() -> None:
    assert set(NAMES) == set(MEANINGS) == {*SCALARS, *MULTI_ONLY}


@pytest.mark.parametrize("is_multi", [False, True])
def test_the_report_shows_the_figures_and_goes_to_json(is_multi: bool) -> None:
    found = found_of(is_multi=is_multi)
    report = evaluation_report(found, about(found, warnings=["a leak"], facts={"Corpus": "c"}, command="eagleray"))
    assert Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    lead = found.metrics.scalars["map" if is_multi else "top1"]
    assert report.verdict is not None
    assert lead.text in report.verdict.text
    html = render(report)
    for name, figure in found.metrics.scalars.items():
        assert NAMES[name] in html
        assert f"{figure.value:.3f}" in html
    assert "a leak" in html
    assert len(of_kind(report, blocks.Heatmap)) == (0 if is_multi else 1)


def test_the_confusion_of_a_few_classes_adds_up_and_of_many_is_a_list() -> None:
    (heatmap,) = of_kind(evaluation_report(found := found_of(5), about(found)), blocks.Heatmap)
    assert isinstance(heatmap, blocks.Heatmap)
    assert sum(map(sum, heatmap.counts)) == found.num_images
    for name, row in zip(heatmap.rows, heatmap.counts, strict=True):
        index = [label.name for label in found.labels].index(name)
        assert sum(row) == found.metrics.support[index]
    many = found_of(60, 200)
    report = evaluation_report(many, about(many))
    assert not of_kind(report, blocks.Heatmap)
    assert "Most frequent confusions" in {getattr(block, "title", "") for block in report.blocks}


def test_the_sheet_shows_the_surest_mistakes_and_no_right_answer() -> None:
    found = found_of()
    (sheet,) = of_kind(evaluation_report(found, about(found)), blocks.Sheet)
    assert isinstance(sheet, blocks.Sheet)
    assert len(sheet.tiles) == min(24, found.num_images - round((found.metrics.scalars["top1"].value or 0) * 90))
    tags = [float(tile.tag) for tile in sheet.tiles]
    assert tags == sorted(tags, reverse=True)


def test_no_sheet_and_no_confusion_list_of_a_perfect_model() -> None:
    p = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    found = evaluate(Answers(p, np.array([0, 1, 2, 0])), [Label(c, c) for c in "abc"], Resampling(4, 20))
    report = evaluation_report(found, about(found))
    assert not of_kind(report, blocks.Sheet)
    assert found.metrics.scalars["top1"].text == "1.000 (1.000 to 1.000)"
    assert found.metrics.scalars["ece"].value == 0


def test_one_image_of_one_class_is_evaluated_without_intervals() -> None:
    found = evaluate(Answers(np.ones((1, 1), np.float32), np.array([0])), [Label("a", "a")], Resampling(1))
    document = found.to_json()
    assert document["top1"] == {"value": 1.0, "low": None, "high": None}
    assert document["roc_auc"] == {"value": None, "low": None, "high": None}
    assert render(evaluation_report(found, about(found)))


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        evaluate(Answers(np.ones((1, 2), np.float32), np.array([0])), [Label("a", "a")], Resampling(1))
