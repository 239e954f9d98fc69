"""How good a classifier's answers are, for single-label and multi-label tasks, each figure with its interval.

Every figure is a function of image weights (see bootstrap): with weights 1 it is the value, with the counts of a
resample it is that resample's. Definitions are scikit-learn's, over the classes that occur:

- ``top1``, ``top5``: the true class is the first, or among the first five; of equal scores the lower index comes first.
  Multi-label: the first answer is, or one of the first five answers is, among the true labels.
- ``balanced_accuracy``: mean recall; multi-label: mean of (recall + specificity) / 2.
- ``f1_macro``, ``precision_macro``, ``recall_macro``, ``f1_weighted``: over classes with at least one image; precision
  of a class that is never answered is 0. Single-label answers are the most probable class, multi-label answers every
  class at or above a threshold.
- ``map``, ``roc_auc``: mean over classes of average precision and of one-versus-rest area (ranking).
- ``ece``: expected calibration error over 15 bins of equal width; multi-label: over all (image, class) pairs.
  Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3.
- multi-label only: ``f1_micro`` and ``exact_match`` (every label right).

Example:
    >>> estimates(Answers(probabilities, targets), Resampling(len(targets)))["top1"]
    Estimate(value=0.896, low=0.856, high=0.932)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from eagleray.vision.bootstrap import Estimate, Resampling, estimate
from eagleray.vision.ranking import Ranking

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

ECE_BINS = 15  # Guo et al. 2017, section 4
TOP = 5
CHUNK_ROWS = 4096  # rows of (N, C) temporaries: 4 MB of booleans at 1,000 classes
PER_CLASS = ("precision", "recall", "f1", "average_precision", "roc_auc")
MULTI_ONLY = ("f1_micro", "exact_match")
SCALARS = (
    *("top1", "top5", "balanced_accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro"),
    *("map", "roc_auc", "ece"),
)


@dataclass(frozen=True)
class Answers:
    """What is true and what a model said, of N images over C classes.

    Attributes:
        probabilities: float32 (N, C), 0..1; rows sum to 1 when single-label.
        targets: int64 (N,): the class of each image; or bool (N, C): its labels, which makes the task multi-label.
        threshold: At or above it a class counts as answered; multi-label only.
    """

    probabilities: Float32
    targets: Int64 | Bool
    threshold: float = 0.5

    def __post_init__(self) -> None:
        shape = self.probabilities.shape
        if len(shape) != 2 or self.targets.shape not in ((shape[0],), shape) or not shape[0] or not shape[1]:
            raise ValueError(f"targets {self.targets.shape} do not fit probabilities {shape}")
        if not self.is_multi_label and not 0 <= self.targets.min() <= self.targets.max() < shape[1]:
            raise ValueError(f"targets from {self.targets.min()} to {self.targets.max()}; there are {shape[1]} classes")

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.targets.ndim == 2

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.probabilities.shape[1])

    @cached_property
    def true(self) -> tuple[Int64, Int64]:
        """Image and class of every true label."""
        return self._pairs(self.targets)

    @cached_property
    def predicted(self) -> Int64:
        """int64 (N,): the most probable class."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)

    @cached_property
    def answered(self) -> tuple[Int64, Int64]:
        """Image and class of every answer: the most probable class, or those at or above the threshold."""
        return self._pairs(self.probabilities >= self.threshold if self.is_multi_label else self.predicted)

    @cached_property
    def hits(self) -> tuple[Int64, Int64]:
        """Image and class of every answer that is right."""
        images, classes = self.answered
        is_right = self.targets[images, classes] if self.is_multi_label else self.targets[images] == classes
        return images[is_right], classes[is_right]

    @cached_property
    def right(self) -> Bool:
        """bool (N,): whether the first answer is right; multi-label: whether every label is."""
        return _exact(self) if self.is_multi_label else np.asarray(self.rank < 1, np.bool_)

    def subset(self, mask: Bool) -> Answers:
        """Of some of the images only."""
        return Answers(self.probabilities[mask], self.targets[mask], self.threshold)

    @cached_property
    def rank(self) -> Int64:
        """int64 (N,): how many classes stand before the (first) true one; C where none is true."""
        rank = np.full(len(self.probabilities), self.num_classes, np.int64)
        for start in range(0, len(rank), CHUNK_ROWS):
            scores, truth = self.probabilities[start : start + CHUNK_ROWS], self.targets[start : start + CHUNK_ROWS]
            best = np.where(truth, scores, -1.0).argmax(axis=1) if self.is_multi_label else truth
            known = np.flatnonzero(truth.any(axis=1)) if self.is_multi_label else np.arange(len(truth))
            scores, best = scores[known], best[known].astype(np.int64)
            own = np.take_along_axis(scores, best[:, None], axis=1)
            is_before = (scores > own) | ((scores == own) & (np.arange(self.num_classes) < best[:, None]))
            rank[start + known] = is_before.sum(axis=1)
        return rank

    def _pairs(self, labels: Int64 | Bool) -> tuple[Int64, Int64]:
        if labels.ndim == 2:
            images, classes = np.nonzero(labels)
            return images.astype(np.int64), classes.astype(np.int64)
        return np.arange(len(labels), dtype=np.int64), labels.astype(np.int64)


