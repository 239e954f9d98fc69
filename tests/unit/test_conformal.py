"""Prediction sets against mapie, and their coverage; temperature scaling; costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from eagleray.assure.calibration import calibration_error, fit_temperature, negative_log_likelihood
from eagleray.assure.conformal import Method, conformal_level, images_needed, prediction_sets
from eagleray.assure.decision_metrics import Sample
from eagleray.assure.utility import CostRule, cheapest, cost_matrix
from eagleray.core.errors import ConfigError
from eagleray.vision.prediction import temper


def draw(count: int, seed: int, *, sharpness: float = 1.0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities float32 (n, C) and labels (n,) drawn from them; ``sharpness`` makes the model too sure."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, (count, classes))
    honest = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = (generator.random((count, 1)) > honest.cumsum(axis=1)).sum(axis=1).clip(max=classes - 1)
    scaled = np.exp(sharpness * logits)
    return (scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32), targets


def as_sample(probabilities: np.ndarray, targets: np.ndarray) -> Sample:
    return Sample(probabilities, np.eye(probabilities.shape[1], dtype=bool)[targets])


@pytest.mark.parametrize("method", ["lac", "aps"])
@pytest.mark.parametrize("error_rate", [0.05, 0.2])
def test_sets_are_mapies(method: Method, error_rate: float) -> None:
    mapie = pytest.importorskip("mapie.classification", reason="the oracle: pip install mapie")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Stored(ClassifierMixin, BaseEstimator):
        """Features are the probabilities."""

        classes_ = np.arange(4)

        def fit(self, x: Any, y: Any) -> Stored:
            return self

        def predict_proba(self, x: Any) -> Any:
            return x

        def predict(self, x: Any) -> Any:
            return x.argmax(axis=1)

        def __sklearn_is_fitted__(self) -> bool:
            return True

    (first, targets), (second, _) = draw(300, 1), draw(400, 2)
    first, second = (p.astype(np.float64) / p.sum(axis=1, keepdims=True, dtype=np.float64) for p in (first, second))
    oracle = mapie.SplitConformalClassifier(
        Stored(), confidence_level=1 - error_rate, conformity_score=method, prefit=True
    ).conformalize(first, targets)
    score = oracle._mapie_classifier.conformity_score_function_
    expected = oracle.predict_set(second, conformity_score_params={"include_last_label": True})[1][:, :, 0]
    level = conformal_level(first, targets, error_rate=error_rate, method=method)
    if (
        method == "aps"
    ):  # mapie randomizes the level alone, not the sets: its scores without that, then its sets at its level
        sums = score.get_true_label_cumsum_proba(targets, first, np.arange(4))[0].ravel()
        assert level == pytest.approx(np.quantile(sums, (1 - error_rate) * 301 / 300, method="higher"))
        level = float(score.quantiles_[0])
    else:
        assert level == pytest.approx(float(score.quantiles_[0]))
    found = prediction_sets(second, level, method=method)
    assert (found == expected).mean() > 0.999  # a label whose score equals the level may fall either way by rounding


@pytest.mark.parametrize("method", ["lac", "aps"])
def test_the_truth_is_in_the_set_as_often_as_promised_whatever_the_model(method: Method) -> None:
    """Mean coverage over 300 calibrations of 100 images; its standard error is below 0.004."""
    covered = []
    for seed in range(300):
        (first, targets), (second, truth) = draw(100, 2 * seed, sharpness=3), draw(100, 2 * seed + 1, sharpness=3)
        level = conformal_level(first, targets, error_rate=0.1, method=method)
        covered.append(prediction_sets(second, level, method=method)[np.arange(100), truth].mean())
    assert np.mean(covered) >= 0.9 - 3 * 0.004
    if method == "lac":  # without ties no more than it needs; aps's sets are not randomised and may hold more
        assert np.mean(covered) <= 0.9 + 1 / 101 + 3 * 0.004


def test_too_few_images_give_sets_of_every_label() -> None:
    probabilities, targets = draw(18, 3)
    assert conformal_level(probabilities, targets, error_rate=0.05) == math.inf
    assert prediction_sets(probabilities, math.inf).all()
    assert images_needed(0.05) == 19
    assert conformal_level(*draw(19, 3), error_rate=0.05) < math.inf


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_the_temperature_undoes_what_made_a_model_too_sure(sharpness: float) -> None:
    sample = as_sample(*draw(6000, 5, sharpness=sharpness))
    found = fit_temperature(sample, "softmax")
    assert found == pytest.approx(sharpness, rel=0.06)  # 2 standard errors of 6,000 images
    losses = [negative_log_likelihood(sample, found * factor, "softmax") for factor in (0.9, 1.0, 1.1)]
    assert losses[1] < min(losses[0], losses[2])
    after = calibration_error(sample, found, "softmax", is_multi_label=False)
    assert after <= calibration_error(sample, 1.0, "softmax", is_multi_label=False) + 0.005
    assert after < 0.02


def test_a_temperature_of_labels_that_stand_for_themselves() -> None:
    generator = np.random.default_rng(2)
    logits = generator.normal(0, 1, (4000, 3))
    truth = generator.random((4000, 3)) < 1 / (1 + np.exp(-logits))
    sample = Sample((1 / (1 + np.exp(-2 * logits))).astype(np.float32), truth)
    assert fit_temperature(sample, "sigmoid") == pytest.approx(2.0, rel=0.08)


def test_tempered_probabilities_are_those_of_divided_logits() -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 4, (50, 7))

    def softmax(z: np.ndarray) -> np.ndarray:
        shifted = np.exp(z - z.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    for temperature in (0.3, 1.7, 10.0):
        found = temper(softmax(logits).astype(np.float32), temperature)
        np.testing.assert_allclose(found, softmax(logits / temperature), atol=3e-6)  # float32 in, float32 out
        several = temper((1 / (1 + np.exp(-logits))).astype(np.float32), temperature, "sigmoid")
        # Near 1 a float32 knows the rest, 1 - p, only to a few digits: a logit of 13 to 3 %
        np.testing.assert_allclose(several, 1 / (1 + np.exp(-logits / temperature)), atol=1e-3)
    extreme = temper(np.float32([[1, 0, 0], [0, 0, 0]]), 0.05)
    assert np.isfinite(extreme).all()
    assert extreme[0].tolist() == [1, 0, 0]
    same = np.float32([[0.25, 0.75]])
    assert temper(same, 1.0) is same


def test_costs_are_looked_up_and_the_kindest_truth_counts() -> None:
    costs = cost_matrix(CostRule(abstain=0.5, pairs={"a": {"b": 10, "abstain": 2}}), ("a", "b", "c"))
    truth = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], bool)
    assert costs.losses(np.array([0, 1, -1, 0, -1, 1]), truth).tolist() == [0, 10, 2, 1, 0.5, 1]
    assert costs.most == 10


@pytest.mark.parametrize("pairs", [{"a": {"x": 1.0}}, {"x": {"a": 1.0}}, {"a": {"b": -1.0}}])
def test_a_cost_of_what_is_not_there_is_refused(pairs: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ConfigError, match=r"costs\.pairs\."):
        cost_matrix(CostRule(pairs=pairs), ("a", "b"))


def test_the_search_ends_where_no_single_threshold_helps() -> None:
    rows = [np.linspace(0, 1, 11)] * 2

    def cost(at: np.ndarray) -> float:
        return float((at[0] - 0.3) ** 2 + (at[1] - 0.8) ** 2 + 0.1 * abs(at[0] - at[1]))

    found, least = cheapest(cost, rows)
    assert least == min(cost(np.array([a, b])) for a in rows[0] for b in rows[1])
    assert cost(found) == least
