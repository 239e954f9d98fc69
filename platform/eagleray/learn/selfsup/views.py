"""Which views a method sees of an image, and their geometry: one decode, every crop from that one buffer.

A plan says how many views there are and how each is drawn; the plans of SimCLR, BYOL and DINO have the values that
lightly's transforms have. ``ViewTransform`` does what needs the whole picture: it decodes once, as small as the
sharpest crop allows, and gives crops as uint8. ``photometric.Photometric`` does the rest (colours, blur, normalize) on
batches, on the device where they lie.

A crop is that of torchvision's RandomResizedCrop (area, then aspect ratio, then place, in whole pixels of the upright
picture). The resize looks past the border of a crop where the picture goes on, as any resize of a larger picture does;
torchvision cuts first. Random numbers are those of the image (draws.py), so pixels do not depend on the batch.

Example:
    >>> plan = dino_plan(224, 96, num_local=6)
    >>> arrays = ViewTransform(plan)(items, epoch=0)
    >>> arrays["view_0"].shape, arrays["view_7"].shape
    ((64, 224, 224, 3), (64, 96, 96, 3))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from eagleray.core.config import Config
from eagleray.learn.draws import uniforms
from eagleray.learn.task import Item, keys
from eagleray.vision.codec_faults import refusal
from eagleray.vision.codecs import Picture, as_array, load
from eagleray.vision.image_headers import Limits
from eagleray.vision.resample import Window, resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A drawn rectangle that does not fit is drawn again. Source: torchvision 0.28, RandomResizedCrop.make_params.
_ATTEMPTS = 10
_DEFAULT_LIMITS = Limits()
_DRAWS = 2 * _ATTEMPTS + 3  # area and ratio of each attempt, left, top, flip
# A picture without a reduced decode is first averaged by whole pixels while it stays this much larger than the sharpest
# crop needs. Source: Pillow's documentation of reducing_gap: at 2.0 next to indistinguishable from the whole resize.
_AVERAGING_MARGIN = 2.0


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("two positive numbers, the smaller first, are expected")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Strength = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class ViewSpec(Config):
    """How one view, or several alike, is drawn.

    Attributes:
        size_px: Side of the square view.
        num: How many such views there are.
        scale: Area of the crop, smallest and largest, as a share of the picture's.
        ratio: Width over height of the crop, smallest and largest; drawn on a logarithmic scale.
        interpolation: ``bilinear`` or ``bicubic``; antialiased.
        flip_p: Probability of a left-right flip.
        jitter_p: Probability of a jitter of the four below, in random order.
        jitter_strength: Multiplies the four; 0.5 is lightly's advice for small pictures such as CIFAR's.
        brightness: The factor is drawn from 1 - it (not below 0) to 1 + it.
        contrast: Likewise.
        saturation: Likewise.
        hue: The turn of the colour circle is drawn from -it to +it; 0.5 is half the circle.
        grayscale_p: Probability of losing all colour.
        blur_p: Probability of a Gaussian blur.
        sigma_px: Standard deviation of the blur, smallest and largest.
        solarize_p: Probability of inverting what is brighter than half.
    """

    size_px: int = Field(ge=1, le=4096)
    num: int = Field(1, ge=1, le=64)
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip_p: Probability = 0.5
    jitter_p: Probability = 0.8
    jitter_strength: Strength = 1.0
    brightness: Strength = 0.8
    contrast: Strength = 0.8
    saturation: Strength = 0.8
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    grayscale_p: Probability = 0.2
    blur_p: Probability = 0.5
    sigma_px: Range = (0.1, 2.0)
    solarize_p: Probability = 0.0

    @model_validator(mode="after")
    def _hue_stays_on_the_circle(self) -> ViewSpec:
        if self.jitter_strength * self.hue > 0.5:
            raise ValueError("jitter_strength * hue of at most 0.5, half the circle, is expected")
        return self


class ViewPlan(Config):
    """All views of an image, in order.

    Attributes:
        views: At least one spec; a spec with ``num`` n stands for n views.
        mean: Per channel, on the scale 0 to 1.
        std: Likewise.
        seed: Of every random number.
        is_scaled: Whether a picture much larger than its crops need may be reduced on the way (off the exact resize by
            1 of 255 or so); where it is not reduced, pixels are the same either way.
    """

    views: Annotated[tuple[ViewSpec, ...], Field(min_length=1)]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    seed: int = 0
    is_scaled: bool = True

    @property
    def specs(self) -> tuple[ViewSpec, ...]:
        """One spec a view: that of ``view_0``, ``view_1``, ..."""
        return tuple(spec for spec in self.views for _ in range(spec.num))


def simclr_plan(size_px: int, *, jitter_strength: float = 1.0, seed: int = 0) -> ViewPlan:
    """Two views alike. Source: Chen et al. 2020, arXiv 2002.05709, appendix A; lightly 1.6.0, SimCLRTransform."""
    return ViewPlan(views=(ViewSpec(size_px=size_px, num=2, jitter_strength=jitter_strength),), seed=seed)


def byol_plan(size_px: int, *, jitter_strength: float = 1.0, seed: int = 0) -> ViewPlan:
    """Two views, the first always blurred. Source: Grill et al. 2020, arXiv 2006.07733, table 6; BYOLTransform."""
    first = ViewSpec(
        size_px=size_px,
        jitter_strength=jitter_strength,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        blur_p=1.0,
    )
    second = first.model_copy(update={"blur_p": 0.1, "solarize_p": 0.2})
    return ViewPlan(views=(first, second), seed=seed)


def dino_plan(
    global_px: int, local_px: int, num_local: int = 6, *, jitter_strength: float = 0.5, seed: int = 0
) -> ViewPlan:
    """Two large crops and ``num_local`` small ones. Source: Caron et al. 2021, arXiv 2104.14294; DINOTransform.

    lightly's values (a large crop shows 0.4 to 1 of the picture, a small one 0.05 to 0.4).
    """
    first = ViewSpec(
        size_px=global_px,
        scale=(0.4, 1.0),
        interpolation="bicubic",
        jitter_strength=jitter_strength,
        saturation=0.4,
        blur_p=1.0,
    )
    second = first.model_copy(update={"blur_p": 0.1, "solarize_p": 0.2})
    local = first.model_copy(update={"size_px": local_px, "num": num_local, "scale": (0.05, 0.4), "blur_p": 0.5})
    return ViewPlan(views=(first, second, local) if num_local else (first, second), seed=seed)


class Crop(NamedTuple):
    """A rectangle of the upright picture, in its whole pixels, and whether it is shown mirrored."""

    left: int
    top: int
    width: int
    height: int
    is_flipped: bool


def draw_crop(width: int, height: int, spec: ViewSpec, draws: Sequence[float]) -> Crop:
    """The crop that torchvision's RandomResizedCrop and RandomHorizontalFlip make of these random numbers.

    Args:
        width: Of the upright picture.
        height: Likewise.
        spec: Scale, ratio and flip.
        draws: 23 numbers in [0, 1): area and ratio of each of 10 attempts, left, top, flip.
    """
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    left, top, flip = draws[-3:]
    for attempt in range(0, 2 * _ATTEMPTS, 2):
        area = width * height * (spec.scale[0] + draws[attempt] * (spec.scale[1] - spec.scale[0]))
        ratio = math.exp(low + draws[attempt + 1] * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(left * (width - w + 1)), int(top * (height - h + 1)), w, h, flip < spec.flip_p)
    w, h = width, height  # as large as fits, in the middle
    if width < height * spec.ratio[0]:
        h = max(1, round(width / spec.ratio[0]))
    elif width > height * spec.ratio[1]:
        w = max(1, round(height * spec.ratio[1]))
    return Crop((width - w) // 2, (height - h) // 2, w, h, flip < spec.flip_p)


@dataclass(frozen=True)
class ViewTransform:
    """A ``task.Transform``: encoded images to uint8 crops.

    Args:
        plan: The views.
        limits: Caps on file and picture.
    """

    plan: ViewPlan
    limits: Limits = _DEFAULT_LIMITS

    def __call__(self, items: Sequence[Item], epoch: int) -> dict[str, np.ndarray]:
        """Crops of every image.

        Args:
            items: N encoded images.
            epoch: With seed and id, what seeds the crops.

        Returns:
            ``view_0``, ``view_1``, ...: uint8 (N, size_px, size_px, 3), RGB; ``key``: uint64 (N,).

        Raises:
            ImageRefused: An image that cannot be decoded, with any reason but ``unreadable``.
        """
        specs, key = self.plan.specs, keys([item.id for item in items])
        views = [np.empty((len(items), spec.size_px, spec.size_px, 3), np.uint8) for spec in specs]
        draws = uniforms(
            seed=self.plan.seed, epoch=epoch, keys=key, streams=crop_streams(range(len(specs))), count=_DRAWS
        )
        for index, item in enumerate(items):
            self._render(item.data, draws[index].tolist(), [view[index] for view in views])
        return {**{f"view_{number}": view for number, view in enumerate(views)}, "key": key}

    def _render(self, data: bytes, draws: list[list[float]], outs: list[NDArray[np.uint8]]) -> None:
        """Decodes one image and writes its views."""
        specs, is_scaled = self.plan.specs, self.plan.is_scaled

        def crops(width: int, height: int) -> list[Crop]:
            return [draw_crop(width, height, spec, row) for spec, row in zip(specs, draws, strict=True)]

        def needed(width: int, height: int) -> tuple[int, int]:
            return _sharpest(width, height, crops(width, height), specs)

        picture = load(data, self.limits, needed=needed if is_scaled else None)
        size = picture.header.width, picture.header.height
        try:
            buffer = _buffer(picture, needed(*size) if is_scaled else None)
            for spec, crop, out in zip(specs, crops(*size), outs, strict=True):
                buffer.show(crop, spec.interpolation, out)
        except MemoryError as fault:
            raise refusal(fault, picture.header.format) from fault


def crop_streams(views: range) -> list[int]:
    """The streams of random numbers (draws.py) that the crops of these views use."""
    return [2 * number for number in views]


def colour_streams(views: range) -> list[int]:
    """The streams of random numbers (draws.py) that the colours of these views use."""
    return [2 * number + 1 for number in views]


def _sharpest(width: int, height: int, crops: Sequence[Crop], specs: Sequence[ViewSpec]) -> tuple[int, int]:
    """The (width, height) in pixels that the whole picture has on the grid of the crop that shows it largest."""
    across = max(spec.size_px * width / crop.width for crop, spec in zip(crops, specs, strict=True))
    down = max(spec.size_px * height / crop.height for crop, spec in zip(crops, specs, strict=True))
    return math.ceil(across), math.ceil(down)


@dataclass(frozen=True, slots=True)
class _Buffer:
    """The one decoded image that all crops come from.

    Attributes:
        pixels: uint8 (height, width, 1 or 3), as stored, reduced or not.
        turn: The EXIF orientation still to apply.
        stored_size: (width, height) of the whole picture, as stored, at full size.
        factors: How many stored pixels one of ``pixels`` stands for, across and down.
    """

    pixels: NDArray[np.uint8]
    turn: int
    stored_size: tuple[int, int]
    factors: tuple[int, int]

    def show(self, crop: Crop, interpolation: str, out: NDArray[np.uint8]) -> None:
        """Resizes a crop and writes it upright: uint8 (size_px, size_px, 3)."""
        is_transposed, size_px = self.turn >= 5, len(out)
        starts, lengths = (crop.left, crop.top), (crop.width, crop.height)
        if is_transposed:
            starts, lengths, out = starts[::-1], lengths[::-1], out.transpose(1, 0, 2)
        # whether upright runs against stored, across and down
        against = (self.turn in (2, 3, 7, 8), self.turn in (3, 4, 6, 7))
        windows = []
        for axis, has in enumerate(self.pixels.shape[1::-1]):
            start = self.stored_size[axis] - starts[axis] - lengths[axis] if against[axis] else starts[axis]
            begin, end = start / self.factors[axis], (start + lengths[axis]) / self.factors[axis]
            is_flipped = crop.is_flipped and axis == is_transposed
            windows.append(Window(size_px, 0, size_px, begin, min(end, has), against[axis] != is_flipped))
        resize(self.pixels, out, windows[0], windows[1], interpolation=interpolation)


def _buffer(picture: Picture, whole: tuple[int, int] | None) -> _Buffer:
    """The picture, averaged by whole pixels as far as its sharpest crop allows: once, not once a view.

    Args:
        picture: As decoded.
        whole: (width, height) of the upright picture on the grid of that crop; None leaves it as it is.
    """
    averaged = (1, 1)
    if whole is not None:
        need = whole[::-1] if picture.turn >= 5 else whole
        across, down = (max(1, int(picture.size[axis] / need[axis] / _AVERAGING_MARGIN)) for axis in (0, 1))
        averaged = (across, down)
    pixels = picture.pixels() if averaged == (1, 1) else as_array(picture.image().reduce(averaged))
    factors = (picture.reduction * averaged[0], picture.reduction * averaged[1])
    return _Buffer(pixels, picture.turn, picture.stored_size, factors)
