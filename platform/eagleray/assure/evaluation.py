"""Evaluation: what a model's answers are worth against labels, as one document that a page shows and a gate reads.

Example:
    >>> found = evaluate(Answers(probabilities, targets), bundle.labels, Resampling(len(targets)))
    >>> found.to_json()["top1"]
    {'value': 0.896, 'low': 0.856, 'high': 0.932}
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagleray.vision import metrics
from eagleray.vision.bootstrap import Resampling
from eagleray.vision.metrics import Answers, Metrics, Reliability
from eagleray.vision.prediction import Label

SCHEMA = 1
MOST_MISTAKES = 24  # tiles of a contact sheet
MOST_CURVES = 3  # classes with a precision-recall curve of their own, besides the mean
FEW_CLASSES = 5  # up to so many, every class has one
GRID = 101  # recalls of a curve

Point = tuple[float, float]


@dataclass(frozen=True)
class Mistake:
    """An image that is confidently wrong: its place among the answers, the class it is wrong about, and how surely."""

    image: int
    label: int
    probability: float


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        labels: The C classes of the model.
        metrics: Every figure with its interval.
        num_images: N.
        is_multi_label: Whether an image may have several labels.
        threshold: At or above it a class counts as answered; multi-label only.
        confusions: (true class, answered class, images) of a single-label task, both equal too; most images first.
        reliability: How often it is right when it is so sure.
        curves: Name and (recall, precision) points: the mean over classes, then single classes.
        mistakes: Most confident first.
        resampling: How the intervals were made.
    """

    labels: tuple[Label, ...]
    metrics: Metrics
    num_images: int
    is_multi_label: bool
    threshold: float
    confusions: tuple[tuple[int, int, int], ...]
    reliability: Reliability
    curves: tuple[tuple[str, tuple[Point, ...]], ...]
    mistakes: tuple[Mistake, ...]
    resampling: Resampling

    @property
    def present(self) -> list[int]:
        """Classes that occur."""
        return [int(index) for index in np.flatnonzero(self.metrics.support)]

    def to_json(self) -> dict[str, Any]:
        """The metrics document; a figure is ``{"value", "low", "high"}``, null where it is not defined."""
        way = self.resampling
        return {
            "schema": SCHEMA,
            **{name: figure.to_json() for name, figure in self.metrics.scalars.items()},
            "n": self.num_images,
            "task": "multi_label" if self.is_multi_label else "single_label",
            "threshold": self.threshold if self.is_multi_label else None,
            "num_classes": len(self.present),
            "per_class": {self.labels[index].id: self._of_class(index) for index in self._mentioned()},
            "confusions": [
                [self.labels[true].id, self.labels[said].id, count] for true, said, count in self.confusions
            ],
            "reliability": self._bins(),
            "interval": {
                "kind": "percentile bootstrap",
                "level": way.level,
                "resamples": way.resamples,
                "seed": way.seed,
                "drawn": "images" if way.groups is None else "groups",
                "units": way.units,
            },
        }

    def _mentioned(self) -> list[int]:
        """Classes that occur or are answered."""
        return [int(index) for index in np.flatnonzero(self.metrics.support + self.metrics.answered)]

    def _of_class(self, index: int) -> dict[str, Any]:
        found = self.metrics
        head = {
            "name": self.labels[index].name,
            "support": int(found.support[index]),
            "answered": int(found.answered[index]),
        }
        return {**head, **{name: found.per_class[name][index].to_json() for name in metrics.PER_CLASS}}

    def _bins(self) -> list[dict[str, Any]]:
        r = self.reliability
        columns = (r.edges[:-1].tolist(), r.edges[1:].tolist(), r.counts.tolist())
        sure, right = ([None if math.isnan(x) else x for x in array.tolist()] for array in (r.confidence, r.accuracy))
        names = ("from", "to", "count", "confidence", "accuracy")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, sure, right, strict=True)]


def evaluate(answers: Answers, labels: Sequence[Label], resampling: Resampling) -> Evaluation:
    """Measures answers.

    Args:
        answers: N images, C classes.
        labels: The C classes, in the order of the answers' columns.
        resampling: Of these images.
    """
    if len(labels) != answers.num_classes or resampling.num_images != len(answers.probabilities):
        raise ValueError(f"{len(labels)} labels, {resampling.num_images} images; answers {answers.probabilities.shape}")
    found = metrics.measure(answers, resampling)
    return Evaluation(
        labels=tuple(labels),
        metrics=found,
        num_images=len(answers.probabilities),
        is_multi_label=answers.is_multi_label,
        threshold=answers.threshold,
        confusions=() if answers.is_multi_label else _confusions(answers),
        reliability=metrics.reliability(answers),
        curves=tuple(_curves(answers, labels, found)),
        mistakes=tuple(Mistake(*row) for row in metrics.surest_mistakes(answers, MOST_MISTAKES)),
        resampling=resampling,
    )


def _confusions(answers: Answers) -> tuple[tuple[int, int, int], ...]:
    found = metrics.confusion(answers).tocoo()
    rows = zip(found.row.tolist(), found.col.tolist(), found.data.tolist(), strict=True)
    return tuple(sorted(rows, key=lambda row: (-row[2], row[0], row[1])))


def _curves(answers: Answers, labels: Sequence[Label], found: Metrics) -> Iterator[tuple[str, tuple[Point, ...]]]:
    """The mean over classes, then every class of a few, or those with the lowest average precision."""
    present = np.flatnonzero(found.support).tolist()
    grid = np.linspace(0, 1, GRID)
    if len(present) > 1:
        mean = np.mean([metrics.envelope(answers, index, grid) for index in present], axis=0)
        yield f"mean of {len(present):,} classes", _points(grid, mean)
    average = found.per_class["average_precision"]
    lowest = sorted(present, key=lambda index: (average[index].value or 0.0, index))
    for index in present if len(present) <= FEW_CLASSES else lowest[:MOST_CURVES]:
        yield labels[index].name or labels[index].id, _points(grid, metrics.envelope(answers, index, grid))


def _points(xs: np.ndarray, ys: np.ndarray) -> tuple[Point, ...]:
    return tuple((round(float(x), 5), round(float(y), 5)) for x, y in zip(xs, ys, strict=True))
