"""Bytes to pixels, safely: the one door through which every image enters Eagleray.

``decode`` gives the model's pixels straight into a batch; ``validate`` is what ingest asks (the same verdict, cheaper); ``probe``
reads the header only. A file that cannot be used raises ImageRefused with one of a closed list of reasons and nothing else.
The pixel and damage policies are written in codecs.py, the geometry in preprocessing.py.

Example:
    >>> batch = np.empty((64, 224, 224, 3), np.uint8)
    >>> decode(data, spec, out=batch[0])
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eagleray.vision.codecs import Picture, load, read_header
from eagleray.vision.image_headers import Header, ImageRefused, Limits, Reason
from eagleray.vision.preprocessing import Axis, ImageSpec, normalize

__all__ = [
    "Header",
    "ImageRefused",
    "ImageSpec",
    "Limits",
    "Reason",
    "decode",
    "decode_full",
    "normalize",
    "probe",
    "validate",
]

_DEFAULT_LIMITS = Limits()
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def probe(data: bytes, limits: Limits = _DEFAULT_LIMITS) -> Header:
    """The format, upright size and orientation, from the header; no pixel is allocated.

    Raises:
        ImageRefused: ``empty``, ``not_image``, ``format_refused``, ``too_large``, ``truncated`` or ``corrupt``.
    """
    return read_header(data, limits)


def validate(data: bytes, limits: Limits = _DEFAULT_LIMITS) -> Header:
    """Reads all of the image and keeps none of it: raises exactly where ``decode`` would.

    A JPEG is decoded at 1/8, where the entropy decoding, which finds damage, is all of the cost.

    Raises:
        ImageRefused: With any reason but ``unreadable``.
    """
    return load(data, limits, needed=_one_pixel).header


def _one_pixel(width: int, height: int) -> tuple[int, int]:
    return 1, 1


def decode(
    data: bytes,
    spec: ImageSpec,
    *,
    out: NDArray[np.uint8] | None = None,
    limits: Limits = _DEFAULT_LIMITS,
    is_scaled: bool = True,
) -> NDArray[np.uint8]:
    """An image as the model's pixels.

    Args:
        data: A file's bytes.
        spec: Size, crop, filter and colour order.
        out: Where to write: uint8 (spec.height, spec.width, 3), e.g. one row of a batch; made when not given.
        limits: Caps on file and picture.
        is_scaled: Whether a JPEG may be decoded at a reduced size first. Faster, and off the exact resize by about 1 of 255.

    Returns:
        uint8 (spec.height, spec.width, 3) in the order of ``spec.color``: ``out``, or a new array.

    Raises:
        ImageRefused: With any reason but ``unreadable``; ``out`` is then as it was.
    """
    picture = load(data, limits, needed=spec.resized if is_scaled else None)
    if out is None:
        out = np.empty((spec.height, spec.width, 3), np.uint8)
    _render(picture, spec, out)
    return out


def decode_full(data: bytes, limits: Limits = _DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """The whole image, upright, at its full size.

    Returns:
        uint8 (height, width, 3), RGB, contiguous.

    Raises:
        ImageRefused: With any reason but ``unreadable``.
    """
    picture = load(data, limits)
    pixels = _pixels(picture.image)
    return np.ascontiguousarray(np.broadcast_to(_turn(pixels, picture.turn), _rgb_shape(picture.header)))


def _rgb_shape(header: Header) -> tuple[int, int, int]:
    return header.height, header.width, 3


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (height, width, 3 or 1) of an image in mode RGB or L."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of stored pixels, upright. Source: EXIF 2.32, tag 0x0112."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _span(axis: Axis, length_px: int, is_mirrored: bool) -> tuple[float, float]:
    """The part of an axis of ``length_px`` stored pixels that the target shows."""
    start = axis.resized_px - axis.crop_px - axis.content_px if is_mirrored else axis.crop_px
    ratio = length_px / axis.resized_px
    return start * ratio, (start + axis.content_px) * ratio


def _render(picture: Picture, spec: ImageSpec, out: NDArray[np.uint8]) -> None:
    """Resizes the part that the target shows, on the sampling grid of resize-then-crop, and writes it upright."""
    header, image = picture.header, picture.image
    layout = spec.layout(header.width, header.height)
    x, y = layout.x, layout.y
    turn = picture.turn
    stored_w, stored_h = picture.stored_size
    # along which stored axis each upright axis lies, and whether it runs backwards there
    across, down = (y, x) if turn >= 5 else (x, y)
    left, right = _span(across, stored_w, turn in (2, 3, 7, 8))
    top, bottom = _span(down, stored_h, turn in (3, 4, 6, 7))
    k = picture.reduction
    box = (left / k, top / k, min(right / k, image.width), min(bottom / k, image.height))
    size = (across.content_px, down.content_px)
    if size != image.size or box != (0, 0, *image.size):
        image = image.resize(size, _FILTERS[spec.interpolation], box)
    pixels = _turn(_pixels(image), turn)
    if spec.color == "bgr":
        pixels = pixels[:, :, ::-1]
    if (x.content_px, y.content_px) == (spec.width, spec.height):
        out[:] = pixels
        return
    out[:] = spec.fill if spec.crop_mode == "border" else 0
    out[y.pad_px : y.pad_px + y.content_px, x.pad_px : x.pad_px + x.content_px] = pixels
