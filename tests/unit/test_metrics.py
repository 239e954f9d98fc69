"""Laws of the metrics: equal to scikit-learn and torchmetrics, also on resamples, for one label and for several."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from eagleray.vision import metrics
from eagleray.vision.bootstrap import Estimate, Resampling, estimate
from eagleray.vision.metrics import MULTI_ONLY, PER_CLASS, SCALARS, Answers, Statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle


def single(seed: int, n: int = 120, classes: int = 6, *, levels: int = 0) -> Answers:
    """Answers that are right more often than not; ``levels`` > 0 makes ties."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * (targets[:, None] == np.arange(classes))
    if levels:
        logits = np.round(logits * levels / 4)
    p = np.exp(logits)
    return Answers((p / p.sum(1, keepdims=True)).astype(np.float32), targets)


def multi(seed: int, n: int = 120, classes: int = 5) -> Answers:
    rng = np.random.default_rng(seed)
    targets = rng.random((n, classes)) < 0.3
    p = 1 / (1 + np.exp(-(rng.normal(size=(n, classes)) + 2 * targets - 1)))
    return Answers(p.astype(np.float32), targets)


def values(answers: Answers) -> dict[str, Any]:
    found = Statistics(answers)(np.ones((len(answers.probabilities), 1), np.float32))
    return {name: array[..., 0] for name, array in found.items()}


