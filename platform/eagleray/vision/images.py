"""Bytes to pixels, safely: the one door through which every image enters Eagleray.

``decode`` gives the model's pixels straight into a batch; ``validate`` is what ingest asks (the same verdict, cheaper);
``probe`` reads the header only. A file that cannot be used raises ImageRefused, with one of a closed list of reasons,
and nothing else. The policies for pixels and for damage are written in codecs.py, the geometry in preprocessing.py.
All functions may be called from several threads; decoding and resizing release the GIL.

Example:
    >>> batch = np.empty((64, 224, 224, 3), np.uint8)
    >>> decode(data, spec, out=batch[0])
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eagleray.vision.codec_faults import refusal
from eagleray.vision.codecs import Picture, as_array, load, load_rgb, read_header
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
# Half the width of each filter, in target pixels. Source: Pillow, src/libImaging/Resample.c.
_SUPPORT_PX = {"nearest": 0.0, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
# A picture still 4 times the target or more is first averaged by whole pixels: mean |d| <= 0.65 of 255, 12 MP in 14 ms
# instead of 84 (docs/log.md). It concerns what has no reduced decode: PNG, WebP, TIFF, CMYK.
_REDUCING_GAP = 2.0
# Nearest picks one pixel, so where a sampling point falls on a border the last bit decides: the whole is resized, as in
# the reference, and cropped. Of a very long picture only the box is.
_MAX_NEAREST_PIXELS = 4_000_000


def probe(data: bytes, limits: Limits = _DEFAULT_LIMITS) -> Header:
    """The format, upright size and orientation, from the header; no pixel is allocated.

    Raises:
        ImageRefused: ``empty``, ``not_image``, ``format_refused``, ``too_large``, ``truncated`` or ``corrupt``.
    """
    return read_header(data, limits)


def validate(data: bytes, limits: Limits = _DEFAULT_LIMITS) -> Header:
    """Reads all of the image and keeps none of it: raises exactly where ``decode`` would.

    A JPEG is decoded at 1/8, where the entropy decoding, which finds damage, is nearly all of the cost.

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
        is_scaled: Whether a picture much larger than the target may be reduced on the way: a JPEG by its decoder,
            others by averaging. Up to 4 times faster, off the exact resize by 1 of 255 or so.

    Returns:
        uint8 (spec.height, spec.width, 3) in the order of ``spec.color``: ``out``, or a new array.

    Raises:
        ImageRefused: With any reason but ``unreadable``; ``out`` is then as it was.
    """
    is_scaled = is_scaled and spec.interpolation != "nearest"
    picture = load(data, limits, needed=spec.resized if is_scaled else None)
    if out is None:
        out = np.empty((spec.height, spec.width, 3), np.uint8)
    try:
        _render(picture, spec, out, _REDUCING_GAP if is_scaled else None)
    except MemoryError as fault:
        raise refusal(fault, picture.header.format) from fault
    return out


def decode_full(data: bytes, limits: Limits = _DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """The whole image, upright, at its full size.

    Returns:
        uint8 (height, width, 3), RGB, contiguous.

    Raises:
        ImageRefused: With any reason but ``unreadable``.
    """
    header, pixels, turn = load_rgb(data, limits)
    pixels = np.broadcast_to(_turn(pixels, turn), (header.height, header.width, 3))
    if pixels.flags.c_contiguous and pixels.flags.writeable:
        return pixels
    try:
        return pixels.copy(order="C")
    except MemoryError as fault:
        raise refusal(fault, header.format) from fault


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of stored pixels, upright. Source: EXIF 2.32, tag 0x0112."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _render(picture: Picture, spec: ImageSpec, out: NDArray[np.uint8], reducing_gap: float | None) -> None:
    """Resizes the part that the target shows, on the sampling grid of resize-then-crop, and writes it upright.

    The orientation is applied to the small result: turning and resizing commute, but for rounding by 1 of 255.
    """
    layout, turn = spec.layout(picture.header.width, picture.header.height), picture.turn
    x, y = layout.x, layout.y
    # along which stored axis each upright axis lies, and whether it runs backwards there
    across, down = (y, x) if turn >= 5 else (x, y)
    left = _start(across, turn in (2, 3, 7, 8))
    top = _start(down, turn in (3, 4, 6, 7))
    pixels = _turn(as_array(_resized(picture, (across, down), (left, top), spec.interpolation, reducing_gap)), turn)
    if spec.color == "bgr":
        pixels = pixels[:, :, ::-1]
    if (x.content_px, y.content_px) != (spec.width, spec.height):
        out[:] = spec.fill if spec.crop_mode == "border" else 0
        out = out[y.pad_px : y.pad_px + y.content_px, x.pad_px : x.pad_px + x.content_px]
    out[:] = pixels


def _start(axis: Axis, is_mirrored: bool) -> int:
    """The first resized pixel that the target shows, counted along the stored axis."""
    return axis.resized_px - axis.crop_px - axis.content_px if is_mirrored else axis.crop_px


def _resized(
    picture: Picture, axes: tuple[Axis, Axis], start: tuple[int, int], interpolation: str, reducing_gap: float | None
) -> Image.Image:
    """The shown part of a picture, resized: of ``axes`` (across, down as stored), from resized pixel ``start`` on."""
    image, filter_ = picture.image, _FILTERS[interpolation]
    whole, size = (axes[0].resized_px, axes[1].resized_px), (axes[0].content_px, axes[1].content_px)
    stop = (start[0] + size[0], start[1] + size[1])
    if interpolation == "nearest" and whole[0] * whole[1] <= _MAX_NEAREST_PIXELS:
        return image.resize(whole, filter_).crop((*start, *stop))
    # stored pixels of this image that one resized pixel covers
    scale = [length / px / picture.reduction for length, px in zip(picture.stored_size, whole, strict=True)]
    box = (
        start[0] * scale[0],
        start[1] * scale[1],
        min(stop[0] * scale[0], image.width),
        min(stop[1] * scale[1], image.height),
    )
    if size == image.size and box == (0, 0, *size):
        return image
    if _is_vertical_first(image.size, size) and not _is_vertical_first(picture.stored_size, whole):
        margin = _SUPPORT_PX[interpolation] * max(1.0, scale[1]) + 1
        top, bottom = max(0, int(box[1] - margin)), min(image.height, int(box[3] + margin) + 1)
        image, box = picture.rows(top, bottom), (box[0], box[1] - top, box[2], box[3] - top)
    return image.resize(size, filter_, box, reducing_gap)


def _is_vertical_first(have: tuple[int, int], want: tuple[int, int]) -> bool:
    """Whether Pillow 13 resizes along the columns first, by (width, height) alone. Source: Pillow's pull request 9549.

    Each pass rounds and clips, so the order shows: mean |d| 0.25, at most 10 of 255. To give the reference's pixels,
    the shown part must be resized in the order in which the whole would be; without the rows outside it, it is.
    """
    return have[1] > want[1] and have[1] - want[1] > 2 * (have[0] - want[0])
