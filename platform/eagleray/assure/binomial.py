"""Exact one-sided confidence bounds of a rate, and how many images a claim needs.

Each bound holds for every true rate and every number of images: P(lower bound <= rate) >= confidence. None of them is
an approximation.

Source: Clopper and Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial,
Biometrika 26 (1934); Hoeffding-Bentkus: Bates et al., Distribution-free, risk-controlling prediction sets, JACM 68
(2021), theorem 5, as used in Angelopoulos et al., Learn then Test, 2021, section 2.

Example:
    >>> round(lower_bound(59, 59, 0.95), 4), fewest(0.95, 0.95)
    (0.9505, 59)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

MOST_NEEDED = 10**9  # images: no larger number is said


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """Clopper-Pearson lower bound of a rate, one-sided.

    Args:
        successes: 0..trials.
        trials: Images; 0 gives 0.
        confidence: 0..1.
    """
    from scipy.special import betaincinv

    return float(betaincinv(successes, trials - successes + 1, 1 - confidence)) if successes > 0 else 0.0


def upper_bound(successes: int, trials: int, confidence: float) -> float:
    """Clopper-Pearson upper bound of a rate, one-sided."""
    return 1.0 - lower_bound(trials - successes, trials, confidence)


def interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate, two-sided."""
    half = (1 + confidence) / 2
    return lower_bound(successes, trials, half), upper_bound(successes, trials, half)


def fewest(target: float, confidence: float) -> int:
    """The fewest trials at which a rate can be shown to be at least ``target``: all of them successes."""
    return max(1, math.ceil(math.log(1 - confidence) / math.log(target) - 1e-9))


def successes_needed(trials: Int64, target: float, confidence: float) -> Int64:
    """The fewest successes of each number of trials whose lower bound reaches ``target``; trials + 1: none does."""
    from scipy.stats import binom

    return np.asarray(np.minimum(binom.isf(1 - confidence, trials, target) + 1, trials + 1), np.int64)


def trials_needed(rate: float, target: float, confidence: float) -> int | None:
    """About how many trials show a rate to be at least ``target``, when so large a share of them succeeds.

    Args:
        rate: The observed rate.
        target: What is to be shown.
        confidence: One-sided.

    Returns:
        The number, or None when no number would do: the rate does not lie above the target.
    """
    if rate <= target:
        return None
    low, high = fewest(target, confidence) - 1, fewest(target, confidence)
    while lower_bound(math.floor(rate * high + 1e-9), high, confidence) < target:
        low, high = high, 2 * high
        if high > MOST_NEEDED:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = lower_bound(math.floor(rate * middle + 1e-9), middle, confidence) >= target
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def assurance(successes: Int64, trials: Int64, more: Float64, target: float, confidence: float) -> Float64:
    """How likely it is that further trials show a rate to be at least ``target``, given the trials so far.

    The posterior predictive of Jeffreys' prior, its beta-binomial taken as the beta of the same mean and about the same
    spread: right to about 0.1. It only says what is worth testing; no claim rests on it.

    Args:
        successes, trials: int64 (n,): so far.
        more: float64 (n,): further trials, as expected.
        target, confidence: The claim.

    Returns:
        float64 (n,), 0..1.
    """
    from scipy.special import betaincc

    further = np.rint(more).astype(np.int64)
    needed = successes_needed(further, target, confidence)
    rate = (successes + 0.5) / (trials + 1)
    size = 1 / (1 / (trials + 1) + 1 / np.maximum(further, 1))  # variances of what is known and of what is drawn add up
    chance = betaincc(size * rate, size * (1 - rate), np.clip((needed - 0.5) / np.maximum(further, 1), 0, 1))
    return np.where(needed > further, 0.0, chance)


def mean_upper_bound(mean: float, trials: int, confidence: float) -> float:
    """Hoeffding-Bentkus upper bound of the mean of losses that lie in 0..1, one-sided.

    Args:
        mean: The observed mean.
        trials: Images; 0 gives 1.
        confidence: 0..1.
    """
    if not trials:
        return 1.0
    low, high = mean, 1.0
    for _ in range(60):  # 2**-60: below the precision of a double
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(mean, trials, middle) > 1 - confidence else (low, middle)
    return high


def _p_value(mean: float, trials: int, level: float) -> float:
    """Of the hypothesis that the true mean is above ``level``."""
    from scipy.special import bdtr, rel_entr

    low = min(mean, level)
    divergence = float(rel_entr(low, level) + rel_entr(1 - low, 1 - level))
    bentkus = math.e * float(bdtr(math.ceil(trials * mean - 1e-9), trials, level))
    return min(math.exp(-trials * divergence), bentkus, 1.0)