class Statistics:
    """Every figure of some answers, as a function of image weights. The sums it needs are made once.

    Args:
        answers: N images, C classes.
    """

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        shape = (answers.num_classes, len(answers.probabilities))
        self._true, self._answered, self._hits = (
            _incidence(pairs, shape) for pairs in (answers.true, answers.answered, answers.hits)
        )
        self._ranking = Ranking(answers.probabilities, *answers.true)
        self._gaps = calibration_gaps(answers)
        self._is_exact = _exact(answers) if answers.is_multi_label else None
        self.rows = max(self._ranking.rows, *shape)

    def __call__(self, weights: Float32) -> dict[str, Float64]:
        """Scalars (B,) and figures of each class (C, B) for image weights float32 (N, B)."""
        answers, total = self._answers, weights.sum(axis=0, dtype=np.float64)
        true, answered, hits = (
            (matrix @ weights).astype(np.float64) for matrix in (self._true, self._answered, self._hits)
        )
        auc, ap = self._ranking(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = hits / true
            precision = np.where(answered > 0, hits / np.maximum(answered, 1e-9), 0.0)
            f1 = 2 * hits / (true + answered)
            specificity = (total - true - answered + hits) / (total - true)
            pairs = total * (answers.num_classes if answers.is_multi_label else 1)
            found = {
                "top1": _mean(answers.rank < 1, weights, total),
                "top5": _mean(answers.rank < TOP, weights, total),
                "balanced_accuracy": _over((recall + specificity) / 2 if answers.is_multi_label else recall, true),
                "f1_macro": _over(f1, true),
                "f1_weighted": np.where(true > 0, f1 * true, 0.0).sum(axis=0) / true.sum(axis=0),
                "precision_macro": _over(precision, true),
                "recall_macro": _over(recall, true),
                "map": _over(ap, true),
                "roc_auc": _over(auc, true),
                "ece": np.abs(self._gaps @ weights).sum(axis=0) / pairs,
            }
            if self._is_exact is not None:
                found["f1_micro"] = 2 * hits.sum(axis=0) / (true.sum(axis=0) + answered.sum(axis=0))
                found["exact_match"] = _mean(self._is_exact, weights, total)
        per_class = {"precision": precision, "recall": recall, "f1": f1, "average_precision": ap, "roc_auc": auc}
        return {**found, **{f"class_{name}": array for name, array in per_class.items()}}


@dataclass(frozen=True)
class Metrics:
    """Every figure with its interval.

    Attributes:
        scalars: By name, SCALARS (and MULTI_ONLY).
        per_class: Of each class, by name, PER_CLASS.
        support: int64 (C,): images that have the class.
        answered: int64 (C,): images that were answered with it.
    """

    scalars: dict[str, Estimate]
    per_class: dict[str, list[Estimate]]
    support: Int64
    answered: Int64


def measure(answers: Answers, resampling: Resampling) -> Metrics:
    """Computes everything.

    Args:
        answers: N images.
        resampling: Of these images.
    """
    statistics = Statistics(answers)
    found = estimate(statistics, resampling, rows=statistics.rows)
    scalars = {name: value for name, value in found.items() if not isinstance(value, list)}
    per_class = {name.removeprefix("class_"): value for name, value in found.items() if isinstance(value, list)}
    support, answered = (
        np.bincount(pairs[1], minlength=answers.num_classes) for pairs in (answers.true, answers.answered)
    )
    return Metrics(scalars, per_class, support, answered)


def confusion(answers: Answers) -> Any:
    """A sparse int64 (C, C) matrix of a single-label task: images of each class (row) by their answer (column)."""
    from scipy.sparse import coo_matrix

    size = answers.num_classes
    ones = np.ones(len(answers.predicted), np.int64)
    return coo_matrix((ones, (answers.targets, answers.predicted)), shape=(size, size)).tocsr()


@dataclass(frozen=True)
class Reliability:
    """How often the model is right when it is so sure, in bins of equal width.

    Attributes:
        edges: float64 (bins + 1,), 0 to 1; a bin holds its upper edge.
        counts: int64 (bins,): answers in each.
        confidence: float64 (bins,): their mean probability; NaN where there are none.
        accuracy: float64 (bins,): the share that is right; NaN where there are none.
    """

    edges: Float64
    counts: Int64
    confidence: Float64
    accuracy: Float64


def reliability(answers: Answers, bins: int = ECE_BINS) -> Reliability:
    """Source: Guo et al. 2017, section 2; multi-label: over all (image, class) pairs."""
    counts, sure, right = np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins)
    for confidence, correct in _confidences(answers):
        at = _bins(confidence.ravel(), bins)
        counts += np.bincount(at, minlength=bins)
        sure += np.bincount(at, confidence.ravel().astype(np.float64), minlength=bins)
        right += np.bincount(at, correct.ravel().astype(np.float64), minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(np.linspace(0, 1, bins + 1), counts, sure / counts, right / counts)


def calibration_gaps(answers: Answers, bins: int = ECE_BINS) -> Float64:
    """float64 (bins, N): each image's sum of (confidence - correctness) in each bin."""
    gaps = np.zeros((len(answers.probabilities), bins))
    start = 0
    for confidence, correct in _confidences(answers):
        rows = np.repeat(np.arange(len(confidence)), confidence.shape[1])
        cells = rows * bins + _bins(confidence.ravel(), bins)
        difference = (confidence.astype(np.float64) - correct).ravel()
        held = np.bincount(cells, difference, minlength=len(confidence) * bins)
        gaps[start : start + len(confidence)] = held.reshape(len(confidence), bins)
        start += len(confidence)
    return np.ascontiguousarray(gaps.T)


def _confidences(answers: Answers) -> Any:
    """Probability and truth of what is judged: the first answer, or every class; (rows, 1) or (rows, C) at a time."""
    for start in range(0, len(answers.probabilities), CHUNK_ROWS):
        scores, truth = (a[start : start + CHUNK_ROWS] for a in (answers.probabilities, answers.targets))
        if answers.is_multi_label:
            yield scores, truth
        else:
            first = answers.predicted[start : start + CHUNK_ROWS]
            yield scores.max(axis=1, keepdims=True), (first == truth)[:, None]


def _bins(confidence: Float32, bins: int) -> Int64:
    """The bin of each: (m/bins, (m+1)/bins], as Guo et al. have it; 0 is in the first."""
    return np.asarray(np.clip(np.ceil(confidence.astype(np.float64) * bins) - 1, 0, bins - 1), np.int64)


def pr_curve(answers: Answers, label: int) -> tuple[Float64, Float64]:
    """Recall (ascending from 0) and precision of one class over every threshold."""
    from sklearn.metrics import precision_recall_curve

    truth = answers.targets[:, label] if answers.is_multi_label else answers.targets == label
    precision, recall, _ = precision_recall_curve(truth, answers.probabilities[:, label])
    return recall[::-1], precision[::-1]


def envelope(answers: Answers, label: int, grid: Float64) -> Float64:
    """The highest precision of a class at each recall of a grid or more; float64, shape of ``grid``, ascending 0..1."""
    recall, precision = pr_curve(answers, label)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, grid - 1e-12, side="left").clip(min=1, max=len(best) - 1)  # 0: the curve's own start
    return np.asarray(best[at], np.float64)


