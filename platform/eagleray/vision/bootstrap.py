"""Percentile bootstrap of statistics that are functions of image weights: no score is ever copied.

A resample of N images with replacement is a vector of N counts. A statistic that takes such weights (N, B) gives its
values of B resamples at once, from sums that were made once: 1,000 resamples of 50,000 images and 1,000 classes are
products of sparse matrices. Where a group column is given, whole groups are drawn, since shots of one object are no
independent evidence.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval); Davison and
Hinkley, Bootstrap Methods and their Application, 1997, section 3.8 (whole clusters are drawn).

Example:
    >>> correct = np.array([1.0, 1.0, 0.0])
    >>> estimate(lambda w: {"top1": correct @ w / w.sum(0)}, Resampling(num_images=3))["top1"].value
    0.6666666666666666
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Statistic = Callable[[Float32], Mapping[str, Float64]]

CHUNK_WEIGHTS = 1 << 22  # weights of resamples held at once: 16 MiB of float32


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; None where it is not defined (no such class, one single group)."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}

    @property
    def text(self) -> str:
        """``0.896 (0.856 to 0.932)``, or a dash."""
        if self.value is None:
            return "–"
        bounds = f" ({self.low:.3f} to {self.high:.3f})" if self.low is not None and self.high is not None else ""
        return f"{self.value:.3f}{bounds}"


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        num_images: N.
        resamples: How many; 0 makes no intervals.
        seed: Of the draws.
        level: Share of the resamples that an interval holds.
        groups: int64 (N,) from 0: what is drawn as a whole; None draws images.
    """

    num_images: int
    resamples: int = 1000
    seed: int = 0
    level: float = 0.95
    groups: npt.NDArray[np.int64] | None = None

    @property
    def units(self) -> int:
        """What is drawn, how many there are of it."""
        return self.num_images if self.groups is None else int(self.groups.max(initial=-1)) + 1

    def weights(self, chunk: int) -> Iterator[Float32]:
        """float32 (N, <= chunk): how often each image stands in each resample; the same for every chunk size."""
        generator, units = np.random.default_rng(self.seed), self.units
        for start in range(0, self.resamples, chunk):
            counts = np.empty((min(chunk, self.resamples - start), units), np.float32)
            for row in counts:
                row[:] = np.bincount(generator.integers(0, units, units), minlength=units)
            whole = counts if self.groups is None else counts[:, self.groups]
            yield np.ascontiguousarray(whole.T)


def estimate(statistic: Statistic, resampling: Resampling, *, rows: int = 0) -> dict[str, Estimate | list[Estimate]]:
    """The values of a statistic and their intervals.

    Args:
        statistic: Weights float32 (N, B) to arrays (B,), or (C, B) for a figure of each class; NaN where undefined.
        resampling: Of the images.
        rows: Rows of the largest array that the statistic makes, where they are more than N.

    Returns:
        An Estimate, or one a class, by name.
    """
    ones = np.ones((resampling.num_images, 1), np.float32)
    values = {name: array[..., 0] for name, array in statistic(ones).items()}
    chunk = int(np.clip(CHUNK_WEIGHTS // max(1, resampling.num_images, rows), 1, 128))
    drawn: dict[str, list[Float64]] = {name: [] for name in values}
    if resampling.units > 1:  # drawing one unit again and again says nothing
        for weights in resampling.weights(chunk):
            for name, array in statistic(weights).items():
                drawn[name].append(array)
    return {name: _estimates(value, drawn[name], resampling.level) for name, value in values.items()}


def _estimates(value: Float64, drawn: list[Float64], level: float) -> Estimate | list[Estimate]:
    """Interval of a percentile bootstrap; resamples in which the figure is undefined are left out."""
    if value.ndim:
        rows = np.concatenate(drawn, axis=-1) if drawn else np.empty((len(value), 0))
        return [_one(float(item), row, level) for item, row in zip(value, rows, strict=True)]
    return _one(float(value), np.concatenate(drawn) if drawn else np.empty(0), level)


def _one(value: float, drawn: Float64, level: float) -> Estimate:
    if not np.isfinite(value):
        return Estimate(None)
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return Estimate(value)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))
