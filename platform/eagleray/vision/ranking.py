"""ROC-AUC and average precision of every class, exact under any image weights, from sums that are made once.

Both depend on the scores only by how many positives and negatives stand above each positive. So of a class, the images
are kept by the step of its positives' scores that they fall into: negatives below the lowest positive change neither
and are dropped. For weights (N, B) the counts above each step are two products of sparse matrices and a running sum.

Source: Fawcett, An introduction to ROC analysis, 2006 (AUC as a rank statistic, ties count half); average precision as
scikit-learn has it: sum over thresholds of (recall step) x precision, without interpolation.

Example:
    >>> ranking = Ranking(probabilities, positives)
    >>> auc, ap = ranking(np.ones((len(probabilities), 1), np.float32))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class Ranking:
    """The order of the images by the score of each class, as far as it matters.

    Args:
        probabilities: float32 (N, C).
        images: int64 (M,): image of each positive.
        classes: int64 (M,): its class.
    """

    def __init__(self, probabilities: Float32, images: Int64, classes: Int64) -> None:
        self._num_images, self._num_classes = probabilities.shape
        order = np.argsort(classes, kind="stable")
        images, classes = images[order], classes[order]
        self._present, starts = np.unique(classes, return_index=True)
        positives: list[tuple[Int64, Int64]] = []
        negatives: list[tuple[Int64, Int64]] = []
        steps = []
        base = 0
        for label, members in zip(self._present, np.split(images, starts[1:]), strict=True):
            scores = np.ascontiguousarray(probabilities[:, label])
            levels = np.unique(scores[members])  # ascending; a step is one of them, the highest first
            positives.append((base + len(levels) - 1 - np.searchsorted(levels, scores[members]), members))
            above = np.searchsorted(levels, scores, side="right")  # how many levels are not above this score
            above[members] = 0
            rest = np.flatnonzero(above)
            is_tie = levels[above[rest] - 1] == scores[rest]
            negatives.append((2 * (base + len(levels) - above[rest]) + is_tie, rest))
            steps.append(len(levels))
            base += len(levels)
        self._class_of = np.repeat(np.arange(len(steps)), steps)
        self._starts = np.concatenate([[0], np.cumsum(steps)[:-1]]).astype(np.int64)
        self._positives = _incidence(positives, base, self._num_images)
        self._negatives = _incidence(negatives, 2 * base, self._num_images)

    @property
    def rows(self) -> int:
        """Rows of the largest array that a call makes."""
        return int(self._negatives.shape[0])

    def __call__(self, weights: Float32) -> tuple[Float64, Float64]:
        """Area under the ROC curve and average precision of each class.

        Args:
            weights: float32 (N, B): whole numbers >= 0.

        Returns:
            Two float64 (C, B); NaN for a class without a positive (or, for the first, without a negative).
        """
        auc = np.full((2, self._num_classes, weights.shape[1]), np.nan)
        if len(self._present):
            with np.errstate(invalid="ignore", divide="ignore"):
                auc[:, self._present] = self._of_present(weights)
        return auc[0], auc[1]

    def _of_present(self, weights: Float32) -> Float64:
        starts, class_of = self._starts, self._class_of
        hits = (self._positives @ weights).astype(np.float64)
        true_above = _running(hits, starts, class_of)
        false_above = _running((self._negatives @ weights).astype(np.float64), 2 * starts, np.repeat(class_of, 2))
        strictly, with_ties = false_above[0::2], false_above[1::2]
        num_positive = np.add.reduceat(hits, starts, axis=0)
        num_negative = weights.sum(axis=0, dtype=np.float64) - num_positive
        below = num_negative[class_of] - (strictly + with_ties) / 2
        auc = np.add.reduceat(hits * below, starts, axis=0) / (num_positive * num_negative)
        precision = np.where(hits > 0, true_above / (true_above + with_ties), 0.0)
        return np.stack([auc, np.add.reduceat(hits * precision, starts, axis=0) / num_positive])


def _incidence(parts: list[tuple[Int64, Int64]], rows: int, columns: int) -> Any:
    """A sparse float32 matrix of ones."""
    from scipy.sparse import csr_matrix

    at = [np.concatenate([part[side] for part in parts]) if parts else np.empty(0, np.int64) for side in (0, 1)]
    ones = np.ones(len(at[0]), np.float32)
    return csr_matrix((ones, (at[0].astype(np.int32), at[1].astype(np.int32))), shape=(rows, columns))


def _running(counts: Float64, starts: Int64, class_of: Int64) -> Float64:
    """The running sum within each class."""
    total = np.cumsum(counts, axis=0)
    before = np.concatenate([np.zeros((1, counts.shape[1])), total])[starts]
    return np.asarray(total - before[class_of], np.float64)
