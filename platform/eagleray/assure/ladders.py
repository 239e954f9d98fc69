"""Ladders: candidate thresholds of a label, or of all, each with what the selection images say about it.

What is chosen here is a guess and needs no proof: other images test it (assure.thresholds).

Example:
    >>> ladder = label_ladder(sample, label=0, rivals=(0,))
    >>> ladder.thresholds[ladder.lowest_at(ladder.assured(constraints, scale=3.0), 0.9)]
    0.81
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eagleray.assure.binomial import assurance
from eagleray.assure.decision_metrics import METRICS, Cells, Sample
from eagleray.assure.kpi import Constraint

Float64 = npt.NDArray[np.float64]
PURE = 1e-6  # weight of the share itself: it decides where no threshold lets enough images through to pass
MOST_RUNGS = 400  # thresholds of a ladder: more are not told apart by the images that certify


@dataclass(frozen=True)
class Ladder:
    """Thresholds, highest first, and the counts of what each lets through.

    Attributes:
        thresholds: float64 (G,), descending; the last is 0.
        cells: Counts of each, int64 (G,).
    """

    thresholds: Float64
    cells: Cells

    def assured(self, constraints: Sequence[Constraint], *, scale: float) -> Float64:
        """How likely each threshold is to pass on the images that certify; the least likely constraint counts.

        Args:
            constraints: Those of this ladder; without any, every threshold is as good.
            scale: How many images certify for each that selects.

        Returns:
            float64 (G,), 0..1.
        """
        found = np.ones(len(self.thresholds))
        for constraint in constraints:
            found = np.minimum(found, chance(self.cells, constraint, scale=scale))
        return found

    def at(self, assured: Float64, level: float, *, is_lowest: bool) -> float:
        """The lowest (or highest) threshold that is assured at a level, or at the best where none is."""
        good = np.flatnonzero(assured >= min(level, float(assured.max(initial=0.0))))
        return float(self.thresholds[good[-1] if is_lowest else good[0]])


def chance(cells: Cells, constraint: Constraint, *, scale: float) -> Any:
    """How likely a constraint is to pass on ``scale`` times as many images; of cost, which has no counts: 1.

    Where none can be expected to pass, what is purest is worth the test: the numbers are a guess.
    """
    from scipy.special import betaincinv

    metric = METRICS[constraint.metric]
    if metric.count is None:
        return np.ones(np.shape(cells.hits))
    successes, trials = (np.asarray(part, np.int64) for part in metric.count(cells))
    target = constraint.target
    if metric.op == "<=":
        successes, target = trials - successes, 1 - target
    sure = assurance(successes, trials, np.asarray(trials * scale, np.float64), target, constraint.confidence)
    return (1 - PURE) * sure + PURE * betaincinv(successes + 0.5, trials - successes + 0.5, 0.1)


def label_ladder(sample: Sample, label: int, rivals: Sequence[int]) -> Ladder:
    """Thresholds of one label.

    Args:
        sample: Images that select, with probabilities as thresholds are compared with.
        label: Its index.
        rivals: Indices of the labels that may be decided, this one too: only where it is the most probable of them is
            it decided, as long as theirs lie lower.
    """
    scores = sample.probabilities[:, rivals]
    is_first = np.asarray(rivals)[scores.argmax(axis=1)] == label
    truth = sample.truth[:, label]
    return _ladder(sample.probabilities[is_first, label], truth[is_first], int(truth.sum()), len(sample))


def floor_ladder(sample: Sample, rivals: Sequence[int]) -> Ladder:
    """Floors of the most probable of some labels."""
    best = np.asarray(rivals)[sample.probabilities[:, rivals].argmax(axis=1)]
    rows = np.arange(len(sample))
    return _ladder(sample.probabilities[rows, best], sample.truth[rows, best], len(sample), len(sample))


def _ladder(scores: npt.NDArray[np.float32], is_hit: npt.NDArray[np.bool_], true: int, total: int) -> Ladder:
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    hits = np.cumsum(is_hit[order]).astype(np.int64)
    ends = np.flatnonzero(ranked[:-1] > ranked[1:])  # between two scores that differ
    if len(ends) > MOST_RUNGS:
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, MOST_RUNGS).astype(np.int64))]
    middles = (ranked[ends] + ranked[ends + 1]) / 2
    counts = np.append(ends + 1, len(ranked)).astype(np.int64)
    found = np.append(hits[ends], hits[-1] if len(hits) else 0)
    whole = np.ones(len(counts), np.int64)
    return Ladder(np.append(middles, 0.0), Cells(found, counts, true * whole, total * whole))
