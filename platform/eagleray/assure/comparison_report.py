"""A comparison of two models as blocks of a page: what it means, the differences with their intervals, who is right.

Example:
    >>> blocks = list(comparison_blocks(found))
"""

from __future__ import annotations

from collections.abc import Iterator

from eagleray.assure import report as blocks
from eagleray.assure.comparison import Comparison
from eagleray.assure.evaluation_report import NAMES
from eagleray.vision.bootstrap import Estimate

LARGER_IS_WORSE = ("ece",)


def comparison_blocks(found: Comparison) -> Iterator[blocks.Block]:
    """The blocks."""
    first, second = found.names
    way = found.resampling
    drawn = "images" if way.groups is None else "groups"
    yield blocks.Text((found.sentence,), f"{second} compared with {first}")
    yield blocks.Intervals(
        f"What {second} changes",
        tuple(_row(name, figure) for name, figure in found.differences.items() if figure.value is not None),
        x_label="difference in points, above zero is higher",
        reference=0.0,
        reference_label="no difference",
        decimals=1,
        note=f"{second} minus {first} on the same images, {100 * way.level:g} % of {way.resamples:,} paired resamples "
        f"of {way.units:,} {drawn}. ECE is an error: there, lower is better.",
    )
    counts = {
        "both are right": found.both,
        f"only {first} is right": found.only_first,
        f"only {second} is right": found.only_second,
        "neither is right": found.neither,
    }
    rows = (
        *((what, f"{number:,}") for what, number in counts.items()),
        ("both give the same answer", found.agreement.text),
        ("McNemar's exact test, p", f"{found.p_value:.3g}"),
    )
    note = "The test looks at the images that only one of the two gets right, and takes them as independent."
    yield blocks.Table("Who is right", ("", ""), rows, note)


def _row(name: str, figure: Estimate) -> blocks.Interval:
    low, high = (None if bound is None else 100 * bound for bound in (figure.low, figure.high))
    note = "lower is better" if name in LARGER_IS_WORSE else ""
    return blocks.Interval(NAMES[name], 100 * (figure.value or 0.0), low, high, note)