@pytest.mark.parametrize("levels", [0, 2])
def test_single_label_figures_are_scikit_learns(levels: int) -> None:
    answers = single(1, levels=levels)
    y, p, said = answers.targets, answers.probabilities, answers.probabilities.argmax(1)
    found = values(answers)
    assert found["top1"] == oracle.accuracy_score(y, said)
    assert found["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(y, said))
    for average in ("macro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(oracle.f1_score(y, said, average=average))
    precision, recall, f1, support = oracle.precision_recall_fscore_support(y, said, zero_division=0)
    np.testing.assert_allclose(found["class_precision"], precision)
    np.testing.assert_allclose(found["class_recall"], recall)
    np.testing.assert_allclose(found["class_f1"], f1)
    assert found["precision_macro"] == pytest.approx(precision.mean())
    assert found["recall_macro"] == pytest.approx(recall.mean())
    is_class = y[:, None] == np.arange(p.shape[1])
    auc = [oracle.roc_auc_score(is_class[:, c], p[:, c]) for c in range(p.shape[1])]
    ap = [oracle.average_precision_score(is_class[:, c], p[:, c]) for c in range(p.shape[1])]
    np.testing.assert_allclose(found["class_roc_auc"], auc)
    np.testing.assert_allclose(found["class_average_precision"], ap)
    assert found["roc_auc"] == pytest.approx(np.mean(auc))
    assert found["map"] == pytest.approx(np.mean(ap))
    np.testing.assert_array_equal(metrics.measure(answers, Resampling(len(y), 0)).support, support)
    np.testing.assert_array_equal(metrics.confusion(answers).toarray(), oracle.confusion_matrix(y, said))


def test_top_k_is_scikit_learns_without_ties_and_takes_the_lower_index_with_them() -> None:
    answers = single(2, classes=9)
    found = oracle.top_k_accuracy_score(answers.targets, answers.probabilities, k=5, labels=np.arange(9))
    assert values(answers)["top5"] == found
    tied = Answers(np.full((4, 8), 0.125, np.float32), np.array([0, 4, 5, 7]))
    assert values(tied)["top1"] == 0.25
    assert values(tied)["top5"] == 0.5


def test_roc_auc_is_scikit_learns_one_versus_rest() -> None:
    answers = single(3)
    p = answers.probabilities.astype(np.float64)
    found = oracle.roc_auc_score(answers.targets, p / p.sum(1, keepdims=True), multi_class="ovr")
    assert values(answers)["roc_auc"] == pytest.approx(found)


def test_multi_label_figures_are_scikit_learns() -> None:
    answers = multi(4)
    y, p = answers.targets, answers.probabilities
    said, found = p >= 0.5, values(answers)
    for average in ("macro", "micro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(oracle.f1_score(y, said, average=average))
    assert found["exact_match"] == oracle.accuracy_score(y, said)
    assert found["map"] == pytest.approx(oracle.average_precision_score(y, p, average="macro"))
    assert found["roc_auc"] == pytest.approx(oracle.roc_auc_score(y, p, average="macro"))
    balanced = [oracle.balanced_accuracy_score(y[:, c], said[:, c]) for c in range(y.shape[1])]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(balanced))
    first = [bool(row[order[0]]) for row, order in zip(y, np.argsort(-p, axis=1), strict=True)]
    assert found["top1"] == np.mean(first)
    assert found["top5"] == y.any(axis=1).mean()  # there are five classes


def test_figures_are_torchmetrics() -> None:
    """A second oracle, above all for the calibration error, which scikit-learn lacks."""
    from eagleray.vision.torchvision_guard import ensure_importable

    ensure_importable()
    import torch
    from torchmetrics import classification as tm

    answers, several = single(5, n=400), multi(6, n=400)
    p, y = torch.from_numpy(answers.probabilities), torch.from_numpy(answers.targets)
    found, num = values(answers), answers.num_classes
    tolerance = 1e-5  # torchmetrics sums in float32
    assert found["ece"] == pytest.approx(float(tm.MulticlassCalibrationError(num, n_bins=15)(p, y)), abs=tolerance)
    assert found["top1"] == pytest.approx(float(tm.MulticlassAccuracy(num, average="micro")(p, y)), abs=tolerance)
    assert found["f1_macro"] == pytest.approx(float(tm.MulticlassF1Score(num)(p, y)), abs=tolerance)
    assert found["map"] == pytest.approx(float(tm.MulticlassAveragePrecision(num)(p, y)), abs=tolerance)
    assert found["roc_auc"] == pytest.approx(float(tm.MulticlassAUROC(num)(p, y)), abs=tolerance)
    p, y = torch.from_numpy(several.probabilities), torch.from_numpy(several.targets).int()
    found, num = values(several), several.num_classes
    assert found["map"] == pytest.approx(float(tm.MultilabelAveragePrecision(num)(p, y)), abs=tolerance)
    assert found["roc_auc"] == pytest.approx(float(tm.MultilabelAUROC(num)(p, y)), abs=tolerance)
    assert found["exact_match"] == pytest.approx(float(tm.MultilabelExactMatch(num)(p, y)), abs=tolerance)
    wanted = float(tm.BinaryCalibrationError(n_bins=15)(p.ravel(), y.ravel()))
    # the binary form of torchmetrics has the probability of label 1 as confidence, as ours over (image, class) pairs
    assert found["ece"] == pytest.approx(wanted, abs=tolerance)


def test_reliability_adds_up_to_the_calibration_error() -> None:
    for answers in (single(7), multi(8)):
        r = metrics.reliability(answers)
        gaps = np.nan_to_num(np.abs(r.confidence - r.accuracy)) * r.counts
        assert gaps.sum() / r.counts.sum() == pytest.approx(values(answers)["ece"])
    confident = Answers(np.array([[1.0, 0.0], [0.75, 0.25], [0.0, 1.0]], np.float32), np.array([0, 0, 0]))
    assert metrics.reliability(confident, bins=4).counts.tolist() == [0, 0, 1, 2]  # a bin holds its upper edge


@pytest.mark.parametrize("kind", ["single", "ties", "multi"])
def test_a_weighted_figure_is_that_of_the_images_repeated(kind: str) -> None:
    """The slow oracle of every interval: the score matrix of the resample itself."""
    answers = {"single": lambda: single(9), "ties": lambda: single(9, levels=2), "multi": lambda: multi(9)}[kind]()
    resampling = Resampling(len(answers.probabilities), resamples=7, seed=3)
    weights = next(resampling.weights(7))
    assert weights.sum(axis=0).tolist() == [120] * 7
    fast = Statistics(answers)(weights)
    for draw in range(7):
        at = np.repeat(np.arange(120), weights[:, draw].astype(int))
        slow = values(Answers(answers.probabilities[at], answers.targets[at]))
        assert slow.keys() == fast.keys()
        for name, value in slow.items():
            np.testing.assert_allclose(fast[name][..., draw], value, rtol=1e-9, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_answers_have_the_oracles_figures(data: st.DataObject) -> None:
    n, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    scores = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), min_size=classes, max_size=classes)
    p = np.array(data.draw(st.lists(scores, min_size=n, max_size=n)), np.float32)
    y = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    found = values(Answers(p, y))
    assert found["top1"] == pytest.approx(oracle.accuracy_score(y, p.argmax(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of classes that do not occur
        present = np.unique(y)
        wanted = oracle.f1_score(y, p.argmax(1), labels=present, average="macro", zero_division=0)
        assert found["f1_macro"] == pytest.approx(wanted)
        for c in range(classes):
            is_class = y == c
            if is_class.any():
                ap = oracle.average_precision_score(is_class, p[:, c])
                assert found["class_average_precision"][c] == pytest.approx(ap)
            else:
                assert np.isnan(found["class_average_precision"][c])
            if is_class.any() and not is_class.all():
                assert found["class_roc_auc"][c] == pytest.approx(oracle.roc_auc_score(is_class, p[:, c]))
            else:
                assert np.isnan(found["class_roc_auc"][c])


def test_every_scalar_and_every_class_has_an_interval_that_holds_the_value() -> None:
    for answers in (single(10), multi(10)):
        found = metrics.measure(answers, Resampling(120, 300, seed=1))
        names = {*SCALARS, *(MULTI_ONLY if answers.is_multi_label else ())}
        assert found.scalars.keys() == names
        assert set(found.per_class) == set(PER_CLASS)
        for name, figure in found.scalars.items():
            assert figure.value is not None
            assert figure.low is not None
            assert figure.high is not None
            assert figure.low <= figure.high
            # resampling adds to a calibration error (the bins of a resample are noisier), so its value may lie below
            if name != "ece":
                assert figure.low <= figure.value <= figure.high, name
        assert {len(column) for column in found.per_class.values()} == {answers.num_classes}


def test_what_is_undefined_is_none_and_not_a_number() -> None:
    answers = Answers(np.array([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1]], np.float32), np.array([0, 0]))
    found = metrics.measure(answers, Resampling(2, 50))
    assert found.scalars["roc_auc"] == Estimate(None)
    assert found.scalars["top1"].value == 1.0
    assert found.per_class["recall"][1] == Estimate(None)
    assert found.per_class["average_precision"][0].value == 1.0


def test_the_mistakes_are_the_surest_and_wrong() -> None:
    answers = Answers(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.01, 0.99]], np.float32), np.array([0, 1, 0, 1]))
    assert [(image, label) for image, label, _ in metrics.surest_mistakes(answers, 9)] == [(2, 1), (1, 0)]
    several = Answers(np.array([[0.9, 0.1], [0.6, 0.02]], np.float32), np.array([[True, False], [False, True]]))
    ((image, label, probability),) = metrics.surest_mistakes(several, 1)
    assert (image, label, round(probability, 3)) == (1, 1, 0.02)


