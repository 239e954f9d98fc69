"""The page of a release: the trade-off drawn, the table of steps, the gates, the classes, the cost, how it was made.

Example:
    >>> release_report(rows, About(title="Release of trash", created="2026-01-31T12:00:00Z")).verdict.is_good
    True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from eagleray.assure import report as blocks
from eagleray.assure.phrases import duration, figure
from eagleray.assure.release_table import Limits, StepRow
from eagleray.assure.report import Report
from eagleray.vision.bootstrap import Estimate

MOST_CLASSES = 30
FOLDED_FROM = 12


@dataclass(frozen=True)
class About:
    """What the table is about.

    Attributes:
        title, subtitle, created: As in Report.
        limits: What was allowed.
        labels: Label id to the name that is shown.
        notes: Sentences to read first: what was dropped and why.
        facts: Name and value of what was released.
        costs: Blocks on what a million images cost.
        digests: Name to SHA-256.
        command: How to repeat it.
    """

    title: str
    created: str
    subtitle: str = ""
    limits: Limits = field(default_factory=Limits)
    labels: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    costs: Sequence[blocks.Block] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def release_report(rows: Sequence[StepRow], about: About) -> Report:
    """The Report.

    Args:
        rows: The parent, then each step that was made, in order.
        about: What it is about.
    """
    return Report(
        title=about.title,
        subtitle=about.subtitle,
        created=about.created,
        verdict=verdict(rows),
        blocks=tuple(_blocks(rows, about)),
    )


def verdict(rows: Sequence[StepRow]) -> blocks.Verdict:
    """The line that a reader takes away."""
    parent, last = rows[0], rows[-1]
    failed = [f"{row.name}: {gate.seen}" for row in rows for gate in row.gates if not gate.is_passed]
    if failed:
        return blocks.Verdict(f"stopped, nothing is published: {failed[0]}", is_good=False)
    if last is parent:
        return blocks.Verdict("nothing was asked for", is_good=None)
    change = 100 * ((last.change.value if last.change else None) or 0.0)
    size = parent.model_bytes / last.model_bytes if last.model_bytes else 1.0
    speed = f"{last.speedup:.2f} times as fast" if last.speedup else "of unknown speed"
    return blocks.Verdict(f"{speed}, {size:.1f} times as small, {change:+.2f} points of accuracy", is_good=True)


def _blocks(rows: Sequence[StepRow], about: About) -> Iterator[blocks.Block]:
    if about.notes:
        yield blocks.Text(tuple(about.notes), "Read this first")
    yield _totals(rows)
    yield _trade(rows, about)
    yield _speeds(rows)
    yield _losses(rows)
    yield _gates(rows)
    yield from _classes(rows, about)
    yield from about.costs
    if about.facts:
        yield blocks.Table("What was released", ("", ""), tuple(about.facts.items()))
    if about.command:
        yield blocks.Code("How to repeat it", about.command, "The same command does only what is missing.")
    if about.digests:
        note = "SHA-256: the same digest is the same thing."
        yield blocks.Table("Digests", ("", ""), tuple(about.digests.items()), note, (1,))


def _totals(rows: Sequence[StepRow]) -> blocks.Totals:
    parent, last = rows[0], rows[-1]
    items = [
        blocks.Total("accuracy", _share(last.accuracy), f"parent {_share(parent.accuracy)}"),
        blocks.Total("images/s", figure(last.images_per_s), f"parent {figure(parent.images_per_s)}"),
        blocks.Total("ms at batch 1", figure(last.latency_ms_p50), f"parent {figure(parent.latency_ms_p50)}"),
        blocks.Total("MB", figure(last.model_bytes / 1e6), f"parent {figure(parent.model_bytes / 1e6)}"),
    ]
    if last.agreement is not None:
        items.append(blocks.Total("same answer", _share(last.agreement), "as the parent"))
    return blocks.Totals(tuple(items))


def _trade(rows: Sequence[StepRow], about: About) -> blocks.Scatter:
    parent = rows[0]
    marks = tuple(
        blocks.Mark(
            f"{row.name}, {row.engine}",
            row.latency_ms_p50,
            row.accuracy.value or 0.0,
            row.accuracy.low,
            row.accuracy.high,
            None if row is parent else row.is_passed,
        )
        for row in rows
    )
    least = (parent.accuracy.value or 0.0) - about.limits.max_drop_points / 100
    return blocks.Scatter(
        "What is given up for what",
        marks,
        x_label="ms for one image, p50",
        y_label="share right",
        reference=least,
        reference_label=f"gate: {about.limits.max_drop_points:g} points below the parent",
        note="Each on its best engine; bars are intervals of each model alone. Whether a difference is real is judged "
        "on the pairs, in the table.",
    )


def _speeds(rows: Sequence[StepRow]) -> blocks.Table:
    heads = ("step", "MB", "M parameters", "M MACs", "p50 ms", "p95 ms", "images/s", "at batch", "speed-up", "on")
    cells = tuple(
        (
            row.name,
            round(row.model_bytes / 1e6, 2),
            None if row.parameters is None else round(row.parameters / 1e6, 2),
            None if row.macs is None else round(row.macs / 1e6),
            row.latency_ms_p50,
            row.latency_ms_p95,
            row.images_per_s,
            row.best_batch,
            row.speedup,
            f"{row.engine}, {row.precision}",
        )
        for row in rows
    )
    note = (
        "Latency at batch 1; images a second at the best batch; speed-up is paired: measured in turns with the parent "
        "on its own best engine."
    )
    return blocks.Table("Size and speed after each step", heads, cells, note)


def _losses(rows: Sequence[StepRow]) -> blocks.Table:
    heads = ("step", "share right", "change, points", "same answer", "class that loses most, points")
    cells = tuple(
        (
            row.name,
            row.accuracy.text,
            "" if row.change is None else points(row.change),
            "" if row.agreement is None else _share(row.agreement),
            "" if row.worst_class is None else f"{row.worst_class[0]} {points(row.worst_class[1])}",
        )
        for row in rows
    )
    note = "Change, agreement and classes are against the parent, on the same test images, with paired intervals."
    return blocks.Table("Accuracy after each step", heads, cells, note)


def points(change: Estimate) -> str:
    """A difference of shares in points: ``-0.40 (-1.60 to 0.80)``."""
    if change.value is None:
        return "–"
    bounds = ""
    if change.low is not None and change.high is not None:
        bounds = f" ({100 * change.low:.2f} to {100 * change.high:.2f})"
    return f"{100 * change.value:+.2f}{bounds}"


def _share(value: Estimate) -> str:
    return "–" if value.value is None else f"{value.value:.3f}"


def _gates(rows: Sequence[StepRow]) -> blocks.Table:
    cells = tuple(
        (row.name, gate.name, f"{'passed' if gate.is_passed else 'FAILED'}: {gate.seen}", gate.allowed)
        for row in rows
        for gate in row.gates
    )
    made = ", ".join(f"{row.name} in {duration(row.seconds)}" for row in rows[1:])
    note = f"Made: {made}." if made else ""
    return blocks.Table("Gates", ("step", "gate", "seen", "allowed"), cells, note)


def _classes(rows: Sequence[StepRow], about: About) -> Iterator[blocks.Block]:
    last = rows[-1]
    if not last.recalls:
        return
    ranked = sorted(last.recalls.items(), key=lambda item: (item[1].value or 0.0, item[0]))[:MOST_CLASSES]
    shown = tuple(
        blocks.Interval(
            about.labels.get(label, label),
            100 * (change.value or 0.0),
            None if change.low is None else 100 * change.low,
            None if change.high is None else 100 * change.high,
        )
        for label, change in ranked
    )
    more = f" The {MOST_CLASSES} that lose most of {len(last.recalls):,}." if len(last.recalls) > MOST_CLASSES else ""
    yield blocks.Intervals(
        f"Recall of each class, {last.name} minus parent",
        shown,
        x_label="points",
        reference=0.0,
        reference_label="no change",
        decimals=1,
        note=f"Paired on the same images.{more}",
    )
