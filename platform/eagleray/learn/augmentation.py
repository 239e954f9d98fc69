"""What a classifier sees of an image: in training a random crop, a flip, RandAugment or colour jitter; else as scored.

The crop is one view of selfsup/views.py (one scaled decode, bicubic). RandAugment is timm's ``rand-m9-mstd0.5-inc1``
with the same operations, levels and probabilities, but every number from (seed, epoch, image id): timm's come from the
global generators, which threads share.

Example:
    >>> transform = TrainTransform(spec, AugmentSettings(), seed=0)
    >>> transform(items, epoch=3)["image"].shape
    (64, 224, 224, 3)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field

from eagleray.core.config import Config
from eagleray.core.errors import ConfigError
from eagleray.learn.selfsup.views import Range, ViewPlan, ViewSpec, ViewTransform
from eagleray.learn.task import Item, keys
from eagleray.vision.images import ImageSpec, decode

Apply = Callable[[Image.Image, float, float], Image.Image]  # picture, level 0 to 10, sign -1 or 1
Probability = Annotated[float, Field(ge=0, le=1)]
FILL = (128, 128, 128)
MOST = 10.0  # the highest level
_OP_PROBABILITY = 0.5  # of each operation that was chosen. Source: timm 1.0.31, rand_augment_ops
_STREAM = 0xA06  # tells these numbers from those of the crop


class AugmentSettings(Config):
    """How an image is varied.

    Attributes:
        scale: Area of the crop, smallest and largest, as a share of the picture's.
        ratio: Width over height of the crop, smallest and largest.
        flip_p: Probability of a left-right flip.
        vertical_flip_p: Probability of a top-bottom flip: for pictures without an up.
        rand_augment_ops: Operations of RandAugment (Cubuk et al. 2020); 0: none.
        rand_augment_magnitude: Their mean level, 0 to 10.
        rand_augment_std: Standard deviation of the level.
        jitter: Brightness, contrast and saturation change by at most this share, in random order; 0: not.
    """

    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip_p: Probability = 0.5
    vertical_flip_p: Probability = 0.0
    rand_augment_ops: int = Field(2, ge=0)
    rand_augment_magnitude: float = Field(9.0, ge=0, le=MOST)
    rand_augment_std: float = Field(0.5, ge=0)
    jitter: float = Field(0.0, ge=0, le=1)


@dataclass(frozen=True)
class TrainTransform:
    """A ``task.Transform`` for training.

    Args:
        spec: Size and colour order are used.
        settings: See AugmentSettings.
        seed: Of every random number.
        num_classes: Makes ``labels`` of this width, for several labels an image; None: there are none.

    Raises:
        ConfigError: The spec is not square.
    """

    spec: ImageSpec
    settings: AugmentSettings = field(default_factory=AugmentSettings)
    seed: int = 0
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if self.spec.height != self.spec.width:
            raise ConfigError(
                f"training at {self.spec.width} x {self.spec.height} pixels", expected="a square", fix="give size_px"
            )

    @cached_property
    def _crops(self) -> ViewTransform:
        s = self.settings
        view = ViewSpec(
            size_px=self.spec.height, scale=s.scale, ratio=s.ratio, interpolation="bicubic", flip_p=s.flip_p
        )
        return ViewTransform(ViewPlan(views=(view,), seed=self.seed))

    def __call__(self, items: Sequence[Item], epoch: int) -> dict[str, np.ndarray]:
        """Pictures of every item.

        Returns:
            ``image`` uint8 (N, H, W, 3); ``key`` uint64 (N,); ``labels`` uint8 (N, C) where asked for.

        Raises:
            ImageRefused: An image that cannot be decoded.
        """
        arrays = self._crops(items, epoch)
        image, key = arrays["view_0"], arrays["key"]
        for index, number in enumerate(key.tolist()):
            generator = np.random.default_rng([self.seed, epoch, number, _STREAM])
            self._vary(image[index], generator)
        if self.spec.color == "bgr":
            image = np.ascontiguousarray(image[..., ::-1])
        return {"image": image, "key": key, **_labels(items, self.num_classes)}

    def _vary(self, pixels: NDArray[np.uint8], generator: np.random.Generator) -> None:
        """Varies one picture, uint8 (H, W, 3), in place."""
        s = self.settings
        is_turned = generator.random() < s.vertical_flip_p
        if is_turned:
            pixels[:] = pixels[::-1].copy()
        if s.rand_augment_ops:
            pixels[:] = np.asarray(rand_augment(Image.fromarray(pixels), s, generator))
        if s.jitter:
            pixels[:] = np.asarray(jitter(Image.fromarray(pixels), s.jitter, generator))


@dataclass(frozen=True)
class EvalTransform:
    """A ``task.Transform`` that shows images as they are scored: ``images.decode`` by the ImageSpec.

    Args:
        spec: The preprocessing.
        num_classes: Makes ``labels`` of this width, for several labels an image; None: there are none.
    """

    spec: ImageSpec
    num_classes: int | None = None

    def __call__(self, items: Sequence[Item], epoch: int) -> dict[str, np.ndarray]:
        """``image`` uint8 (N, H, W, 3); ``key`` uint64 (N,); ``labels`` uint8 (N, C) where asked for."""
        image = np.empty((len(items), self.spec.height, self.spec.width, 3), np.uint8)
        for index, item in enumerate(items):
            decode(item.data, self.spec, out=image[index])
        return {"image": image, "key": keys([item.id for item in items]), **_labels(items, self.num_classes)}


def _labels(items: Sequence[Item], num_classes: int | None) -> dict[str, np.ndarray]:
    if num_classes is None:
        return {}
    labels = np.zeros((len(items), num_classes), np.uint8)
    for row, item in zip(labels, items, strict=True):
        row[list(item.targets)] = 1
    return {"labels": labels}


def jitter(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation by factors of 1 - strength to 1 + strength, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = generator.uniform(1 - strength, 1 + strength, len(enhancers))
    for number in generator.permutation(len(enhancers)).tolist():
        image = enhancers[number](image).enhance(float(factors[number]))
    return image


def rand_augment(image: Image.Image, settings: AugmentSettings, generator: np.random.Generator) -> Image.Image:
    """A few operations, each with probability a half, at levels about the magnitude."""
    names = tuple(OPERATIONS)
    for number in generator.integers(len(names), size=settings.rand_augment_ops).tolist():
        is_applied = generator.random() < _OP_PROBABILITY
        level = float(np.clip(generator.normal(settings.rand_augment_magnitude, settings.rand_augment_std), 0, MOST))
        sign = 1.0 if generator.random() < 0.5 else -1.0
        if is_applied:
            image = OPERATIONS[names[number]](image, level, sign)
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _rotate(image: Image.Image, level: float, sign: float) -> Image.Image:
    return image.rotate(sign * level / MOST * 30, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _solarize_add(image: Image.Image, level: float, sign: float) -> Image.Image:
    added = min(128, int(level / MOST * 110))
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _enhanced(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Apply:
    def apply(image: Image.Image, level: float, sign: float) -> Image.Image:
        return enhancer(image).enhance(max(0.1, 1 + sign * level / MOST * 0.9))

    return apply


# The operations of timm's "increasing" set under its names; levels as in timm 1.0.31, timm/data/auto_augment.py.
OPERATIONS: dict[str, Apply] = {
    "AutoContrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, sign: ImageOps.equalize(image),
    "Invert": lambda image, level, sign: ImageOps.invert(image),
    "Rotate": _rotate,
    # at least one bit: timm asks for none at the highest level, which Pillow 13 refuses
    "PosterizeIncreasing": lambda image, level, sign: ImageOps.posterize(image, max(1, 4 - int(level / MOST * 4))),
    "SolarizeIncreasing": lambda image, level, sign: ImageOps.solarize(image, 256 - min(256, int(level / MOST * 256))),
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhanced(ImageEnhance.Color),
    "ContrastIncreasing": _enhanced(ImageEnhance.Contrast),
    "BrightnessIncreasing": _enhanced(ImageEnhance.Brightness),
    "SharpnessIncreasing": _enhanced(ImageEnhance.Sharpness),
    "ShearX": lambda image, level, sign: _affine(image, (1, sign * level / MOST * 0.3, 0, 0, 1, 0)),
    "ShearY": lambda image, level, sign: _affine(image, (1, 0, 0, sign * level / MOST * 0.3, 1, 0)),
    "TranslateXRel": lambda image, level, sign: _affine(
        image, (1, 0, sign * level / MOST * 0.45 * image.width, 0, 1, 0)
    ),
    "TranslateYRel": lambda image, level, sign: _affine(
        image, (1, 0, 0, 0, 1, sign * level / MOST * 0.45 * image.height)
    ),
}