def test_the_envelope_is_the_highest_precision_at_a_recall_or_more() -> None:
    grid = np.linspace(0, 1, 11)
    for answers in (single(11, levels=2), multi(11)):
        for label in range(answers.num_classes):
            recall, precision = metrics.pr_curve(answers, label)
            recall, precision = recall[1:], precision[1:]  # scikit-learn's own start, (0, 1), is no threshold
            slow = [precision[recall >= at - 1e-9].max() for at in grid]
            np.testing.assert_allclose(metrics.envelope(answers, label, grid), slow)


def test_answers_that_do_not_fit_are_refused() -> None:
    p = np.zeros((3, 2), np.float32)
    for targets in (np.zeros(2, int), np.array([0, 1, 2]), np.array([0, -1, 1]), np.zeros((3, 3), bool)):
        with pytest.raises(ValueError, match="targets"):
            Answers(p, targets)


def test_resamples_are_the_same_for_every_chunk_and_differ_by_seed() -> None:
    whole = np.concatenate(list(Resampling(30, 20, seed=5).weights(20)), axis=1)
    parts = np.concatenate(list(Resampling(30, 20, seed=5).weights(3)), axis=1)
    np.testing.assert_array_equal(whole, parts)
    assert (whole != np.concatenate(list(Resampling(30, 20, seed=6).weights(20)), axis=1)).any()


def test_groups_are_drawn_as_a_whole_and_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 30)
    correct = (rng.random(20) < 0.7)[groups].astype(float)  # shots of one object stand or fall together
    by_group = Resampling(600, 500, groups=groups)
    weights = next(by_group.weights(10))
    for group in range(20):
        assert (weights[groups == group] == weights[groups == group][0]).all()
    assert by_group.units == 20

    def accuracy(w: Any) -> dict[str, Any]:
        return {"top1": correct @ w / w.sum(axis=0)}

    wide, narrow = (estimate(accuracy, r)["top1"] for r in (by_group, Resampling(600, 500)))
    assert isinstance(wide, Estimate)
    assert isinstance(narrow, Estimate)
    assert wide.value == narrow.value
    assert wide.low is not None
    assert wide.high is not None
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)  # sqrt(30) = 5.5 in the mean


def test_an_interval_has_the_coverage_it_states() -> None:
    """Of 200 samples of a known accuracy about 190 intervals hold it; 4 standard errors of that count are 12."""
    rng, held = np.random.default_rng(1), 0
    for seed in range(200):
        correct = (rng.random(150) < 0.8).astype(float)
        figure = estimate(lambda w, c=correct: {"x": c @ w / w.sum(axis=0)}, Resampling(150, 300, seed=seed))["x"]
        assert isinstance(figure, Estimate)
        assert figure.low is not None
        assert figure.high is not None
        held += figure.low <= 0.8 <= figure.high
    assert 176 <= held <= 200


def test_one_group_or_no_resample_gives_no_interval() -> None:
    answers = single(12, n=30)
    for resampling in (Resampling(30, 0), Resampling(30, 50, groups=np.zeros(30, np.int64))):
        figure = metrics.measure(answers, resampling).scalars["top1"]
        assert figure.value is not None
        assert (figure.low, figure.high) == (None, None)
