"""ImageSpec, the one definition of preprocessing: size, crop, resampling filter, colour order, mean and std.

Training, bulk scoring, serving and federated sites all take their pixels through the ImageSpec that the bundle keeps,
so their answers cannot differ. The geometry is that of timm's evaluation transform (Resize, then CenterCrop), rounding
included; tests/contract/test_decode_parity.py holds it to that. A spec that cannot be meant (a negative size, a std of
0, a crop of more than the whole) is refused when it is made.

Example:
    >>> spec = ImageSpec(224, 224, crop_pct=0.875, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> spec.layout(500, 375).resized
    (341, 256)
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from eagleray.core.errors import ArtifactError, ConfigError
from eagleray.vision.resample import to_planes

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
COLORS = ("rgb", "bgr")


@dataclass(frozen=True, slots=True)
class Axis:
    """Where the target lies along one axis of the resized picture.

    Attributes:
        resized_px: Length of the whole picture after the resize.
        crop_px: First resized pixel inside the target.
        content_px: How many resized pixels the target shows.
        pad_px: Filled pixels of the target before the content.
    """

    resized_px: int
    crop_px: int
    content_px: int
    pad_px: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What the spec does to an upright picture of one size."""

    x: Axis
    y: Axis

    @property
    def resized(self) -> tuple[int, int]:
        """The (width, height) in pixels that the whole picture is resized to."""
        return self.x.resized_px, self.y.resized_px


