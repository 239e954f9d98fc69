"""Two models on the same images: by how much they differ, and whether that is real or may be chance.

Both are judged in the very same resamples (a paired bootstrap; whole groups where groups are drawn), so that what
makes an image hard for both cancels out. Beside it stands McNemar's exact test on the images that only one of them gets
right; it takes images as independent. A difference is called real where both say so.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8 (paired data); McNemar, Note on the
sampling error of the difference between correlated proportions, Psychometrika 12, 1947; its exact form: two-sided
binomial test of the discordant pairs with share 1/2.

Example:
    >>> found = compare(Contestant("B", ids, answers), Contestant("B2", ids, others), Resampling(len(targets)))
    >>> found.sentence
    'B2 is better than B by 3.2 points of top-1 (0.8 to 5.6; McNemar p = 0.008): the difference is real.'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagleray.assure.phrases import count
from eagleray.vision.bootstrap import Estimate, Float32, Float64, Resampling, estimate
from eagleray.vision.metrics import MULTI_ONLY, SCALARS, Answers, Statistics


@dataclass(frozen=True)
class Contestant:
    """A model in a comparison.

    Attributes:
        name: Shown.
        label_ids: Its C labels, in the order of the answers' columns.
        answers: What it said of the N images.
    """

    name: str
    label_ids: Sequence[str]
    answers: Answers


@dataclass(frozen=True)
class Comparison:
    """What was found. Every difference is the second model's figure minus the first's.

    Attributes:
        names: Of the first and the second model.
        lead: The figure that decides: the share of images that are right.
        differences: Every figure.
        recalls: Difference of the recall of each class that occurs, by label id.
        agreement: Share of images that both answer alike.
        both, only_first, only_second, neither: Images by which of the two is right.
        p_value: McNemar's exact test.
        resampling: How the intervals were made.
    """

    names: tuple[str, str]
    lead: str
    differences: Mapping[str, Estimate]
    recalls: Mapping[str, Estimate]
    agreement: Estimate
    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    resampling: Resampling

    @property
    def has_interval(self) -> bool:
        """Whether the difference that decides has one."""
        return self.differences[self.lead].low is not None

    @property
    def is_apart(self) -> bool:
        """Whether the interval of the difference leaves zero out."""
        figure = self.differences[self.lead]
        return figure.low is not None and figure.high is not None and (figure.low > 0 or figure.high < 0)

    @property
    def is_real(self) -> bool:
        """Whether the interval and McNemar's test both say that the models differ."""
        return self.is_apart and self.p_value <= 1 - self.resampling.level

    @property
    def sentence(self) -> str:
        """What it means, in words."""
        first, second = self.names
        images = count(self.resampling.num_images, "image")
        if not self.only_first + self.only_second:
            return f"{second} and {first} are right on the very same of {images}: no difference."
        figure = self.differences[self.lead]
        points = 100 * (figure.value or 0.0)
        what = "top-1" if self.lead == "top1" else "exact matches"
        way = "better than" if points > 0 else "worse than"
        by = f"{way} {first} by {abs(points):.1f} points of {what}" if abs(points) >= 0.05 else f"level with {first}"
        test = f"McNemar p = {self.p_value:.2g}"
        if figure.low is None or figure.high is None:
            return f"{second} is {by} on {images} ({test}); no interval was asked for, so it is not judged."
        bounds = sorted((100 * figure.low, 100 * figure.high))
        shown = [-bounds[1], -bounds[0]] if points < 0 else bounds
        head = f"{second} is {by} ({shown[0]:.1f} to {shown[1]:.1f}; {test})"
        if self.is_real:
            return f"{head}: the difference is real."
        split = self.is_apart != (self.p_value <= 1 - self.resampling.level)
        return f"{head}: it may be chance" + (", for interval and test do not agree." if split else ".")

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "names": list(self.names),
            "difference": "second minus first",
            "lead": self.lead,
            "is_real": self.is_real if self.has_interval else None,
            "sentence": self.sentence,
            "differences": {name: figure.to_json() for name, figure in self.differences.items()},
            "per_class_recall": {name: figure.to_json() for name, figure in self.recalls.items()},
            "agreement": self.agreement.to_json(),
            "mcnemar": {
                "both": self.both,
                "only_first": self.only_first,
                "only_second": self.only_second,
                "neither": self.neither,
                "p_value": self.p_value,
            },
        }


def compare(first: Contestant, second: Contestant, resampling: Resampling) -> Comparison:
    """Compares two models on the same images.

    Args:
        first: The one that is measured against.
        second: The other; it may have its labels in another order, and more of them.
        resampling: Of the images.
    """
    a, b = first.answers, second.answers
    if len(a.probabilities) != len(b.probabilities) or a.is_multi_label != b.is_multi_label:
        raise ValueError("two models are compared on the same images and the same task")
    names = (*SCALARS, *(MULTI_ONLY if a.is_multi_label else ()))
    shared = [label for label in first.label_ids if label in set(second.label_ids)]
    rows_a, rows_b = (_places(side.label_ids, shared) for side in (first, second))
    alike = _alike(first, second)
    one, two = Statistics(a), Statistics(b)

    def statistic(weights: Float32) -> dict[str, Float64]:
        before, after = one(weights), two(weights)
        found = {name: after[name] - before[name] for name in names}
        found["recalls"] = after["class_recall"][rows_b] - before["class_recall"][rows_a]
        found["agreement"] = np.asarray(alike @ weights / weights.sum(axis=0, dtype=np.float64), np.float64)
        return found

    found = estimate(statistic, resampling, rows=max(one.rows, two.rows))
    recalls, agreement = found.pop("recalls"), found.pop("agreement")
    by_class = recalls if isinstance(recalls, list) else [recalls]
    wrong_only = (a.right & ~b.right).sum(), (~a.right & b.right).sum()
    return Comparison(
        names=(first.name, second.name),
        lead="exact_match" if a.is_multi_label else "top1",
        differences={name: figure for name, figure in found.items() if isinstance(figure, Estimate)},
        recalls={label: one for label, one in zip(shared, by_class, strict=True) if one.value is not None},
        agreement=agreement if isinstance(agreement, Estimate) else agreement[0],
        both=int((a.right & b.right).sum()),
        only_first=int(wrong_only[0]),
        only_second=int(wrong_only[1]),
        neither=int((~a.right & ~b.right).sum()),
        p_value=mcnemar(int(wrong_only[0]), int(wrong_only[1])),
        resampling=resampling,
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of the discordant pairs: how often chance alone parts them as unevenly; 1 without any."""
    from scipy.special import bdtr

    total = only_first + only_second
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), total, 0.5))) if total else 1.0


def _places(label_ids: Sequence[str], wanted: Sequence[str]) -> list[int]:
    place = {name: at for at, name in enumerate(label_ids)}
    return [place[name] for name in wanted]


def _alike(first: Contestant, second: Contestant) -> Float64:
    """float64 (N,): 1 where both give the same most probable label."""
    one, two = (np.array(side.label_ids, object)[side.answers.predicted] for side in (first, second))
    return np.asarray(one == two, np.float64)
