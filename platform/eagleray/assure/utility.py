"""What mistakes cost: a matrix of truth by decision, the mean cost of decisions, and the thresholds that make it least.

This is how an *acceptable miss* is said: a missed crack costs 100, a false alarm 1, a person who looks 2. Costs choose;
what is claimed of them is bounded on other images than those that chose.

Source: Elkan, The Foundations of Cost-Sensitive Learning, IJCAI 2001, section 1; Chow, On optimum recognition error and
reject tradeoff, IEEE Trans. Information Theory 16 (1970): below a floor, abstaining is cheaper.

Example:
    >>> rule = CostRule(wrong=1, abstain=0.2, pairs={"crack": {"ok": 100}})
    >>> cost_matrix(rule, ("crack", "ok")).values.tolist()
    [[0.0, 100.0, 0.2], [1.0, 0.0, 0.2]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from eagleray.assure.decision_metrics import Bool, Int64
from eagleray.core.config import Config
from eagleray.core.errors import ConfigError

Float64 = npt.NDArray[np.float64]

ABSTAIN = "abstain"  # the key of a pair for what is not decided
SWEEPS = 4  # over the labels: a search over coordinates settles in two or three


class CostRule(Config):
    """What a decision costs, in any unit.

    Attributes:
        right: Of a right decision.
        wrong: Of a wrong decision that ``pairs`` does not name.
        abstain: Of no decision: what a person costs who looks.
        pairs: True label id to decision (a label id or ``abstain``) to cost.
    """

    right: float = Field(0.0, ge=0, allow_inf_nan=False)
    wrong: float = Field(1.0, ge=0, allow_inf_nan=False)
    abstain: float = Field(0.2, ge=0, allow_inf_nan=False)
    pairs: dict[str, dict[str, float]] = Field(default_factory=dict)


@dataclass(frozen=True)
class CostMatrix:
    """Costs by truth and decision.

    Attributes:
        values: float64 (C, C + 1): true label by decided label; the last column is no decision.
    """

    values: Float64

    @property
    def most(self) -> float:
        """The highest cost: what scales losses to 0..1."""
        return max(float(self.values.max()), 1e-12)

    def losses(self, decided: Int64, truth: Bool) -> Float64:
        """float64 (N,): the cost of each decision; of several true labels the kindest counts.

        Args:
            decided: int64 (N,), -1 for none.
            truth: bool (N, C), at least one label each.
        """
        found = np.full(len(decided), np.inf)
        images, labels = np.nonzero(truth)
        np.minimum.at(found, images, self.values[labels, decided[images]])  # -1 is the last column
        return found


def cost_matrix(rule: CostRule, label_ids: Sequence[str]) -> CostMatrix:
    """The matrix of a rule.

    Raises:
        ConfigError: A pair names a label that is not there, or a cost is not a number from 0 on.
    """
    size, place = len(label_ids), {name: at for at, name in enumerate(label_ids)}
    values = np.full((size, size + 1), float(rule.wrong))
    values[np.arange(size), np.arange(size)] = rule.right
    values[:, size] = rule.abstain
    wrong = []
    for true, row in rule.pairs.items():
        for said, cost in row.items():
            if true not in place or said not in (*place, ABSTAIN):
                wrong.append(f"costs.pairs.{true}.{said}: no such label")
            elif not np.isfinite(cost) or cost < 0:
                wrong.append(f"costs.pairs.{true}.{said}: {cost}")
            else:
                values[place[true], place.get(said, size)] = cost
    if wrong:
        raise ConfigError(
            f"not costs: {'; '.join(wrong[:5])}",
            expected=f"costs from 0 on, from labels ({', '.join(label_ids[:5])}, ...) to such or {ABSTAIN!r}",
            fix="correct them",
        )
    return CostMatrix(values)


def cheapest(
    cost: Callable[[Float64], float], ladders: Sequence[Float64], *, start: Sequence[float] | None = None
) -> tuple[Float64, float]:
    """Thresholds that make a cost least, one coordinate after another until none helps.

    A search that goes downhill only: it finds a place that no single threshold improves, not always the lowest of all.

    Args:
        cost: Thresholds float64 (K,) to their mean cost.
        ladders: K rows of candidates.
        start: Where to begin; the first candidate of each otherwise.

    Returns:
        Thresholds (K,) and their cost.
    """
    at = np.array([row[0] for row in ladders] if start is None else start, np.float64)
    least = cost(at)
    for _ in range(SWEEPS):
        before = least
        for index, row in enumerate(ladders):
            for candidate in row:
                trial = at.copy()
                trial[index] = candidate
                found = cost(trial)
                if found < least - 1e-12:
                    at, least = trial, found
        if least >= before - 1e-12:
            break
    return at, least
