"""Certificate: what was proved of a policy, and what it costs, as one document that a page shows and a gate reads.

Example:
    >>> made = Certificate(task, found, selection, certification)
    >>> made.costs_of("crack")["recall"]
    Estimate(value=0.81, low=0.74, high=0.87)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from eagleray.assure import binomial
from eagleray.assure.calibration import calibration_error
from eagleray.assure.conformal import conformal_level, images_needed, prediction_sets
from eagleray.assure.decision_metrics import METRICS, Cells, Int64, Sample, tally
from eagleray.assure.thresholds import METHOD, Found, Task
from eagleray.vision.bootstrap import Estimate
from eagleray.vision.evidence import Claim
from eagleray.vision.prediction import ThresholdPolicy, decided, temper

SCHEMA = 1
LEVEL = 0.95  # of the two-sided intervals that say what a policy costs
GRID = 60  # thresholds of a curve
SETS_ERROR_RATE = 0.05  # of the prediction sets that the page shows beside


@dataclass(frozen=True)
class Certificate:
    """What was found, with the images it rests on.

    Attributes:
        task: What was asked.
        found: What passed.
        selection, certification: The images of each piece.
        is_multi_label: Whether an image may have several labels.
        about: JSON values that say which images, which model, when.
    """

    task: Task
    found: Found
    selection: Sample
    certification: Sample
    is_multi_label: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def policy(self) -> ThresholdPolicy:
        """The policy that was proved, or else the one that was tested and failed."""
        return self.found.step.policy

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Its claims."""
        return self.found.step.claims

    @property
    def is_met(self) -> bool:
        """Whether there is something to publish."""
        return self.found.best is not None

    @cached_property
    def said(self) -> Int64:
        """int64 (n,): what the policy decides of the certification images."""
        return decided(self.policy, self.task.label_ids, self.certification.probabilities)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Labels to speak of: those that may be decided and are true of an image or decided."""
        seen = self.certification.truth.sum(axis=0) + np.bincount(
            self.said[self.said >= 0], minlength=len(self.task.label_ids)
        )
        deciding = self.task.deciding or self.task.label_ids
        return tuple(label for label in deciding if seen[self.task.label_ids.index(label)])

    def cells(self, label: str | None) -> Cells:
        """Counts of a label, or of all."""
        at = None if label is None else self.task.label_ids.index(label)
        return tally(self.said, self.certification.truth, at)

    def figures(self, label: str | None) -> dict[str, Estimate]:
        """Every rate of a label, or of all, with its exact two-sided interval on the certification images."""
        cells = self.cells(label)
        rates = {
            name: metric.count(cells)
            for name, metric in METRICS.items()
            if metric.count is not None and metric.is_per_label == (label is not None)
        }
        return {name: _estimate(successes, trials) for name, (successes, trials) in rates.items()}

    @cached_property
    def cost(self) -> float | None:
        """Mean cost of a decision; None where no costs are set."""
        costs = self.task.costs
        return None if costs is None else float(costs.losses(self.said, self.certification.truth).mean())

    @cached_property
    def calibration(self) -> dict[str, float]:
        """ECE on the certification images without and with the temperature."""
        scaling, temperature = self.task.scaling, self.policy.temperature
        several = {"is_multi_label": self.is_multi_label}
        return {
            "temperature": temperature,
            "ece_before": calibration_error(self.certification, 1.0, scaling, **several),
            "ece_after": calibration_error(self.certification, temperature, scaling, **several),
        }

    @cached_property
    def sets(self) -> dict[str, Any] | None:
        """Conformal prediction sets (lac), levelled on the selection images: coverage and size on the others."""
        if self.is_multi_label or len(self.selection) < images_needed(SETS_ERROR_RATE):
            return None
        first, second = (
            temper(sample.probabilities, self.policy.temperature, self.task.scaling)
            for sample in (self.selection, self.certification)
        )
        level = conformal_level(first, self.selection.truth.argmax(axis=1), error_rate=SETS_ERROR_RATE)
        found = prediction_sets(second, level)
        holds = int((found & self.certification.truth).any(axis=1).sum())
        sizes = np.bincount(found.sum(axis=1), minlength=2)
        return {
            "error_rate": SETS_ERROR_RATE,
            "coverage": _estimate(holds, len(found)).to_json(),
            "one_label": int(sizes[1]),
            "none": int(sizes[0]),
            "mean_size": float(found.sum(axis=1).mean()),
        }

    def sweep(self, label: str | None) -> list[tuple[float, Cells]]:
        """Counts on the certification images when one threshold (or the floor) moves and all else stays.

        Args:
            label: Whose threshold; None: the floor.
        """
        own = self.policy.floor if label is None else self.policy.thresholds.get(label, 0.0)
        at = None if label is None else self.task.label_ids.index(label)
        found = []
        for value in sorted({*np.linspace(0, 1, GRID + 1).tolist(), own}):
            moved = replace(self.policy, floor=value)
            if label is not None:
                moved = replace(self.policy, thresholds={**self.policy.thresholds, label: value})
            said = decided(moved, self.task.label_ids, self.certification.probabilities)
            found.append((value, tally(said, self.certification.truth, at)))
        return found

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "schema": SCHEMA,
            "kpi": self.task.kpi.text,
            "is_met": self.is_met,
            "policy": self.policy.to_json(),
            "claims": [claim.to_json() for claim in self.claims],
            "objective": {"text": self.task.kpi.objective.text, "value": self.found.step.objective},
            "labels": {label: _json(self.figures(label)) for label in self.labels},
            "all": {**_json(self.figures(None)), "cost": self.cost},
            "calibration": self.calibration,
            "prediction_sets": self.sets,
            "method": METHOD,
            "policies_tested": len(self.found.steps),
            "num_selection": len(self.selection),
            "num_certification": len(self.certification),
            **self.about,
        }


def shortfall(claim: Claim, *, num_images: int) -> tuple[str, int | None]:
    """What is missing for a claim that failed.

    Args:
        claim: On the certification images.
        num_images: Of which so many there were.

    Returns:
        A sentence, and about how many certification images would do; None where no number would, or it is not known.
    """
    is_rate = claim.num_successes is not None
    value, target, bound = claim.value, claim.target, claim.bound
    seen = f"{claim.num_successes:,} of {claim.num_trials:,}" if is_rate else f"mean of {claim.num_trials:,}"
    side = "lower" if ">=" in claim.kpi else "upper"
    if value is None or bound is None:
        return f"{claim.kpi}: no image counts", None
    sentence = f"{claim.kpi}: {seen} ({value:.3f}), {side} bound {bound:.3f}"
    if not is_rate:
        return sentence, None
    rate, wanted = (value, target) if side == "lower" else (1 - value, 1 - target)
    trials = binomial.trials_needed(rate, wanted, claim.confidence)
    if trials is None:
        return f"{sentence}; the observed share does not lie beyond {target:g}: more labels alone will not do", None
    return sentence, int(np.ceil(trials * num_images / claim.num_trials))


def _estimate(successes: int, trials: int) -> Estimate:
    if not trials:
        return Estimate(None)
    low, high = binomial.interval(successes, trials, LEVEL)
    return Estimate(successes / trials, low, high)


def _json(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: figure.to_json() for name, figure in figures.items()}
