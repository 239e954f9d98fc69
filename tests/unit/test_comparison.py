"""Laws of a comparison: paired resamples as a loop draws them, McNemar as scipy has it, real only where both say so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from eagleray.assure import report as blocks
from eagleray.assure.comparison import Comparison, Contestant, compare, mcnemar
from eagleray.assure.comparison_report import comparison_blocks
from eagleray.pages.page import render
from eagleray.vision.bootstrap import Resampling
from eagleray.vision.metrics import Answers, Statistics
from scipy.stats import binomtest

IDS = ("a", "b", "c", "d")


def answers_of(targets: np.ndarray, strength: float, seed: int) -> Answers:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(targets), 4)) + strength * (targets[:, None] == np.arange(4))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Answers(p.astype(np.float32), targets)


def found_of(strengths: tuple[float, float], n: int = 200, resamples: int = 60, **more: object) -> Comparison:
    targets = np.random.default_rng(1).integers(0, 4, n)
    first, second = (answers_of(targets, strength, seed) for seed, strength in enumerate(strengths))
    way = Resampling(n, resamples, **more)  # type: ignore[arg-type]
    return compare(Contestant("B", IDS, first), Contestant("B2", IDS, second), way)


@pytest.mark.parametrize("groups", [None, np.arange(200) // 4])
def test_the_interval_is_that_of_a_loop_over_the_same_resamples(groups: np.ndarray | None) -> None:
    targets = np.random.default_rng(1).integers(0, 4, 200)
    first, second = answers_of(targets, 1.0, 0), answers_of(targets, 1.6, 1)
    way = Resampling(200, 60, seed=3, groups=groups)
    found = compare(Contestant("B", IDS, first), Contestant("B2", IDS, second), way)
    gain = second.right.astype(float) - first.right.astype(float)
    drawn, recalls = [], []
    for weights in way.weights(7):
        for w in weights.T:
            drawn.append((gain * w).sum() / w.sum())
            recalls.append((gain * w)[targets == 2].sum() / w[targets == 2].sum())
    figure = found.differences["top1"]
    assert figure.value == pytest.approx(gain.mean())
    assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    recall = found.recalls["c"]
    assert recall.value == pytest.approx(gain[targets == 2].mean())
    assert (recall.low, recall.high) == pytest.approx(tuple(np.quantile(recalls, [0.025, 0.975])))
    ones = np.ones((200, 1), np.float32)
    for name in ("ece", "roc_auc", "f1_macro"):
        expected = Statistics(second)(ones)[name][0] - Statistics(first)(ones)[name][0]
        assert found.differences[name].value == pytest.approx(expected)
    assert found.agreement.value == (first.predicted == second.predicted).mean()


def test_mcnemar_is_scipys_binomial_test() -> None:
    for b in range(0, 30):
        for c in range(0, 30):
            expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
            assert mcnemar(b, c) == pytest.approx(expected)


def test_the_four_cells_are_all_images() -> None:
    found = found_of((0.8, 1.2))
    assert found.both + found.only_first + found.only_second + found.neither == 200
    assert found.p_value == mcnemar(found.only_first, found.only_second)


def test_a_large_difference_is_real_a_small_one_may_be_chance_and_none_is_none() -> None:
    better, worse, near = found_of((0.5, 3.0)), found_of((3.0, 0.5)), found_of((1.0, 1.05), n=60)
    assert better.is_real
    assert "B2 is better than B by" in better.sentence
    assert "is real" in better.sentence
    assert worse.is_real
    assert "B2 is worse than B by" in worse.sentence
    assert not near.is_real
    assert "chance" in near.sentence
    targets = np.arange(40) % 4
    same = answers_of(targets, 1.0, 0)
    none = compare(Contestant("B", IDS, same), Contestant("B2", IDS, same), Resampling(40, 20))
    assert (none.is_real, none.p_value, none.agreement.value) == (False, 1.0, 1.0)
    assert "no difference" in none.sentence


def test_without_resamples_nothing_is_judged() -> None:
    found = found_of((0.5, 3.0), resamples=0)
    assert found.to_json()["is_real"] is None
    assert "not judged" in found.sentence


def test_swapping_the_models_turns_every_sign() -> None:
    targets = np.random.default_rng(1).integers(0, 4, 100)
    one, two = (Contestant(n, IDS, answers_of(targets, s, at)) for at, (n, s) in enumerate((("B", 1.0), ("C", 2.0))))
    there, back = (compare(a, b, Resampling(100, 30)) for a, b in ((one, two), (two, one)))
    for name, figure in there.differences.items():
        assert figure.value == pytest.approx(-(back.differences[name].value or 0))
        assert figure.low == pytest.approx(-(back.differences[name].high or 0))
    assert there.p_value == back.p_value
    assert (there.only_first, there.only_second) == (back.only_second, back.only_first)


def test_the_order_of_a_models_labels_does_not_matter() -> None:
    targets = np.random.default_rng(1).integers(0, 4, 100)
    first, second = answers_of(targets, 1.0, 0), answers_of(targets, 2.0, 1)
    plain = compare(Contestant("B", IDS, first), Contestant("C", IDS, second), Resampling(100, 30))
    order = [2, 0, 3, 1]
    turned = Answers(second.probabilities[:, order], np.argsort(order)[targets])
    ids = [IDS[at] for at in order]
    other = compare(Contestant("B", IDS, first), Contestant("C", ids, turned), Resampling(100, 30))
    assert other.sentence == plain.sentence
    assert set(other.recalls) == set(plain.recalls)
    for name, figure in plain.differences.items():  # sums over classes in another order: equal to rounding
        assert other.differences[name].value == pytest.approx(figure.value, abs=1e-12)
        assert other.differences[name].low == pytest.approx(figure.low, abs=1e-12)


def test_several_labels_are_compared_by_exact_matches() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((120, 4)) < 0.4
    sides = [Answers((rng.random((120, 4)) * 0.6 + w * targets).clip(0, 1).astype(np.float32), targets) for w in (0, 1)]
    found = compare(Contestant("B", IDS, sides[0]), Contestant("B2", IDS, sides[1]), Resampling(120, 40))
    assert found.lead == "exact_match"
    assert found.is_real
    assert found.only_second == int((~sides[0].right & sides[1].right).sum())


def test_the_page_says_it_in_a_sentence() -> None:
    found = found_of((0.5, 3.0))
    report = blocks.Report("t", "2026-01-31T12:00:00Z", tuple(comparison_blocks(found)))
    assert blocks.Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report
    assert found.sentence.split(":")[0] in render(report)
