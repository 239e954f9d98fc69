"""The slices of an evaluation as blocks of its page: for each column a forest of intervals and a table of the figures.

Example:
    >>> blocks = list(slices_blocks(slicings, "top1", whole))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eagleray.assure import report as blocks
from eagleray.assure.evaluation_report import NAMES
from eagleray.assure.phrases import count
from eagleray.assure.slices import NO_VALUE, Slice, Slicing
from eagleray.vision.bootstrap import Estimate

COLUMNS = ("balanced_accuracy", "f1_macro", "roc_auc", "ece")
COLUMNS_MULTI = ("f1_macro", "f1_micro", "roc_auc", "ece")
MOST_DRAWN = 40  # rows of a forest: more are read in the table


def slices_blocks(slicings: Sequence[Slicing], lead: str, whole: Estimate) -> Iterator[blocks.Block]:
    """The blocks.

    Args:
        slicings: One a column.
        lead: The figure that is drawn.
        whole: It, of all images.
    """
    columns = COLUMNS_MULTI if lead == "map" else COLUMNS
    for slicing in slicings:
        yield _forest(slicing, lead, whole)
        yield _table(slicing, lead, columns)


def _name(part: Slice) -> str:
    return "(no value)" if part.value == NO_VALUE else part.value


def _remark(part: Slice) -> str:
    if part.is_small:
        return "too few to judge"
    return "lower than the rest" if part.is_lower else ""


def _forest(slicing: Slicing, lead: str, whole: Estimate) -> blocks.Intervals:
    rows = []
    for part in slicing.slices[:MOST_DRAWN]:
        figure = part.metrics[lead]
        if figure.value is None:
            continue
        note = count(part.num_images, "image") + (", few" if part.is_small else "")
        rows.append(blocks.Interval(_name(part), figure.value, figure.low, figure.high, note, part.is_small))
    lower = [_name(part) for part in slicing.slices if part.is_lower]
    note = f"Really lower than the rest: {', '.join(lower)}." if lower else "No slice is really lower than the rest."
    if len(slicing.slices) > MOST_DRAWN:
        note += f" The {MOST_DRAWN} largest of {len(slicing.slices):,} slices are drawn."
    return blocks.Intervals(
        f"By {slicing.column}",
        tuple(rows),
        x_label=NAMES[lead],
        reference=whole.value,
        reference_label=f"all images, {whole.value:.3f}" if whole.value is not None else "",
        note=note,
    )


def _table(slicing: Slicing, lead: str, columns: Sequence[str]) -> blocks.Table:
    rows = tuple(
        (
            _name(part),
            part.num_images,
            part.num_classes,
            *(getattr(part.metrics[lead], bound) for bound in ("value", "low", "high")),
            *(part.metrics[name].value for name in columns),
            _remark(part),
        )
        for part in slicing.slices
    )
    heads = (slicing.column, "images", "classes", NAMES[lead], "low", "high", *(NAMES[name] for name in columns), "")
    note = (
        f"Means are over the classes of the slice. Below {slicing.minimum:,} independent images or groups a slice is "
        f"marked and not judged. 'Lower' is said where the {100 * slicing.level:.4g} % interval of the difference in "
        "the share that is right, to all other images, lies below zero (the level allows for the number of slices). "
        "All figures with their intervals are in metrics.json."
    )
    return blocks.Table(f"Figures by {slicing.column}", heads, rows, note, is_folded=len(rows) > MOST_DRAWN, decimals=3)
