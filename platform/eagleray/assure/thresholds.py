"""Thresholds whose KPI is proved on images that did not choose them: what `certify` publishes, or does not.

The images are divided, blind to their labels, into two pieces. The *selection* piece may be looked at in any way: it
fits the temperature and lays out a path of whole policies, from the one most likely to pass on towards a better
objective. The *certification* piece tests these policies in that order, each constraint by its exact Clopper-Pearson
bound at the confidence asked for, and stops at the first policy that fails one. Of those that passed, the best by the
objective is published. If the first fails, nothing is.

**What is promised.** P(a policy is published that breaks a constraint) <= 1 - the constraint's confidence, for any
model, any scores and any number of labels, if the certification images are drawn independently like those to come.

Proof. Given the selection piece, the path L1, L2, ... is fixed. A policy breaks constraint j or does not; let Lf be the
first that breaks any, say j. A broken policy can be published only if Lf was tested and passed, and so its bound for j
passed. Lf is one fixed policy: given how many certification images count for j, each succeeds with the same true
chance, so the bound lies on the wrong side of it with probability at most 1 - confidence of j (Clopper and Pearson
1934). No correction for the number of policies is due, since a later one is tested only after Lf has passed (fixed-
sequence testing); none for several constraints, since all must pass (an intersection-union test). Holm or Bonferroni
would be due, and are not used, if single constraints could be published without the others. QED.

Every policy is tested as a whole, through ``prediction.decided``: what is proved is the decision that Classifier makes,
with all labels' thresholds, floor and temperature acting on one another.

Source: Angelopoulos, Bates, Candes, Jordan, Lei, Learn then Test, 2021, section 2.2 and its split fixed-sequence
testing; Bauer, Multiple testing in clinical trials, Statistics in Medicine 10 (1991); Berger, Multiparameter hypothesis
testing and acceptance sampling, Technometrics 24 (1982); Geifman and El-Yaniv, Selective classification, NeurIPS 2017.

Example:
    >>> found = certify(Task(kpi, label_ids), selection=first, certification=second)
    >>> found.policy.thresholds, found.claims[0].bound
    ({'crack': 0.81}, 0.953)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from eagleray.assure import binomial
from eagleray.assure.decision_metrics import COST, METRICS, Int64, Sample, tally
from eagleray.assure.kpi import Constraint, Kpi, Objective
from eagleray.assure.ladders import Ladder, chance, floor_ladder, label_ladder
from eagleray.assure.utility import CostMatrix, cheapest
from eagleray.vision.evidence import Claim
from eagleray.vision.prediction import Scaling, ThresholdPolicy, decided, temper

METHOD = "split fixed-sequence testing with exact one-sided bounds (Clopper-Pearson; of cost Hoeffding-Bentkus)"
# Assurance of the rungs: steps of the path. A finer path stops at the first dip that chance makes
LEVELS = (1.0, 0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
FEW_LABELS = 30  # up to so many, each has a threshold of its own in the search for the least cost
COST_RUNGS = 24  # candidates of a label in that search


@dataclass(frozen=True)
class Task:
    """What is to be certified.

    Attributes:
        kpi: Without ``*``.
        label_ids: The model's C labels, in order.
        others: What becomes of labels that the KPI does not name: never decided (``abstain``), or decided wherever they
            are the most probable (``decide``), without a claim.
        present: Labels that the images have; those ``others`` are.
        otherwise: The decision where no label is decided.
        scaling: How a temperature acts.
        costs: Where the KPI speaks of cost.
    """

    kpi: Kpi
    label_ids: tuple[str, ...]
    others: Literal["abstain", "decide"] = "abstain"
    present: tuple[str, ...] = ()
    otherwise: str = "abstain"
    scaling: Scaling = "softmax"
    costs: CostMatrix | None = None

    @property
    def deciding(self) -> tuple[str, ...]:
        """Labels that may be decided; empty means every label of the model."""
        if not self.kpi.labels and not self.kpi.is_of_cost:
            return ()
        more = self.present if self.others == "decide" or self.kpi.is_of_all else ()
        return tuple(dict.fromkeys([*self.kpi.labels, *more]))

    def indices(self) -> tuple[int, ...]:
        """Their places."""
        place = {name: at for at, name in enumerate(self.label_ids)}
        return tuple(place[name] for name in self.deciding or self.label_ids)


@dataclass(frozen=True)
class Step:
    """One policy of the path, as the certification images found it.

    Attributes:
        policy: Whole.
        claims: One a constraint.
        objective: Its value; None where no image counts.
    """

    policy: ThresholdPolicy
    claims: tuple[Claim, ...]
    objective: float | None

    @property
    def is_met(self) -> bool:
        """Whether every constraint holds."""
        return all(claim.is_met for claim in self.claims)


@dataclass(frozen=True)
class Found:
    """The outcome.

    Attributes:
        steps: Policies in the order tested; all but perhaps the last passed.
        best: Index of what is published; None: nothing.
        num_selection, num_certification: Images of each piece.
    """

    steps: tuple[Step, ...]
    best: int | None
    num_selection: int
    num_certification: int

    @property
    def step(self) -> Step:
        """What is published, or else what was tested and failed."""
        return self.steps[self.best or 0]

    @property
    def policy(self) -> ThresholdPolicy | None:
        """The policy, without its evidence."""
        return None if self.best is None else self.steps[self.best].policy


def certify(task: Task, *, selection: Sample, certification: Sample, temperature: float = 1.0) -> Found:
    """Finds the best policy that passes.

    Args:
        task: What.
        selection: Images that lay out the path.
        certification: Independent images that test it.
        temperature: Fitted on the selection piece; 1 for none.
    """
    steps: list[Step] = []
    for policy in path(task, selection, scale=len(certification) / len(selection), temperature=temperature):
        steps.append(judge(policy, task, certification))
        if not steps[-1].is_met:
            break
    passed = [at for at, step in enumerate(steps) if step.is_met]
    sign = 1 if task.kpi.objective.is_maximized else -1

    def worth(at: int) -> float:
        value = steps[at].objective
        return -np.inf if value is None else sign * value

    best = max(passed, key=worth) if passed else None
    return Found(tuple(steps), best, len(selection), len(certification))


def judge(policy: ThresholdPolicy, task: Task, sample: Sample) -> Step:
    """Judges one policy that these images did not choose; a KPI that was certified elsewhere is checked so, too.

    Args:
        policy: Whole: what it decides is judged as Classifier decides it.
        task: Of which KPI.
        sample: The images.
    """
    said = decided(policy, task.label_ids, sample.probabilities)
    claims = tuple(_claim(constraint, said, task, sample) for constraint in task.kpi.constraints)
    return Step(policy, claims, objective_value(task.kpi.objective, said, task, sample))


def _claim(constraint: Constraint, said: Int64, task: Task, sample: Sample) -> Claim:
    metric, confidence = METRICS[constraint.metric], constraint.confidence
    if metric.count is None:
        losses = _costs(task).losses(said, sample.truth)
        mean, most = float(losses.mean()), _costs(task).most
        counts: tuple[int, int | None] = (len(losses), None)
        value: float | None = mean
        bound = most * binomial.mean_upper_bound(mean / most, len(losses), confidence)
    else:
        label = None if constraint.label is None else task.label_ids.index(constraint.label)
        successes, trials = metric.count(tally(said, sample.truth, label))
        side = binomial.lower_bound if metric.op == ">=" else binomial.upper_bound
        counts, value = (trials, successes), successes / trials if trials else None
        bound = side(successes, trials, confidence)
    is_met = bound >= constraint.target if metric.op == ">=" else bound <= constraint.target
    return Claim(
        kpi=constraint.text,
        target=constraint.target,
        confidence=confidence,
        num_trials=counts[0],
        num_successes=counts[1],
        value=value,
        bound=bound,
        is_met=bool(is_met) and counts[0] > 0,
    )


def objective_value(objective: Objective, said: Int64, task: Task, sample: Sample) -> float | None:
    """The objective of decisions: of several labels, the mean over those that have images that count."""
    metric = METRICS[objective.metric]
    if metric.count is None:
        return float(_costs(task).losses(said, sample.truth).mean())
    places = [None] if not objective.labels else [task.label_ids.index(label) for label in objective.labels]
    pairs = [metric.count(tally(said, sample.truth, label)) for label in places]
    known = [successes / trials for successes, trials in pairs if trials]
    return float(np.mean(known)) if known else None


def path(task: Task, selection: Sample, *, scale: float, temperature: float) -> list[ThresholdPolicy]:
    """Policies in the order in which they are to be tested: the surest first, then towards the objective.

    Args:
        task: What.
        selection: Images that may be looked at in any way.
        scale: Certification images for each of them.
        temperature: Of every policy.
    """
    seen = Sample(temper(selection.probabilities, temperature, task.scaling), selection.truth)
    if all(constraint.metric == COST for constraint in task.kpi.constraints):
        return [_cheapest(task, seen, temperature)]
    family = list(dict.fromkeys(_rungs(task, seen, scale)))
    policies = [_policy(task, thresholds, floor, temperature) for thresholds, floor in family]
    sure = [_assured(policy, task, selection, scale) for policy in policies]
    start = max(range(len(policies)), key=lambda at: (round(sure[at], 3) or sure[at], at))
    return policies[start:]


def _rungs(task: Task, seen: Sample, scale: float) -> list[tuple[tuple[float, ...], float]]:
    """Thresholds of the deciding labels and a floor, at each level of assurance."""
    indices, is_lowest = task.indices(), task.kpi.objective.wants == "more"
    ladders: list[tuple[Ladder, npt.NDArray[np.float64]] | None] = []
    for index in indices:
        own = [c for c in task.kpi.constraints if c.label == task.label_ids[index]]
        ladder = label_ladder(seen, index, indices) if own else None
        ladders.append(None if ladder is None else (ladder, ladder.assured(own, scale=scale)))
    of_all = [c for c in task.kpi.constraints if c.label is None]
    floors = floor_ladder(seen, indices)
    sure = floors.assured(of_all, scale=scale)
    found = []
    for level in LEVELS:
        row = tuple(0.0 if pair is None else pair[0].at(pair[1], level, is_lowest=is_lowest) for pair in ladders)
        found.append((row, floors.at(sure, level, is_lowest=is_lowest) if of_all else 0.0))
    return found


def _policy(task: Task, thresholds: Iterable[float], floor: float, temperature: float) -> ThresholdPolicy:
    """A policy of float32 numbers: what is tested is what is stored."""
    named = dict(zip(task.deciding, (float(np.float32(value)) for value in thresholds), strict=False))
    scaling = task.scaling if temperature != 1 else "softmax"
    return ThresholdPolicy(named, task.otherwise, float(np.float32(floor)), temperature, scaling)


def _assured(policy: ThresholdPolicy, task: Task, selection: Sample, scale: float) -> float:
    """How likely the whole policy is to pass: by its least likely constraint."""
    said = decided(policy, task.label_ids, selection.probabilities)
    found = 1.0
    for constraint in task.kpi.constraints:
        label = None if constraint.label is None else task.label_ids.index(constraint.label)
        found = min(found, float(chance(tally(said, selection.truth, label), constraint, scale=scale)))
    return found


def _cheapest(task: Task, seen: Sample, temperature: float) -> ThresholdPolicy:
    """The policy of least cost on the selection images: a floor for all, or a threshold a label where they are few."""
    indices, costs = task.indices(), _costs(task)
    floors = _thinned(floor_ladder(seen, indices))

    def cost(thresholds: npt.NDArray[np.float64], floor: float) -> float:
        policy = _policy(task, thresholds, floor, 1.0)
        return float(costs.losses(decided(policy, task.label_ids, seen.probabilities), seen.truth).mean())

    zeros = np.zeros(len(indices))
    floor = min(floors.tolist(), key=lambda value: cost(zeros, value))
    if not task.deciding or len(indices) > FEW_LABELS:
        return _policy(task, zeros, floor, temperature)
    rows = [_thinned(label_ladder(seen, index, (index,))) for index in indices]
    found, _ = cheapest(lambda thresholds: cost(thresholds, 0.0), rows, start=[floor] * len(indices))
    return _policy(task, found, 0.0, temperature)


def _thinned(ladder: Ladder) -> npt.NDArray[np.float64]:
    """Some of its thresholds, and one that nothing reaches."""
    at = np.unique(np.linspace(0, len(ladder.thresholds) - 1, COST_RUNGS).astype(np.int64))
    return np.append(1.0, ladder.thresholds[at])


def _costs(task: Task) -> CostMatrix:
    if task.costs is None:
        raise ValueError("a KPI of cost needs a cost matrix")
    return task.costs
