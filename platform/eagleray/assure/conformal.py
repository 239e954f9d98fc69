"""Split conformal prediction sets: the labels that an image may have, with the truth among them at a stated rate.

The rate is over images and calibration sets together, and holds for any model, however badly calibrated, as long as new
images are drawn like those of the calibration. A set of one label is a decision; with a larger one a person looks.
What is promised of the *kept* decisions alone is another thing, and stricter: the KPI ``error_rate(kept)<=...``.

- ``lac`` (least ambiguous): labels whose probability reaches one threshold; smallest sets on average.
- ``aps`` (adaptive): labels from the most probable on until their sum reaches a level; coverage more even over images.

Source: Sadinle, Lei, Wasserman, Least ambiguous set-valued classifiers, JASA 2019 (lac); Romano, Sesia, Candes,
Classification with valid and adaptive coverage, NeurIPS 2020 (aps, here without randomization: the last label stays in,
so that coverage can only be higher); Vovk, Gammerman, Shafer, Algorithmic learning in a random world, 2005 (the rate).

Example:
    >>> level = conformal_level(probabilities, targets, error_rate=0.05, method="lac")
    >>> prediction_sets(new_probabilities, level, method="lac").sum(axis=1)
    array([1, 1, 2])
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Method = Literal["lac", "aps"]


def conformal_level(probabilities: Float32, targets: Int64, *, error_rate: float, method: Method = "lac") -> float:
    """The level that the sets of new images must reach.

    Args:
        probabilities: float32 (N, C), of the calibration's images.
        targets: int64 (N,): their labels.
        error_rate: The truth may be missing from so large a share of the sets, 0..1.
        method: ``lac`` or ``aps``.

    Returns:
        The ceil((N + 1)(1 - error_rate))-th smallest score of a true label; infinity where there are too few images for
        that rate: then a set holds every label.
    """
    scores = _scores(probabilities, method)[np.arange(len(targets)), targets]
    rank = math.ceil((len(targets) + 1) * (1 - error_rate) - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(targets) else math.inf


def prediction_sets(probabilities: Float32, level: float, *, method: Method = "lac") -> Bool:
    """bool (N, C): the labels in the set of each image.

    Args:
        probabilities: float32 (N, C).
        level: What ``conformal_level`` gave for the same method.
        method: ``lac`` or ``aps``.
    """
    if method == "lac":
        return np.asarray(1.0 - probabilities.astype(np.float64) <= level, np.bool_)
    order, sums = _ranked_sums(probabilities)
    before = np.concatenate([np.zeros((len(sums), 1)), sums[:, :-1]], axis=1)  # the label that reaches the level is in
    found = np.empty(sums.shape, np.bool_)
    np.put_along_axis(found, order, before < level, axis=1)
    return found


def images_needed(error_rate: float) -> int:
    """The fewest images of a calibration at which sets can be smaller than all labels."""
    return math.ceil(1 / error_rate - 1 - 1e-9)


def _scores(probabilities: Float32, method: Method) -> Float64:
    """float64 (N, C): how unlike a label is."""
    if method == "lac":
        return 1.0 - probabilities.astype(np.float64)
    order, sums = _ranked_sums(probabilities)
    scores = np.empty_like(sums)
    np.put_along_axis(scores, order, sums, axis=1)
    return scores


def _ranked_sums(probabilities: Float32) -> tuple[Int64, Float64]:
    """Labels of each image, most probable first, and the sums of their probabilities so far."""
    exact = probabilities.astype(np.float64)
    order = np.argsort(-exact, axis=1, kind="stable")
    return order, np.cumsum(np.take_along_axis(exact, order, axis=1), axis=1)
