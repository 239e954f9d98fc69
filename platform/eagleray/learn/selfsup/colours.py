"""What each row of a batch of views draws for its colours, on the host, and in which chunks rows are worked on.

Rows that go through the same steps are put side by side, so that ``photometric.py`` has no loop over images and no step
runs for rows that do not take it. How rows are grouped cannot change a pixel: whatever a chunk leaves out is, for its
rows, a multiplication by 1, an addition of 0, or a clamp of what lies inside.

Example:
    >>> colours = Colours.draw(spec, uniforms(seed=0, epoch=0, keys=key, streams=[1], count=NUM_DRAWS)[:, 0])
    >>> [len(chunk.rows) for chunk in colours.chunks(32, torch.device("cpu"))]
    [13, 17, 12, 16, 6]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eagleray.learn.selfsup.views import ViewSpec

Floats = NDArray[np.float64]

NUM_DRAWS = 10
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_ORDERS = np.array(list(permutations((_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE))))
_NO_JITTER = -1
_BOX_PASSES = 3  # Source: Pillow, src/libImaging/BoxBlur.c, as ImageFilter.GaussianBlur calls it
_LEAST_TAP = 1 / 512  # a neighbour that differs by all of 255 moves a pixel by half a level; a quarter fewer taps


@dataclass(frozen=True)
class Blend:
    """One step of the jitter: x becomes factor * x + gray * (gray of x) + level * (mean gray of x), held to 0..255.

    Attributes:
        weights: float32 (3, n, 1, 1): factor, gray and level of each row.
        has_gray: Whether any row's ``gray`` or ``level`` is not 0.
        has_level: Whether any row's ``level`` is not 0.
        can_overflow: Whether any row's factor is above 1; others stay inside 0..255 by themselves.
    """

    weights: Tensor
    has_gray: bool
    has_level: bool
    can_overflow: bool


@dataclass(frozen=True)
class Blur:
    """A blur of some neighbouring rows of a chunk.

    Attributes:
        start: First row.
        stop: After the last row.
        taps: float32 (radius + 1, n, 1, 1, 1): weights of a symmetric kernel, from its middle outwards.
    """

    start: int
    stop: int
    taps: Tensor


@dataclass(frozen=True)
class Chunk:
    """Rows that are worked on together.

    Attributes:
        places: Which n rows of the batch.
        rows: int64 (n,): the same, on the device.
        blends: Of brightness, contrast and saturation, in the order drawn; none where nothing is jittered.
        hue_at: Before which blend the hue is turned (after the last: 3); None where it is not.
        turn: float32 (n, 1, 1): how far, in sixths of the colour circle.
        is_far: Whether turns of more than 2 may come, after which a hue has to be brought back to -3..3.
        gray: int64: which of these n rows lose their colour.
        blurs: By rows and radius.
        solarized: int64: which of these n rows are solarized.
    """

    places: list[int]
    rows: Tensor
    blends: tuple[Blend, ...]
    hue_at: int | None
    turn: Tensor
    is_far: bool
    gray: Tensor
    blurs: tuple[Blur, ...]
    solarized: Tensor


@dataclass(frozen=True)
class Colours:
    """What R rows drew, sorted so that rows of equal steps are neighbours.

    Attributes:
        rows: int64 (R,): the row that each of these entries is of.
        hue_at: int64 (R,): number of blends before the turn of the hue; -1 where nothing is jittered.
        blends: float32 (R, 3, 3): step, then factor, gray, level (see Blend).
        turn: float32 (R,), in sixths of the colour circle.
        radius: int64 (R,) in pixels, 0 where nothing is blurred.
        taps: float32 (R, largest radius + 1).
        is_gray: bool (R,).
        is_solarized: bool (R,).
        most_turn: The most that the spec allows; 0 turns no hues at all.
    """

    rows: NDArray[np.int64]
    hue_at: NDArray[np.int64]
    blends: NDArray[np.float32]
    turn: NDArray[np.float32]
    radius: NDArray[np.int64]
    taps: NDArray[np.float32]
    is_gray: NDArray[np.bool_]
    is_solarized: NDArray[np.bool_]
    most_turn: float

    @classmethod
    def draw(cls, spec: ViewSpec, draws: Floats) -> Colours:
        """What rows do, given float64 (R, NUM_DRAWS) in [0, 1)."""
        strengths = spec.jitter_strength * np.array([spec.brightness, spec.contrast, spec.saturation])
        factors = _between(np.maximum(0, 1 - strengths), 1 + strengths, draws[:, 0:3])
        turn = 6 * spec.jitter_strength * spec.hue * (2 * draws[:, 3] - 1)
        order = (draws[:, 4] * len(_ORDERS)).astype(np.int64)
        is_jittered, is_gray, is_blurred, is_solarized = (
            draws[:, number] < share
            for number, share in zip(
                range(5, 9), (spec.jitter_p, spec.grayscale_p, spec.blur_p, spec.solarize_p), strict=True
            )
        )
        order[~is_jittered] = _NO_JITTER
        sigma = _between(spec.sigma_px[0], spec.sigma_px[1], draws[:, 9])
        radius, taps = blur_taps(np.where(is_blurred, sigma, 0.0))
        hue_at = np.where(is_jittered, np.argmax(_ORDERS == _HUE, axis=1)[order], _NO_JITTER)
        rows = np.lexsort((radius, order, hue_at))
        return cls(
            rows,
            hue_at[rows],
            _blends(factors, order)[rows].astype(np.float32),
            turn[rows].astype(np.float32),
            radius[rows],
            taps[rows].astype(np.float32),
            is_gray[rows],
            is_solarized[rows],
            6 * spec.jitter_strength * spec.hue,
        )

    def chunks(self, most: int, device: torch.device) -> Iterator[Chunk]:
        """Runs of at most ``most`` rows whose hue turns at the same step, with their numbers on a device."""

        def on_device(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        rows, turn = on_device(self.rows), on_device(self.turn[:, None, None])
        weights = on_device(self.blends.transpose(1, 2, 0)[..., None, None])
        taps = on_device(self.taps.T[:, :, None, None, None])
        is_needed = np.stack([self.blends[:, :, 1:].any(2), self.blends[:, :, 2] != 0, self.blends[:, :, 0] > 1], 2)
        for start, stop in _runs(self.hue_at):
            for first in range(start, stop, most):
                part = slice(first, min(stop, first + most))
                hue_at = int(self.hue_at[first])
                needs: list[list[bool]] = is_needed[part].any(0).tolist() if hue_at != _NO_JITTER else []  # type: ignore[assignment]
                yield Chunk(
                    self.rows[part].tolist(),
                    rows[part],
                    tuple(Blend(weights[step, :, part], *needed) for step, needed in enumerate(needs)),
                    hue_at if needs and self.most_turn > 0 else None,
                    turn[part],
                    self.most_turn > 2,
                    on_device(np.flatnonzero(self.is_gray[part])),
                    tuple(
                        Blur(low, high, taps[: radius + 1, first + low : first + high])
                        for low, high in _runs(self.radius[part])
                        if (radius := int(self.radius[first + low]))
                    ),
                    on_device(np.flatnonzero(self.is_solarized[part])),
                )


def blur_taps(sigma: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The kernel that Pillow's GaussianBlur comes to: a box with soft ends, three times.

    Args:
        sigma: (R,) in pixels; 0 does not blur.

    Returns:
        int64 (R,): the radius in pixels; 0 where sigma is 0.
        float64 (R, largest radius + 1): the symmetric kernel from its middle outwards, of sum 1 with its mirror image.
            What lies outside of the last tap of ``_LEAST_TAP`` is left out, and the rest made to sum to 1.

    Source:
        Gwosdek, Grewenig, Bruhn, Weickert 2011, "Theoretical foundations of Gaussian convolution by extended box
        filtering", equations 7, 11 and 14.
    """
    variance = sigma**2 / _BOX_PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole.max(initial=0)) + 1
    offset = np.abs(np.arange(-reach, reach + 1))
    box = np.clip(whole[:, None] + 1 - offset, 0, 1) + (offset == whole[:, None] + 1) * end[:, None]
    box /= 2 * (whole + end)[:, None] + 1
    kernel = box
    for _ in range(_BOX_PASSES - 1):
        padded = np.pad(kernel, ((0, 0), (2 * reach, 2 * reach)))
        width = kernel.shape[1] + 2 * reach
        kernel = sum(box[:, [shift]] * padded[:, shift : shift + width] for shift in range(2 * reach + 1))
    taps = kernel[:, kernel.shape[1] // 2 :]
    radius = np.where(sigma > 0, np.count_nonzero(taps >= _LEAST_TAP, axis=1) - 1, 0)
    taps = np.where(np.arange(taps.shape[1]) <= radius[:, None], taps, 0)[:, : radius.max(initial=0) + 1]
    return radius, taps / (2 * taps.sum(1, keepdims=True) - taps[:, :1])


def _blends(factors: Floats, order: NDArray[np.int64]) -> Floats:
    """float64 (R, 3, 3): the weights of brightness, contrast and saturation, in each row's order."""
    weights = np.zeros((len(factors), 3, 3))
    weights[:, :, 0] = factors
    weights[:, _SATURATION, 1] = 1 - factors[:, _SATURATION]
    weights[:, _CONTRAST, 2] = 1 - factors[:, _CONTRAST]
    steps = np.array([[step for step in row if step != _HUE] for row in _ORDERS])[order]
    return np.take_along_axis(weights, steps[:, :, None], axis=1)


def _between(low: Floats | float, high: Floats | float, draws: Floats) -> Floats:
    return low + (high - low) * draws


def _runs(values: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return ((start, stop) for start, stop in pairwise(borders) if stop > start)
