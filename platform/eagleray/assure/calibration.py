"""Temperature scaling: one number that makes a model's probabilities as sure as they should be.

It never changes which label is most probable of an image; it changes how a probability of one image compares with that
of another, and what a threshold of 0.9 means. Fitted on images that test nothing (assure.thresholds).

Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2.

Example:
    >>> fit_temperature(sample, "softmax")
    1.73
"""

from __future__ import annotations

import numpy as np

from eagleray.assure.decision_metrics import Sample
from eagleray.vision.metrics import Answers, calibration_gaps
from eagleray.vision.prediction import Scaling, temper

LOWEST, HIGHEST = 0.05, 20.0  # beyond them a distribution is one label, or all alike
TINY = 1e-12  # of a probability: its logarithm stays finite


def fit_temperature(sample: Sample, scaling: Scaling) -> float:
    """The temperature of least negative log-likelihood.

    Args:
        sample: Images and their labels.
        scaling: ``softmax`` or ``sigmoid``, as the model's output is.

    Returns:
        A number from 0.05 to 20, rounded to four digits: what is stored is what was used.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(sample, float(np.exp(log_temperature)), scaling)

    found = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-5})
    return float(f"{float(np.exp(found.x)):.4g}")


def negative_log_likelihood(sample: Sample, temperature: float, scaling: Scaling) -> float:
    """Mean over the images, in nats; of ``sigmoid``: summed over labels."""
    exact = temper(sample.probabilities, temperature, scaling).astype(np.float64)
    if scaling == "sigmoid":
        right = np.where(sample.truth, exact, 1 - exact)
        return float(-np.log(np.maximum(right, TINY)).sum(axis=1).mean())
    own = (exact * sample.truth).sum(axis=1) / np.maximum(sample.truth.sum(axis=1), 1)
    return float(-np.log(np.maximum(own, TINY)).mean())


def calibration_error(sample: Sample, temperature: float, scaling: Scaling, *, is_multi_label: bool) -> float:
    """ECE at a temperature, over 15 bins of equal width."""
    probabilities = temper(sample.probabilities, temperature, scaling)
    targets = sample.truth if is_multi_label else sample.truth.argmax(axis=1)
    gaps = calibration_gaps(Answers(probabilities, targets))
    return float(np.abs(gaps.sum(axis=1)).sum() / (len(sample) * (sample.truth.shape[1] if is_multi_label else 1)))
