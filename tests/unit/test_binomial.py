"""Exact bounds against scipy's binomial test and against counting; how many images a claim needs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from eagleray.assure import binomial
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

levels = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99])


@given(st.integers(0, 300), st.integers(1, 300), levels)
def test_bounds_are_those_of_the_exact_binomial_test(successes: int, trials: int, confidence: float) -> None:
    successes = min(successes, trials)
    test = stats.binomtest(successes, trials, alternative="greater")
    low = test.proportion_ci(confidence, method="exact").low
    assert binomial.lower_bound(successes, trials, confidence) == pytest.approx(low, abs=1e-9)
    test = stats.binomtest(successes, trials, alternative="less")
    high = test.proportion_ci(confidence, method="exact").high
    assert binomial.upper_bound(successes, trials, confidence) == pytest.approx(high, abs=1e-9)
    both = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert binomial.interval(successes, trials, confidence) == pytest.approx((both.low, both.high), abs=1e-9)


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("trials", [1, 20, 59, 200])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_a_lower_bound_lies_above_the_rate_at_most_as_often_as_allowed(
    rate: float, trials: int, confidence: float
) -> None:
    """By counting every outcome: no simulation, no tolerance but for rounding."""
    outcomes = np.arange(trials + 1)
    is_wrong = np.array([binomial.lower_bound(int(k), trials, confidence) > rate for k in outcomes])
    assert stats.binom.pmf(outcomes, trials, rate)[is_wrong].sum() <= 1 - confidence + 1e-12


@given(st.integers(1, 400), st.floats(0.05, 0.99), levels)
def test_the_successes_needed_are_the_fewest(trials: int, target: float, confidence: float) -> None:
    needed = int(binomial.successes_needed(np.array([trials]), target, confidence)[0])
    if needed <= trials:
        assert binomial.lower_bound(needed, trials, confidence) >= target - 1e-9
    if needed > 0:
        assert binomial.lower_bound(needed - 1, trials, confidence) <= target + 1e-9


@given(st.floats(0.05, 0.99), levels)
def test_the_fewest_trials_are_the_fewest(target: float, confidence: float) -> None:
    fewest = binomial.fewest(target, confidence)
    assert binomial.lower_bound(fewest, fewest, confidence) >= target - 1e-9
    assert fewest == 1 or binomial.lower_bound(fewest - 1, fewest - 1, confidence) < target + 1e-9


def test_as_many_trials_as_are_said_do_and_far_fewer_do_not() -> None:
    assert binomial.fewest(0.95, 0.95) == 59
    needed = binomial.trials_needed(0.97, 0.95, 0.95)
    assert needed is not None
    assert binomial.lower_bound(math.floor(0.97 * needed + 1e-9), needed, 0.95) >= 0.95
    assert binomial.lower_bound(math.floor(0.97 * needed * 0.7), int(needed * 0.7), 0.95) < 0.95
    assert binomial.trials_needed(0.95, 0.95, 0.95) is None
    assert binomial.trials_needed(1.0, 0.95, 0.95) == 59


def test_assurance_is_the_share_of_posterior_draws_that_pass() -> None:
    generator = np.random.default_rng(0)
    for successes, trials, more in ((40, 41, 120), (24, 24, 65), (15, 20, 60), (300, 330, 900), (280, 330, 900)):
        rates = generator.beta(successes + 0.5, trials - successes + 0.5, 100_000)
        further = generator.binomial(more, rates)
        needed = binomial.successes_needed(np.array([more]), 0.88, 0.95)[0]
        found = binomial.assurance(np.array([successes]), np.array([trials]), np.array([float(more)]), 0.88, 0.95)
        assert found[0] == pytest.approx((further >= needed).mean(), abs=0.1)  # what it is said to be right to
    assert binomial.assurance(np.array([9]), np.array([9]), np.array([20.0]), 0.95, 0.95)[0] == 0.0


def test_the_bound_of_a_mean_holds_and_is_no_looser_than_hoeffdings() -> None:
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(1000):
        losses = generator.choice([0.0, 0.1, 1.0], 80, p=[0.8, 0.15, 0.05])  # mean 0.065
        bound = binomial.mean_upper_bound(float(losses.mean()), 80, 0.9)
        assert bound <= losses.mean() + math.sqrt(math.log(10) / 160) + 1e-9
        wrong += bound < 0.065
    assert wrong <= 100
    assert binomial.mean_upper_bound(0.0, 0, 0.9) == 1.0
