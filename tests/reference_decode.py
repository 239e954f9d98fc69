"""The slow, obvious oracle of decoding: Pillow alone, the whole picture, one step after the other.

``reference_full`` follows the pixel policy of vision/codecs.py; ``reference_decode`` adds timm's evaluation transform
as torchvision's Resize and CenterCrop do it (tests/contract/test_decode_parity.py proves that against timm itself).
"""

from __future__ import annotations

import io
import math

import numpy as np
from eagleray.vision.images import ImageSpec
from PIL import Image, ImageOps

ALLOWED = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def reference_image(data: bytes) -> Image.Image:
    """The upright picture in mode RGB: 16 bits by their high byte, everything else by ``convert("RGB")``."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=ALLOWED)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)
    return image.convert("RGB")


def reference_full(data: bytes) -> np.ndarray:
    """uint8 (height, width, 3)."""
    return np.asarray(reference_image(data))


def reference_decode(data: bytes, spec: ImageSpec) -> np.ndarray:
    """uint8 (spec.height, spec.width, 3)."""
    image = reference_image(data)
    resized = image.resize(reference_size(*image.size, spec), FILTERS[spec.interpolation])
    fill = tuple(round(255 * value) for value in spec.mean) if spec.crop_mode == "border" else (0, 0, 0)
    pixels = np.asarray(_crop_or_pad(resized, spec.width, spec.height, fill))
    return pixels[:, :, ::-1] if spec.color == "bgr" else pixels


def reference_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """(width, height) after timm's resize."""
    target_w, target_h = math.floor(spec.width / spec.crop_pct), math.floor(spec.height / spec.crop_pct)
    if spec.crop_mode == "squash":
        return target_w, target_h
    if spec.crop_mode == "center" and target_w == target_h:
        short, long = min(width, height), max(width, height)
        new_long = int(target_w * long / short)
        return (target_w, new_long) if width <= height else (new_long, target_w)
    ratio = (max if spec.crop_mode == "border" else min)(height / target_h, width / target_w)
    return round(width / ratio), round(height / ratio)


def _crop_or_pad(image: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    """torchvision's center_crop."""
    pad_x, pad_y = max(0, width - image.width), max(0, height - image.height)
    canvas = Image.new("RGB", (image.width + pad_x, image.height + pad_y), fill)
    canvas.paste(image, (pad_x // 2, pad_y // 2))
    left, top = round((canvas.width - width) / 2.0), round((canvas.height - height) / 2.0)
    return canvas.crop((left, top, left + width, top + height))


def differences(pixels: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Mean and 99th percentile of |d|, of 255."""
    delta = np.abs(pixels.astype(np.int16) - reference.astype(np.int16))
    return float(delta.mean()), float(np.percentile(delta, 99))
