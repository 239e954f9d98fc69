"""The KPI of a certificate as a person writes it: constraints, each with a confidence, and what to make the most of.

The grammar that an error lists is made from METRICS. A fault is shown at its column.

Example:
    >>> kpi = parse("precision(crack)>=0.95@0.95; maximize recall(crack)", (Label("crack", "Crack"), Label("ok", "OK")))
    >>> kpi.text
    'precision(crack)>=0.95@0.95; maximize recall(crack)'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from eagleray.assure.decision_metrics import COST, KEPT, METRICS
from eagleray.core.errors import ConfigError
from eagleray.vision.prediction import Label

STAR = "*"
CONFIDENCE = 0.95  # of a constraint that names none
SENSES = ("maximize", "minimize")
EXAMPLE = "precision(defect)>=0.95@0.95; maximize recall(defect)"
SHOWN = 5

_WORD = re.compile(r"[A-Za-z_]+")
_NUMBER = re.compile(r"[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?")
_PLAIN = re.compile(r"[^\s\"()*;@]+")


@dataclass(frozen=True)
class Constraint:
    """What must hold.

    Attributes:
        metric: A name of METRICS.
        label: A label id, ``*`` for each that the images have, or None of a metric of all.
        target: 0..1 (of cost: above 0).
        confidence: One-sided, 0..1.
    """

    metric: str
    label: str | None
    target: float
    confidence: float

    @property
    def text(self) -> str:
        """As a person writes it."""
        of = f"({quoted(self.label)})" if self.label is not None else ""
        return f"{self.metric}{of}{METRICS[self.metric].op}{self.target:g}@{self.confidence:g}"


@dataclass(frozen=True)
class Objective:
    """What is made the most of among the decisions that meet the constraints.

    Attributes:
        metric: A name of METRICS.
        labels: Of which labels, their mean; empty for a metric of all.
        is_maximized: Whether more is better.
    """

    metric: str
    labels: tuple[str, ...]
    is_maximized: bool

    @property
    def wants(self) -> str:
        """Whether ``more`` or ``fewer`` decisions make it better."""
        wants = METRICS[self.metric].wants
        is_better_higher = METRICS[self.metric].op == ">="
        return wants if self.is_maximized == is_better_higher else {"more": "fewer", "fewer": "more"}[wants]

    @property
    def text(self) -> str:
        """As a person writes it."""
        of = f"({quoted(self.labels[0]) if len(self.labels) == 1 else STAR})" if self.labels else ""
        return f"{SENSES[not self.is_maximized]} {self.metric}{of}"


@dataclass(frozen=True)
class Kpi:
    """Constraints, all of which must hold, and an objective.

    Attributes:
        constraints: In the order written.
        objective: As written, or what follows from the constraints.
    """

    constraints: tuple[Constraint, ...]
    objective: Objective

    @property
    def text(self) -> str:
        """The canonical text."""
        return "; ".join([*(constraint.text for constraint in self.constraints), self.objective.text])

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that it names, in the order named."""
        named = [constraint.label for constraint in self.constraints if constraint.label is not None]
        return tuple(dict.fromkeys([*named, *self.objective.labels]))

    @property
    def is_of_all(self) -> bool:
        """Whether it asks for something of all decisions together, so that every label may be decided."""
        return any(constraint.label is None for constraint in self.constraints) or not self.labels

    @property
    def is_of_cost(self) -> bool:
        """Whether costs must be known."""
        return COST in (self.objective.metric, *(constraint.metric for constraint in self.constraints))

    def over(self, present: Collection[str]) -> Kpi:
        """With ``*`` written out.

        Args:
            present: The labels that the images have, in order.
        """
        found: list[Constraint] = []
        for constraint in self.constraints:
            each = present if constraint.label == STAR else [constraint.label]
            found += [replace(constraint, label=label) for label in each]
        labels = tuple(present) if self.objective.labels == (STAR,) else self.objective.labels
        return Kpi(tuple(dict.fromkeys(found)), replace(self.objective, labels=labels))


def quoted(label: str) -> str:
    """A label as the grammar takes it: in quotes where it must be."""
    return label if label == STAR or _PLAIN.fullmatch(label) else '"' + label + '"'


def grammar() -> str:
    """The grammar in words, from METRICS."""
    width = max(len(name) for name in METRICS) + len("(LABEL|*)")
    rows = []
    for name, metric in METRICS.items():
        head = name + ("(LABEL|*)" if metric.is_per_label else "")
        rows.append(f"      {head.ljust(width)}  {metric.op}  {metric.meaning}")
    return "\n".join(
        [
            f'CONSTRAINT {{"; " CONSTRAINT}} ["; " OBJECTIVE], e.g. {EXAMPLE}',
            f"    CONSTRAINT: METRIC OP VALUE [@CONFIDENCE], both from 0 to 1; confidence {CONFIDENCE:g} if not given",
            f"    OBJECTIVE: {' or '.join(SENSES)} METRIC",
            f'    LABEL: an id or name, in "quotes" where it has spaces or signs; {STAR} means each label',
            "    METRIC and its OP:",
            *rows,
        ]
    )


def parse(text: str, labels: Sequence[Label]) -> Kpi:
    """Reads a KPI.

    Args:
        text: As a person writes it.
        labels: Those of the model; a label is named by its id, or by its name where no other has it.

    Raises:
        ConfigError: It does not parse, or names a metric or a label that is not there; with the column.
    """
    return _Parser(text, labels).kpi()