@dataclass(frozen=True)
class ImageSpec:
    """Bytes to model input, as data.

    Args:
        height: Target height in pixels.
        width: Target width in pixels.
        crop_pct: Share of the resized picture that the target shows, 0 < crop_pct <= 1.
        crop_mode: ``center`` (the short side fills the target, the rest is cut off), ``squash`` (the aspect ratio is
            given up) or ``border`` (the long side fits, the rest is filled with the mean).
        interpolation: One of ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``; antialiased, as Pillow does it.
        mean: Per channel in the order of ``color``, on the scale of ``value_range``.
        std: Likewise.
        color: ``rgb`` or ``bgr``: the order of the channels that the model wants.
        value_range: What pixel values 0 and 255 become before mean and std.
        schema: Format number of the JSON.

    Raises:
        ConfigError: A value that cannot be meant.
    """

    height: int
    width: int
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    color: str = "rgb"
    value_range: tuple[float, float] = (0.0, 1.0)
    schema: int = 1

    SCHEMA: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("mean", "std", "value_range"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        faults = list(self._faults())
        if faults:
            raise ConfigError(
                f"image spec is wrong: {'; '.join(seen for seen, _ in faults)}",
                expected="; ".join(expected for _, expected in faults),
                fix="correct these settings",
            )

    def _faults(self) -> list[tuple[str, str]]:
        """(seen, expected) of each setting that cannot be meant."""
        faults: list[tuple[str, str]] = []
        for name in ("height", "width"):
            if not 1 <= getattr(self, name) <= 4096:
                faults.append((f"{name}={getattr(self, name)}", f"{name} of 1 to 4096 pixels"))
        if not 0 < self.crop_pct <= 1:
            faults.append((f"crop_pct={self.crop_pct}", "crop_pct above 0 and at most 1"))
        for name, allowed in (("crop_mode", CROP_MODES), ("interpolation", INTERPOLATIONS), ("color", COLORS)):
            if getattr(self, name) not in allowed:
                faults.append((f"{name}={getattr(self, name)!r}", f"{name} of {', '.join(allowed)}"))
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            faults.append((f"mean={self.mean}", "3 finite numbers of mean"))
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            faults.append((f"std={self.std}", "3 positive numbers of std"))
        if len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1] < math.inf:
            faults.append((f"value_range={self.value_range}", "value_range as low, high with low < high"))
        return faults

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ImageSpec:
        """The spec that ``to_json`` gave.

        Raises:
            ArtifactError: A newer schema, or keys that no spec of this schema has.
        """
        schema = document.get("schema")
        if schema != cls.SCHEMA:
            raise ArtifactError(
                f"image spec of schema {schema!r}",
                expected=f"schema {cls.SCHEMA}",
                fix="use the version of eagleray that wrote it, or a newer one",
            )
        known = set(cls.__dataclass_fields__)
        unknown, missing = sorted(set(document) - known), sorted({"height", "width"} - set(document))
        if unknown or missing:
            raise ArtifactError(
                f"image spec with unknown keys {unknown} and without {missing}",
                expected=f"the keys {', '.join(sorted(known))}",
                fix="get the artefact again",
            )
        return cls(**document)

    @cached_property
    def digest(self) -> str:
        """sha256 in hexadecimal of the canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def layout(self, width: int, height: int) -> Layout:
        """Where the target lies in an upright picture of ``width`` x ``height`` pixels."""
        return _layout(self.width, self.height, self.crop_pct, self.crop_mode, width, height)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) in pixels that an upright picture is resized to before the crop."""
        return self.layout(width, height).resized

    @property
    def fill(self) -> tuple[int, int, int]:
        """The 8-bit colour, in the order of ``color``, of the target's pixels outside the picture: timm's, the mean."""
        low, high = self.value_range
        levels = [round(255 * (value - low) / (high - low)) for value in self.mean]
        return (_clip(levels[0]), _clip(levels[1]), _clip(levels[2]))

    @cached_property
    def scale_and_bias(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """float32 (3,) each: model input = pixel * scale + bias."""
        low, high = self.value_range
        std = np.asarray(self.std, np.float64)
        scale = (high - low) / 255.0 / std
        bias = (low - np.asarray(self.mean, np.float64)) / std
        return scale.astype(np.float32), bias.astype(np.float32)


def _clip(level: int) -> int:
    return min(255, max(0, level))


def _axis(resized_px: int, target_px: int) -> Axis:
    """Centre crop, or centre pad where the picture is the smaller: timm's and torchvision's rounding (half to even)."""
    if resized_px < target_px:
        return Axis(resized_px, 0, resized_px, (target_px - resized_px) // 2)
    return Axis(resized_px, round((resized_px - target_px) / 2.0), target_px, 0)


@lru_cache(maxsize=1024)
def _layout(target_w: int, target_h: int, crop_pct: float, crop_mode: str, width: int, height: int) -> Layout:
    """timm's transforms_imagenet_eval, geometry only. Source: timm 1.0.31, timm/data/transforms_factory.py."""
    scaled_w, scaled_h = math.floor(target_w / crop_pct), math.floor(target_h / crop_pct)
    if crop_mode == "squash":
        w, h = scaled_w, scaled_h
    elif crop_mode == "center" and scaled_w == scaled_h:
        # torchvision Resize(int): the long side is cut down to a whole pixel, not rounded
        w, h = (
            (scaled_w, int(scaled_w * height / width))
            if width <= height
            else (int(scaled_w * width / height), scaled_w)
        )
    else:
        ratios = (height / scaled_h, width / scaled_w)
        ratio = max(ratios) if crop_mode == "border" else min(ratios)
        w, h = round(width / ratio), round(height / ratio)
    return Layout(_axis(max(w, 1), target_w), _axis(max(h, 1), target_h))


def normalize(
    batch_u8_nhwc: NDArray[np.uint8], spec: ImageSpec, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Pixels to model input.

    Args:
        batch_u8_nhwc: uint8 (N, H, W, 3) in the channel order of ``spec.color``.
        spec: Its value range, mean and std are applied.
        out: Where to write: float32 (N, 3, H, W); made when not given.

    Returns:
        float32 (N, 3, H, W): ``out``, or a new array.
    """
    count, height, width, channels = batch_u8_nhwc.shape
    if out is None:
        out = np.empty((count, channels, height, width), np.float32)
    scale, bias = spec.scale_and_bias
    for index in range(count):  # one image at a time stays in the cache
        to_planes(batch_u8_nhwc[index], scale, bias, out[index])
    return out