def surest_mistakes(answers: Answers, most: int) -> list[tuple[int, int, float]]:
    """The images that are most confidently wrong: (image, class, probability of that class), surest first.

    Single-label: the wrong answer with the highest probability. Multi-label: the label that is farthest from the truth
    on the other side of the threshold: answered and not true, or true and not answered.
    """
    if answers.is_multi_label:
        is_wrong = (answers.probabilities >= answers.threshold) != answers.targets
        distance = np.where(is_wrong, np.abs(answers.probabilities - answers.targets), -1.0)
        label = distance.argmax(axis=1)
        size = np.take_along_axis(distance, label[:, None], axis=1)[:, 0]
    else:
        label = answers.predicted
        sure = answers.probabilities.max(axis=1)
        size = np.where(label != answers.targets, sure, -1.0)
    order = np.argsort(-size, kind="stable")[:most]
    return [(int(at), int(label[at]), float(answers.probabilities[at, label[at]])) for at in order if size[at] >= 0]


def _incidence(pairs: tuple[Int64, Int64], shape: tuple[int, int]) -> Any:
    from scipy.sparse import csr_matrix

    images, classes = pairs
    return csr_matrix((np.ones(len(images), np.float32), (classes, images)), shape=shape)


def _exact(answers: Answers) -> Bool:
    return np.asarray(((answers.probabilities >= answers.threshold) == answers.targets).all(axis=1), np.bool_)


def _mean(values: Bool, weights: Float32, total: Float64) -> Float64:
    """The weighted share that is true; exact: counts below 2**53."""
    return np.asarray(values.astype(np.float64) @ weights / total, np.float64)


def _over(values: Float64, true: Float64) -> Float64:
    """The mean over classes that occur and are defined; NaN where there is none. Shapes (C, B) to (B,)."""
    is_known = (true > 0) & np.isfinite(values)
    return np.asarray(np.where(is_known, values, 0.0).sum(axis=0) / is_known.sum(axis=0), np.float64)
