"""The Report of a certificate: what holds with which confidence, what it costs, and how precision trades with recall.

Example:
    >>> certificate_report(made, About(title="Certificate", created="2026-01-31T12:00:00Z")).verdict.text
    'precision(crack)>=0.95@0.95 holds: lower bound 0.953 on 93 decisions'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eagleray.assure import binomial
from eagleray.assure import report as blocks
from eagleray.assure.certificate import LEVEL, Certificate, shortfall
from eagleray.assure.decision_metrics import METRICS, Cells
from eagleray.assure.phrases import count, share
from eagleray.assure.report import Report
from eagleray.vision.bootstrap import Estimate
from eagleray.vision.evidence import Claim

MOST_LABELS = 4  # with a curve of their own
MOST_CELLS = 30  # classes of the table of decisions
MOST_ROWS = 200


@dataclass(frozen=True)
class About:
    """What the certificate is about.

    Attributes:
        title: Heading.
        created: ISO 8601, UTC.
        subtitle: Which data, which model.
        unit: What is counted: ``image``, or ``group`` where one image stands for each.
        names: Label id to the name that a person reads.
        attempt: How many certifications on these images this folder has seen, this one too.
        training: What is known of the images that the model was trained on.
        facts: Name and value of what was used.
        digests: Name to SHA-256.
        command: How to repeat it.
    """

    title: str
    created: str
    subtitle: str = ""
    unit: str = "image"
    names: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 1
    training: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def certificate_report(made: Certificate, about: About) -> Report:
    """The Report.

    Args:
        made: The certificate, of a KPI that was met or not.
        about: What it is about.
    """
    return Report(
        title=about.title,
        subtitle=about.subtitle,
        created=about.created,
        verdict=blocks.Verdict(_verdict(made), made.is_met),
        blocks=tuple(_blocks(made, about)),
    )


def _verdict(made: Certificate) -> str:
    if not made.is_met:
        failed = [claim.kpi for claim in made.claims if not claim.is_met]
        return f"not attainable with {len(made.certification):,} images: {', '.join(failed[:3])}"
    if not made.claims:
        return f"thresholds of least cost: {made.cost:.4g} an image"
    unit = "decision" if _metric(made.claims[0]) in ("precision", "error_rate") else "image"
    first, more = made.claims[0], len(made.claims) - 1
    side = "lower" if METRICS[_metric(first)].op == ">=" else "upper"
    rest = f", and {count(more, 'other constraint')}" if more else ""
    return f"{first.kpi} holds: {side} bound {first.bound:.3f} on {count(first.num_trials, unit)}{rest}"


def _metric(claim: Claim) -> str:
    return next(name for name in METRICS if claim.kpi.startswith((f"{name}(", f"{name}>", f"{name}<")))


def _blocks(made: Certificate, about: About) -> Iterator[blocks.Block]:
    yield _totals(made, about)
    if made.claims:
        yield _claims(made, about)
    if not made.is_met:
        yield _missing(made)
    yield _costs(made, about)
    yield from _curves(made, about)
    yield from _decisions(made, about)
    yield from _beside(made)
    yield _rests_on(made, about)
    if about.facts:
        yield blocks.Table("What was certified", ("", ""), tuple(about.facts.items()))
    if about.command:
        yield blocks.Code("How to repeat it", about.command, "The same command does nothing new.")
    if about.digests:
        note = "SHA-256: the same digest is the same thing."
        yield blocks.Table("Digests", ("", ""), tuple(about.digests.items()), note, (1,))


def _totals(made: Certificate, about: About) -> blocks.Totals:
    items = [
        blocks.Total(f"{about.unit}s that certify", len(made.certification), "chose nothing"),
        blocks.Total(f"{about.unit}s that choose", len(made.selection), "prove nothing"),
    ]
    figures = made.figures(None)
    items += [
        blocks.Total("decided", _text(figures["coverage"].value), _interval(figures["coverage"])),
        blocks.Total("wrong of those", _text(figures["error_rate"].value), _interval(figures["error_rate"])),
    ]
    objective = made.found.step.objective
    if objective is not None:
        items.append(blocks.Total(made.task.kpi.objective.text, _text(objective)))
    return blocks.Totals(tuple(items))


def _claims(made: Certificate, about: About) -> blocks.Table:
    tested = count(len(made.found.steps), "policy was tested", "policies were tested")
    rows = tuple(
        (
            claim.kpi,
            "holds" if claim.is_met else "not shown",
            claim.num_trials,
            claim.num_successes,
            claim.value,
            claim.bound,
        )
        for claim in made.claims
    )
    note = (
        "Each bound is exact and one-sided, at the constraint's confidence. What is promised is the constraint: the "
        f"chance that a policy is published that breaks it is at most 1 - confidence. {tested} in an order that other "
        "images had fixed; that pays for the search."
    )
    return blocks.Table(
        "KPI", ("constraint", "", f"{about.unit}s", "of them", "observed", "bound"), rows, note, decimals=3
    )


def _missing(made: Certificate) -> blocks.Text:
    whole = len(made.certification) + len(made.selection)
    lines = []
    for claim in made.claims:
        if not claim.is_met:
            sentence, needed = shortfall(claim, num_images=len(made.certification))
            more = (
                "" if needed is None else f". About {int(needed * whole / len(made.certification)):,} labelled images"
            )
            lines.append(sentence + (f"{more} like these would do; there are {whole:,}." if more else "."))
    return blocks.Text(tuple(lines), "What is missing")


def _costs(made: Certificate, about: About) -> blocks.Table:
    rows: list[tuple[blocks.Cell, ...]] = []
    for label in made.labels[:MOST_ROWS]:
        figures, cells = made.figures(label), made.cells(label)
        threshold = max(made.policy.thresholds.get(label, 0.0), made.policy.floor)
        figure = figures["recall"]
        row = (_name(label, about), threshold, cells.true, cells.decided, figures["precision"].value, figure.value)
        rows.append((*row, figure.low, figure.high, cells.true - cells.hits))
    heads = ("label", "threshold", "true", "decided", "precision", "recall", "low", "high", "missed")
    note = (
        f"Recall with its exact {100 * LEVEL:g} % interval on the images that certify: what the claim costs. A "
        f"missed image is decided otherwise or goes to {made.policy.otherwise!r}."
    )
    return blocks.Table("What it costs", heads, tuple(rows), note, is_folded=len(rows) > 40, decimals=3)


def _curves(made: Certificate, about: About) -> Iterator[blocks.Block]:
    constrained = [label for label in made.task.kpi.labels if label in made.labels]
    for label in constrained[:MOST_LABELS]:
        sweep = made.sweep(label)
        own = made.policy.thresholds.get(label, 0.0)
        confidence = next((c.confidence for c in made.task.kpi.constraints if c.label == label), LEVEL)
        yield blocks.Curves(
            f"Precision and recall of {_name(label, about)} by its threshold",
            tuple(
                curve
                for curve in (
                    _curve("precision", sweep, lambda c: _rate(c.hits, c.decided)),
                    _curve("its lower bound", sweep, lambda c, level=confidence: _lower(c.hits, c.decided, level)),
                    _curve("recall", sweep, lambda c: _rate(c.hits, c.true)),
                )
                if curve.points
            ),
            x_label=f"threshold of {_name(label, about)}",
            y_label="share",
            is_unit=True,
            note=f"The policy's threshold is {own:.3f}. Bounds are at {confidence:g}, each for its own threshold: the "
            "lowest that one would pick by eye is picked by chance, too.",
        )
    if any(constraint.label is None for constraint in made.task.kpi.constraints) and not made.policy.thresholds:
        sweep = made.sweep(None)
        yield blocks.Curves(
            "Error rate and coverage by the floor",
            tuple(
                curve
                for curve in (
                    _curve("error rate of what is kept", sweep, lambda c: _rate(c.decided - c.hits, c.decided)),
                    _curve("its upper bound", sweep, lambda c: _upper(c.decided - c.hits, c.decided, LEVEL)),
                    _curve("coverage", sweep, lambda c: _rate(c.decided, c.total)),
                )
                if curve.points
            ),
            x_label="lowest probability of a decision",
            y_label="share",
            is_unit=True,
            note=f"The policy's floor is {made.policy.floor:.3f}; bounds at {LEVEL:g}, each for its own floor.",
        )


def _curve(name: str, sweep: Sequence[tuple[float, Cells]], value: object) -> blocks.Curve:
    points = [(threshold, value(cells)) for threshold, cells in sweep]  # type: ignore[operator]
    return blocks.Curve(name, tuple((round(x, 5), round(y, 5)) for x, y in points if y is not None))


def _rate(successes: int, trials: int) -> float | None:
    return successes / trials if trials else None


def _lower(successes: int, trials: int, level: float) -> float | None:
    return binomial.lower_bound(successes, trials, level) if trials else None


def _upper(successes: int, trials: int, level: float) -> float | None:
    return binomial.upper_bound(successes, trials, level) if trials else None


def _decisions(made: Certificate, about: About) -> Iterator[blocks.Block]:
    """Images of each class by their decision; of one label an image."""
    if made.is_multi_label:
        return
    truth = made.certification.truth.argmax(axis=1)
    size = len(made.task.label_ids)
    columns = np.where(made.said < 0, size, made.said)
    rows_at, columns_at = np.unique(truth).tolist(), np.unique(columns).tolist()
    if len(rows_at) > MOST_CELLS or len(columns_at) > MOST_CELLS:
        return
    counts = tuple(tuple(int(((truth == row) & (columns == column)).sum()) for column in columns_at) for row in rows_at)
    names = [_name(label, about) for label in made.task.label_ids] + [made.policy.otherwise]
    yield blocks.Heatmap(
        "Decisions",
        tuple(names[at] for at in rows_at),
        tuple(names[at] for at in columns_at),
        counts,
        "truth",
        "decision",
        "Of the images that certify, by the policy.",
    )


def _beside(made: Certificate) -> Iterator[blocks.Block]:
    found, sets = made.calibration, made.sets
    rows: list[tuple[blocks.Cell, ...]] = [
        ("temperature", found["temperature"], "1: probabilities are compared as the model gives them"),
        ("ECE without it", found["ece_before"], "how far stated probabilities are from observed shares"),
        ("ECE with it", found["ece_after"], "on images that did not fit it"),
    ]
    if made.cost is not None:
        rows.append(("cost of an image", made.cost, "by the costs that were set"))
    if sets is not None:
        rate = f"conformal sets (lac) that hold the truth of {100 - 100 * sets['error_rate']:g} % of images"
        rows.append((rate, sets["coverage"]["value"], "observed; they promise that share on average"))
        one = f"share of them with one label; their mean size is {sets['mean_size']:.2f}"
        rows.append(("", sets["one_label"] / len(made.certification), one))
    yield blocks.Table("Beside the decision", ("", "", ""), tuple(rows), is_folded=True, decimals=3)


def _rests_on(made: Certificate, about: About) -> blocks.Text:
    per_group = (
        "Images of one group are no independent evidence: one of each group, drawn blind, stands for it."
        if about.unit == "group"
        else "Each image counts as independent evidence: where several show one object, give their group column."
    )
    named = made.task.kpi.labels
    classes = (
        f" ({share(made.cells(named[0]).true, len(made.certification))} are {_name(named[0], about)})" if named else ""
    )
    return blocks.Text(
        (
            f"The claims hold for images drawn like those that certify{classes}: of the same source, in the same mix "
            "of classes. A rarer class has a lower precision at the same threshold.",
            per_group,
            "The images that chose the thresholds are others than those that certify them, divided by a hash that "
            "knows no label.",
            about.training,
            "The promise is for one certification. Who tries KPIs, seeds or models on the same images until one passes "
            "has searched without paying for it: "
            + (f"this is attempt {about.attempt} in this folder." if about.attempt > 1 else "take new images then."),
        ),
        "What it rests on",
    )


def _name(label: str, about: About) -> str:
    return about.names.get(label) or label


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(figure: Estimate) -> str:
    return "" if figure.low is None or figure.high is None else f"{figure.low:.3f} to {figure.high:.3f}"