class _Parser:
    """Reads from left to right; every fault is raised at the column where it stands."""

    def __init__(self, text: str, labels: Sequence[Label]) -> None:
        self._text, self._at, self._labels = text, 0, labels

    def kpi(self) -> Kpi:
        constraints: list[Constraint] = []
        objective: Objective | None = None
        while True:
            self._skip()
            start = self._at
            if self._peek(_WORD) in SENSES:
                objective = self._objective()
            else:
                constraint = self._constraint()
                if any((c.metric, c.label) == (constraint.metric, constraint.label) for c in constraints):
                    self._fail(start, f"{constraint.text.partition('@')[0]} is asked for a second time")
                constraints.append(constraint)
            self._skip()
            if self._at == len(self._text):
                break
            if self._text[self._at] != ";":
                self._fail(self._at, "expected ; or the end")
            if objective is not None and self._text[self._at :].strip("; \t\n"):
                self._fail(self._at, "the objective stands last, and alone")
            self._at += 1
            if not self._text[self._at :].strip():
                break
        if not constraints and (objective is None or objective.metric != COST or objective.is_maximized):
            self._fail(len(self._text), f"expected at least one constraint (only {SENSES[1]} {COST} stands without)")
        return Kpi(tuple(constraints), objective or _default(constraints))

    def _constraint(self) -> Constraint:
        name, label = self._metric()
        metric = METRICS[name]
        self._skip()
        at = self._at
        sign = next((sign for sign in (">=", "<=") if self._text.startswith(sign, at)), "")
        if sign != metric.op:
            self._fail(at, f"expected {metric.op}" + (f": {name} is bounded from {_side(metric.op)}" if sign else ""))
        self._at += len(sign)
        target = self._number("a value", most=None if name == COST else 1.0)
        confidence = CONFIDENCE
        self._skip()
        if self._text.startswith("@", self._at):
            self._at += 1
            confidence = self._number("a confidence")
        return Constraint(name, label, target, confidence)

    def _objective(self) -> Objective:
        word = self._peek(_WORD)
        self._at += len(word)
        self._skip()
        name, label = self._metric()
        return Objective(name, () if label is None else (label,), word == SENSES[0])

    def _metric(self) -> tuple[str, str | None]:
        at, name = self._at, self._peek(_WORD)
        if name not in METRICS:
            near = difflib.get_close_matches(name, [*METRICS, *SENSES], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self._fail(at, (f"no such metric: {name}{hint}" if name else "expected a metric"))
        self._at += len(name)
        self._skip()
        if not self._text.startswith("(", self._at):
            if METRICS[name].is_per_label:
                self._fail(self._at, f"expected ( and a label: {name} is of one")
            return name, None
        self._at += 1
        self._skip()
        at = self._at
        label = self._label_text(name)
        self._skip()
        if not self._text.startswith(")", self._at):
            self._fail(self._at, "expected )")
        self._at += 1
        if not METRICS[name].is_per_label:
            if (name, label) != ("error_rate", KEPT):
                self._fail(at, f"{name} is of all decisions and takes no label")
            return name, None
        return name, self._resolve(label, at)

    def _label_text(self, name: str) -> str:
        if self._text.startswith('"', self._at):
            end = self._text.find('"', self._at + 1)
            if end < 0:
                self._fail(self._at, "this quote does not end")
            label = self._text[self._at + 1 : end]
            self._at = end + 1
            return label
        end = self._text.find(")", self._at)
        if end < 0:
            self._fail(len(self._text), "expected )")
        label = self._text[self._at : end].rstrip()
        if not label:
            self._fail(self._at, f"expected a label of {name}, or {STAR}")
        self._at += len(label)
        return label

    def _resolve(self, label: str, at: int) -> str:
        """The id of a label named by its id or its name."""
        ids = [known.id for known in self._labels]
        if label == STAR or label in ids:
            return label
        named = [known.id for known in self._labels if known.name == label]
        if len(named) == 1:
            return named[0]
        if named:
            self._fail(at, f"{len(named)} labels are named {label!r}: {', '.join(named[:SHOWN])}; give an id")
        words = dict.fromkeys([*ids, *(known.name for known in self._labels)])
        lower = {word.lower(): word for word in words}
        near = [lower[word] for word in difflib.get_close_matches(label.lower(), lower, n=3)]
        few = ", ".join(ids[:SHOWN]) + (f", ... ({len(ids):,} in all)" if len(ids) > SHOWN else "")
        hint = f"did you mean {' or '.join(near)}?" if near else f"the labels are {few}"
        return self._fail(at, f"the model has no label {label!r}; {hint}")

    def _number(self, what: str, *, most: float | None = 1.0) -> float:
        self._skip()
        at, text = self._at, self._peek(_NUMBER)
        between = f"between 0 and {most:g}, both excluded" if most is not None else "above 0"
        if not text:
            self._fail(at, f"expected {what} {between}")
        self._at += len(text)
        value = float(text)
        if not 0 < value < (float("inf") if most is None else most):
            self._fail(at, f"expected {what} {between}, not {text}")
        return value

    def _peek(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        return found[0] if found else ""

    def _skip(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _fail(self, at: int, what: str) -> NoReturn:
        line = re.sub(r"\s", " ", self._text)
        raise ConfigError(
            f"the KPI does not parse at column {at + 1}: {what}\n    {line}\n    {' ' * at}^",
            expected=grammar(),
            fix="correct it there",
        )


def _side(op: str) -> str:
    return "below" if op == ">=" else "above"


def _default(constraints: Sequence[Constraint]) -> Objective:
    """The most found of the labels that are named, or the most decided."""
    labels = tuple(dict.fromkeys(constraint.label for constraint in constraints if constraint.label is not None))
    if not labels:
        return Objective("coverage", (), True)
    return Objective("recall", (STAR,) if STAR in labels else labels, True)
