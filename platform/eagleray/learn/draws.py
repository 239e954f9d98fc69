"""Random numbers that belong to an image, not to a batch: a hash of (seed, epoch, key, stream, counter).

There is no state and no order: an image draws the same numbers alone, in any batch, on any thread, rank or device, and
again after a resume. Numbers are drawn on the CPU, where uint64 arithmetic is the same everywhere.

Example:
    >>> uniforms(seed=0, epoch=3, keys=batch["key"], streams=[0, 1], count=4).shape
    (64, 2, 4)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; Stafford's mix 13.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def uniforms(
    *, seed: int, epoch: int, keys: NDArray[np.uint64], streams: Sequence[int], count: int
) -> NDArray[np.float64]:
    """Numbers in [0, 1), independent across all arguments.

    Args:
        seed: Of the run.
        epoch: From 0.
        keys: uint64 (N,), one an image: see ``task.keys``.
        streams: S numbers that tell one use of the numbers from another, e.g. the index of a view.
        count: How many for each image and stream.

    Returns:
        float64 (N, S, count).
    """
    state = _mix(np.array([(seed + int(_GOLDEN)) & _MASK], np.uint64))
    state = _mix(state ^ np.uint64(epoch & _MASK))
    state = _mix(state ^ np.asarray(keys, np.uint64))[:, None]
    state = _mix(state ^ np.asarray(streams, np.uint64))[..., None]
    bits = _mix(state + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    # the high 53 bits fill a float64's fraction
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of the input; one to one."""
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))
