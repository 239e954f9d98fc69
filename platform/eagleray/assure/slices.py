"""Slices: the figures of parts of the images (of each site, device, patient) with their intervals, small ones marked.

The slices of a column part the images: every image is in exactly one, those without a value in one of their own. Few
images say little, so a slice below a minimum is marked and not judged. Of the others it is asked whether the share that
is right really lies apart from that of all the other images: by an interval of the difference, drawn together and
widened for the number of slices that are looked at (Bonferroni).

Refuses a column of very many values (a file name, a time): its slices would be single images.

Example:
    >>> slicing = slice_by("site", sites, answers, Resampling(len(sites)))
    >>> slicing.slices[0].value, slicing.slices[0].metrics["top1"].text
    ('north', '0.896 (0.856 to 0.932)')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eagleray.core.errors import ConfigError
from eagleray.vision import metrics
from eagleray.vision.bootstrap import Estimate, Float32, Float64, Resampling, estimate
from eagleray.vision.metrics import Answers

MINIMUM = 30  # below it a 95 % interval of a share near 0.9 is wider than 0.2 (Clopper-Pearson)
MOST_VALUES = 100
NO_VALUE = ""  # the slice of the images that have none


@dataclass(frozen=True)
class Slice:
    """The images that share one value of a column.

    Attributes:
        value: The value; NO_VALUE for those without one.
        num_images: How many.
        units: What is drawn in its resamples, how many: images, or groups.
        num_classes: Classes that occur in it: means over classes are over these.
        is_small: Fewer units than the minimum: not judged.
        metrics: Every figure with its interval.
        gap: Share that is right here minus that of all other images; without an interval where either are too few.
    """

    value: str
    num_images: int
    units: int
    num_classes: int
    is_small: bool
    metrics: Mapping[str, Estimate]
    gap: Estimate

    @property
    def is_lower(self) -> bool:
        """Whether it is really worse than the other images; never said of a small slice."""
        return not self.is_small and self.gap.high is not None and self.gap.high < 0

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        head = {"value": self.value, "n": self.num_images, "units": self.units, "num_classes": self.num_classes}
        told = {"is_small": self.is_small, "is_lower": self.is_lower, "gap": self.gap.to_json()}
        return {**head, **told, **{name: figure.to_json() for name, figure in self.metrics.items()}}


@dataclass(frozen=True)
class Slicing:
    """The slices of one column, most images first.

    Attributes:
        column: Its name.
        slices: One a value.
        minimum: Fewest units of a slice that is judged.
        level: Of the intervals of ``gap``: corrected for the number of slices.
    """

    column: str
    slices: tuple[Slice, ...]
    minimum: int
    level: float

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "minimum": self.minimum,
            "gap_level": round(self.level, 6),
            "slices": [part.to_json() for part in self.slices],
        }


def slice_by(
    column: str, values: Sequence[str], answers: Answers, resampling: Resampling, *, minimum: int = MINIMUM
) -> Slicing:
    """Measures each slice of a column.

    Args:
        column: Its name.
        values: Of each of the N images; NO_VALUE where there is none.
        answers: N images.
        resampling: Of these images.
        minimum: Fewest units of a slice that is judged.

    Raises:
        ConfigError: The column has more than MOST_VALUES values.
    """
    names, codes = np.unique(np.array(values, object), return_inverse=True)
    if len(names) > MOST_VALUES:
        raise ConfigError(
            f"the column {column!r} has {len(names):,} values on {len(values):,} images",
            expected=f"at most {MOST_VALUES} values: a slice is a site, a device, a batch number, not a single image",
            fix="name another column with --by",
        )
    level = 1 - (1 - resampling.level) / max(1, len(names))
    gaps = _gaps(codes, len(names), answers, replace(resampling, level=level))
    slices = [
        _measured(str(name), codes == code, answers, resampling, minimum, gaps[code]) for code, name in enumerate(names)
    ]
    ranked = sorted(slices, key=lambda part: (-part.num_images, part.value))
    return Slicing(column, tuple(ranked), minimum, level)


def _measured(
    value: str,
    mask: npt.NDArray[np.bool_],
    answers: Answers,
    resampling: Resampling,
    minimum: int,
    gap: Estimate,
) -> Slice:
    part = answers.subset(mask)
    groups = None
    if resampling.groups is not None:
        groups = np.unique(resampling.groups[mask], return_inverse=True)[1].astype(np.int64)
    own = replace(resampling, num_images=int(mask.sum()), groups=groups)
    found = metrics.measure(part, own)
    is_small = own.units < minimum
    if is_small or resampling.units - own.units < minimum:  # groups may stand on both sides: then there are even more
        gap = Estimate(gap.value)
    return Slice(value, own.num_images, own.units, int((found.support > 0).sum()), is_small, found.scalars, gap)


def _gaps(codes: npt.NDArray[np.int64], count: int, answers: Answers, resampling: Resampling) -> list[Estimate]:
    """For each slice, the share right in it minus that in all other images, both of the same resamples."""
    from scipy.sparse import csr_matrix

    order = np.arange(len(codes))
    members = csr_matrix((np.ones(len(codes), np.float32), (codes, order)), shape=(count, len(codes)))
    hits = csr_matrix((answers.right.astype(np.float32), (codes, order)), shape=(count, len(codes)))

    def statistic(weights: Float32) -> dict[str, Float64]:
        inside, right = (np.asarray(matrix @ weights, np.float64) for matrix in (members, hits))
        outside, right_outside = inside.sum(axis=0) - inside, right.sum(axis=0) - right
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"gap": right / inside - right_outside / outside}

    found = estimate(statistic, resampling, rows=count)["gap"]
    return found if isinstance(found, list) else [found]
