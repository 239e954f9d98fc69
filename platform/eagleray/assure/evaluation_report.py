"""The Report of an evaluation: the figures with their intervals, then where they come from: classes, mistakes, surety.

Example:
    >>> report = evaluation_report(found, About(title="lite0 on photos", created="2026-01-31T12:00:00Z"))
    >>> report.verdict.text
    'top-1 0.896 (0.856 to 0.932) on 250 images'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from eagleray.assure import report as blocks
from eagleray.assure.evaluation import Evaluation, Mistake
from eagleray.assure.phrases import count, file_name, share
from eagleray.assure.report import Report
from eagleray.vision.bootstrap import Estimate

MOST_CELLS = 40  # classes of a heatmap: more cells cannot be read
MOST_CONFUSIONS = 20
MOST_BARS = 30
MOST_ROWS = 200  # of the table of classes: the weakest; metrics.json has all
FOLDED_FROM = 40  # rows
FEWEST_IN_BIN = 5  # answers behind a point of the reliability diagram: the share of fewer is mostly chance

NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "F1, macro",
    "f1_weighted": "F1, weighted",
    "f1_micro": "F1, micro",
    "exact_match": "exact match",
    "precision_macro": "precision, macro",
    "recall_macro": "recall, macro",
    "map": "mAP",
    "roc_auc": "ROC-AUC",
    "ece": "ECE",
}
MEANINGS = {
    "top1": "the first answer is right",
    "top5": "the truth is among the first five answers",
    "balanced_accuracy": "mean recall over classes: small classes count as much as large ones",
    "f1_macro": "mean over classes of the harmonic mean of precision and recall",
    "f1_weighted": "the same, classes weighted by their images",
    "f1_micro": "of all (image, label) pairs together",
    "exact_match": "every label of the image is right",
    "precision_macro": "of what is answered with a class, how much is right; mean over classes",
    "recall_macro": "of a class, how much is found; mean over classes",
    "map": "area under the precision-recall curve, mean over classes",
    "roc_auc": "a random image of a class scores above a random other one; mean over classes",
    "ece": "how far stated probabilities are from observed shares; 0 is perfect",
}
MULTI_MEANINGS = {
    "top1": "the first answer is one of the labels",
    "top5": "one of the first five answers is one of the labels",
    "balanced_accuracy": "mean over classes of (recall + specificity) / 2",
}
FIRST = ("top1", "top5", "balanced_accuracy", "f1_macro", "roc_auc", "ece")
FIRST_MULTI = ("map", "f1_macro", "f1_micro", "exact_match", "roc_auc", "ece")


@dataclass(frozen=True)
class About:
    """What the figures are about.

    Attributes:
        title: Heading.
        created: ISO 8601, UTC.
        subtitle: Which data, which model.
        where: Completes "on 250 images", e.g. "of the split test".
        uris: Where each image is, in the order of the answers; empty shows no pictures.
        truths: Label names of each image, in the same order.
        facts: Name and value of what was evaluated.
        warnings: Sentences that a reader must see first (a leak that was allowed).
        splits: Split names, and images of each class (C, S) int64 in each; of the model's C classes.
        digests: Name to SHA-256.
        command: How to repeat it.
        findings: Blocks that follow the figures: a comparison, slices.
        costs: Blocks on what scoring costs.
    """

    title: str
    created: str
    subtitle: str = ""
    where: str = ""
    uris: Sequence[str] = ()
    truths: Sequence[Sequence[str]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    splits: tuple[Sequence[str], npt.NDArray[np.int64]] | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    findings: Sequence[blocks.Block] = ()
    costs: Sequence[blocks.Block] = ()


def evaluation_report(found: Evaluation, about: About) -> Report:
    """The Report.

    Args:
        found: The evaluation.
        about: What it is about.
    """
    lead = "map" if found.is_multi_label else "top1"
    images = f"{count(found.num_images, 'image')} {about.where}".strip()
    return Report(
        title=about.title,
        subtitle=about.subtitle,
        created=about.created,
        verdict=blocks.Verdict(f"{NAMES[lead]} {found.metrics.scalars[lead].text} on {images}"),
        blocks=tuple(_blocks(found, about)),
    )


def _blocks(found: Evaluation, about: About) -> Iterator[blocks.Block]:
    if about.warnings:
        yield blocks.Text(tuple(about.warnings), "Read this first")
    yield _totals(found)
    yield _figures(found)
    yield from about.findings
    yield from _confusion(found)
    yield from _charts(found)
    yield from _mistakes(found, about)
    yield _classes(found)
    if about.splits is not None:
        yield _split_table(found, *about.splits)
    yield from about.costs
    if about.facts:
        yield blocks.Table("What was evaluated", ("", ""), tuple((name, text) for name, text in about.facts.items()))
    if about.command:
        note = "The same command on this folder does nothing new; another model or split is evaluated anew."
        yield blocks.Code("How to repeat it", about.command, note)
    if about.digests:
        rows = tuple((name, digest) for name, digest in about.digests.items())
        yield blocks.Table("Digests", ("", ""), rows, "SHA-256: the same digest is the same thing.", (1,))


def _totals(found: Evaluation) -> blocks.Totals:
    items = [
        blocks.Total("images", found.num_images),
        blocks.Total("classes", len(found.present), _absent(found)),
    ]
    for name in FIRST_MULTI if found.is_multi_label else FIRST:
        figure = found.metrics.scalars[name]
        items.append(blocks.Total(NAMES[name], _text(figure.value), _interval(figure)))
    return blocks.Totals(tuple(items))


def _absent(found: Evaluation) -> str:
    return f"of {len(found.labels):,}" if len(found.labels) > len(found.present) else ""


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(figure: Estimate) -> str:
    return "" if figure.low is None or figure.high is None else f"{figure.low:.3f} to {figure.high:.3f}"


def _figures(found: Evaluation) -> blocks.Table:
    meanings = {**MEANINGS, **(MULTI_MEANINGS if found.is_multi_label else {})}
    way = found.resampling
    drawn = count(way.units, "image" if way.groups is None else "group")
    note = (
        f"Intervals hold {100 * way.level:g} % of {way.resamples:,} resamples of {drawn} (percentile bootstrap, seed "
        f"{way.seed})." if way.resamples and way.units > 1 else "No intervals were asked for."
    )  # fmt: skip
    rows = tuple(
        (NAMES[name], figure.value, figure.low, figure.high, meanings[name])
        for name, figure in found.metrics.scalars.items()
    )
    return blocks.Table("Metrics", ("metric", "value", "low", "high", "meaning"), rows, note, decimals=3)


def _name(found: Evaluation, index: int) -> str:
    return found.labels[index].name or found.labels[index].id


def _confusion(found: Evaluation) -> Iterator[blocks.Block]:
    if found.is_multi_label:
        return
    shown = sorted({index for true, said, _ in found.confusions for index in (true, said)})
    if len(shown) <= MOST_CELLS:
        place = {index: at for at, index in enumerate(shown)}
        counts = np.zeros((len(shown), len(shown)), np.int64)
        for true, said, images in found.confusions:
            counts[place[true], place[said]] = images
        names = tuple(_name(found, index) for index in shown)
        note = "Images of each class (a row) by the answer (a column); the stronger the colour, the larger its share."
        rows = tuple(tuple(row) for row in counts.tolist())
        yield blocks.Heatmap("Confusion", names, names, rows, "truth", "answer", note)
    wrong = [row for row in found.confusions if row[0] != row[1]]
    if not wrong:
        return
    support = found.metrics.support
    table = tuple(
        (_name(found, true), _name(found, said), images, share(images, int(support[true])))
        for true, said, images in wrong[:MOST_CONFUSIONS]
    )
    rest = len(wrong) - len(table)
    note = f"{rest:,} more pairs in metrics.json." if rest else ""
    heads = ("truth", "answer", "images", "of the class")
    yield blocks.Table("Most frequent confusions", heads, table, note, is_folded=len(shown) <= MOST_CELLS)


def _charts(found: Evaluation) -> Iterator[blocks.Block]:
    support = {index: int(found.metrics.support[index]) for index in found.present}
    if len(set(support.values())) > 1:
        ranked = sorted(support, key=lambda index: (-support[index], index))
        bars = tuple(
            blocks.Bar(_name(found, index), support[index], found.labels[index].id) for index in ranked[:MOST_BARS]
        )
        more = f"The {MOST_BARS} largest of {len(ranked):,} classes." if len(ranked) > MOST_BARS else ""
        yield blocks.Bars("Images of each class", bars, "images", float(found.num_images), more)
    r = found.reliability
    points = tuple(
        (round(float(x), 5), round(float(y), 5))
        for x, y, n in zip(r.confidence, r.accuracy, r.counts, strict=True)
        if n >= min(FEWEST_IN_BIN, int(r.counts.max()))
    )
    what = "probabilities of all labels" if found.is_multi_label else "the probability of the answer"
    yield blocks.Curves(
        "Reliability",
        (blocks.Curve("observed", points),),
        x_label="probability that the model states",
        y_label="share that is right",
        is_unit=True,
        has_diagonal=True,
        has_marks=True,
        note=f"In {len(r.counts)} bins of {what}, those of {FEWEST_IN_BIN} or more; on the dotted line stated and "
        "observed agree, below it the model is too sure.",
    )
    yield blocks.Histogram(
        "How sure the model was",
        edges=tuple(round(float(edge), 6) for edge in r.edges),
        counts=tuple(r.counts.tolist()),
        x_label="probability that the model states",
        y_label="labels" if found.is_multi_label else "images",
    )
    if found.curves:
        lowest = len(found.present) > len(found.curves)
        yield blocks.Curves(
            "Precision and recall",
            tuple(blocks.Curve(name, line) for name, line in found.curves),
            x_label="recall",
            y_label="precision",
            is_unit=True,
            note="The highest precision at that recall or a higher one."
            + (" Of single classes, those with the lowest area." if lowest else ""),
        )


def _mistakes(found: Evaluation, about: About) -> Iterator[blocks.Block]:
    if not about.uris or not found.mistakes:
        return
    tiles = tuple(_tile(found, about, mistake) for mistake in found.mistakes)
    yield blocks.Sheet("Most confidently wrong", tiles, "Look here first for wrong labels and for classes that blur.")


def _tile(found: Evaluation, about: About, mistake: Mistake) -> blocks.Tile:
    names = ", ".join(about.truths[mistake.image])
    truth = f"is {names}" if names else "has no label"
    said = _name(found, mistake.label)
    if found.is_multi_label and mistake.probability < found.threshold:
        said = f"not {said}"
    uri = about.uris[mistake.image]
    return blocks.Tile(uri, (said, truth), file_name(uri), tag=f"{mistake.probability:.3f}")


def _classes(found: Evaluation) -> blocks.Table:
    per_class = found.metrics.per_class
    weakest = sorted(found.present, key=lambda index: (per_class["f1"][index].value or 0.0, index))
    rows = tuple(
        (
            _name(found, index),
            int(found.metrics.support[index]),
            int(found.metrics.answered[index]),
            *(per_class[key][index].value for key in ("precision", "recall", "f1", "average_precision", "roc_auc")),
        )
        for index in weakest[:MOST_ROWS]
    )
    note = "Weakest first; intervals are in metrics.json."
    if len(weakest) > MOST_ROWS:
        note = f"The {MOST_ROWS} weakest of {len(weakest):,}; all of them, with intervals, are in metrics.json."
    heads = ("class", "images", "answered", "precision", "recall", "F1", "AP", "ROC-AUC")
    return blocks.Table("Classes", heads, rows, note, is_folded=len(rows) > FOLDED_FROM, decimals=3)


def _split_table(found: Evaluation, names: Sequence[str], counts: npt.NDArray[np.int64]) -> blocks.Table:
    rows: list[tuple[blocks.Cell, ...]] = [
        (_name(found, index), *(int(number) for number in counts[index]))
        for index in np.flatnonzero(counts.sum(axis=1)).tolist()
    ]
    rows.append(("all classes", *(int(number) for number in counts.sum(axis=0))))
    return blocks.Table("Labels in each split", ("class", *names), tuple(rows), is_folded=len(rows) > FOLDED_FROM // 2)
