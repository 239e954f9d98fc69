"""METRICS: what a KPI can ask of decisions, each as a count of successes among trials.

Every metric but ``cost`` is a binomial rate: given how many images count, each of them is an independent draw that
succeeds with the same chance. That is what makes exact bounds possible.

Example:
    >>> cells = tally(decided, truth, label=0)
    >>> METRICS["precision"].count(cells)
    (92, 93)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

KEPT = "kept"  # error_rate(kept): of what is decided, the only error rate there is
COST = "cost"


@dataclass(frozen=True)
class Cells:
    """Counts of decisions; numbers, or arrays of one shape for a series of thresholds.

    Attributes:
        hits: Images decided to be the label (any label) and rightly so.
        decided: Images decided to be it (any).
        true: Images that are it; of any label: all.
        total: Images.
    """

    hits: Any
    decided: Any
    true: Any
    total: Any


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        meaning: In words.
        count: Cells to (successes, trials); None where the metric is no rate.
        op: The side that a constraint may ask for.
        is_per_label: Whether it is of a label.
        wants: Whether more decisions or fewer make it better.
    """

    meaning: str
    count: Callable[[Cells], tuple[Any, Any]] | None
    op: Literal[">=", "<="] = ">="
    is_per_label: bool = False
    wants: Literal["more", "fewer"] = "more"


METRICS: dict[str, Metric] = {
    "precision": Metric(
        "of the images decided to be LABEL, the share that is", lambda c: (c.hits, c.decided), ">=", True, "fewer"
    ),
    "recall": Metric("of the images that are LABEL, the share decided so", lambda c: (c.hits, c.true), ">=", True),
    "specificity": Metric(
        "of the images that are not LABEL, the share not decided so",
        lambda c: (c.total - c.true - c.decided + c.hits, c.total - c.true),
        ">=",
        True,
        "fewer",
    ),
    "npv": Metric(
        "of the images not decided to be LABEL, the share that is not",
        lambda c: (c.total - c.true - c.decided + c.hits, c.total - c.decided),
        ">=",
        True,
    ),
    "error_rate": Metric(
        "of the images with a decision (kept), the share decided wrongly",
        lambda c: (c.decided - c.hits, c.decided),
        "<=",
        wants="fewer",
    ),
    "coverage": Metric("of all images, the share with a decision", lambda c: (c.decided, c.total)),
    "abstention": Metric("of all images, the share without one", lambda c: (c.total - c.decided, c.total), "<="),
    COST: Metric("mean cost of an image, by the costs that are set", None, "<="),
}


@dataclass(frozen=True)
class Sample:
    """Images whose truth is known.

    Attributes:
        probabilities: float32 (N, C), as the model gives them.
        truth: bool (N, C): the labels of each.
    """

    probabilities: npt.NDArray[np.float32]
    truth: Bool

    def __post_init__(self) -> None:
        if self.probabilities.shape != self.truth.shape or self.truth.ndim != 2:
            raise ValueError(f"truth {self.truth.shape} does not fit probabilities {self.probabilities.shape}")

    def __len__(self) -> int:
        return len(self.truth)

    def part(self, mask: Bool) -> Sample:
        """The images of a mask (N,)."""
        return Sample(self.probabilities[mask], self.truth[mask])


def tally(decided: Int64, truth: Bool, label: int | None = None) -> Cells:
    """Counts decisions.

    Args:
        decided: int64 (N,): index of the decided label, -1 for none.
        truth: bool (N, C).
        label: Of which label; None: of any.
    """
    is_decided = decided >= 0 if label is None else decided == label
    is_right = truth[np.arange(len(decided)), decided] if label is None else truth[:, label]
    true = len(truth) if label is None else int(truth[:, label].sum())
    return Cells(int((is_decided & is_right).sum()), int(is_decided.sum()), true, len(truth))
