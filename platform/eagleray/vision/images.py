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

from eagleray.vision.codec_faults import refusal
from eagleray.vision.codecs import Picture, as_array, load, load_rgb, read_header
from eagleray.vision.image_headers import Header, ImageRefused, Limits, Reason
from eagleray.vision.preprocessing import Axis, ImageSpec, normalize
from eagleray.vision.resample import PILLOW_FILTERS, Window, resize

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
    starts = _start(across, turn in (2, 3, 7, 8)), _start(down, turn in (3, 4, 6, 7))
    windows = [
        Window.of_whole(length / picture.reduction, axis.resized_px, start, axis.content_px)
        for length, axis, start in zip(picture.stored_size, (across, down), starts, strict=True)
    ]
    if (x.content_px, y.content_px) != (spec.width, spec.height):
        out[:] = spec.fill if spec.crop_mode == "border" else 0
        out = out[y.pad_px : y.pad_px + y.content_px, x.pad_px : x.pad_px + x.content_px]
    is_direct = turn == 1 and spec.color == "rgb"
    shown = out if is_direct else np.empty((windows[1].count, windows[0].count, 3), np.uint8)
    _resize_into(shown, picture, (windows[0], windows[1]), spec.interpolation, reducing_gap)
    if not is_direct:
        upright = _turn(shown, turn)
        out[:] = upright[:, :, ::-1] if spec.color == "bgr" else upright


def _start(axis: Axis, is_mirrored: bool) -> int:
    """The first resized pixel that the target shows, counted along the stored axis."""
    return axis.resized_px - axis.crop_px - axis.content_px if is_mirrored else axis.crop_px


def _resize_into(
    out: NDArray[np.uint8],
    picture: Picture,
    windows: tuple[Window, Window],
    interpolation: str,
    reducing_gap: float | None,
) -> None:
    """The shown part of a picture as it is stored, resized into uint8 (height, width, 3)."""
    x, y = windows
    if interpolation == "nearest" and x.total * y.total <= _MAX_NEAREST_PIXELS:
        image = picture.image().resize((x.total, y.total), PILLOW_FILTERS["nearest"])
        found = as_array(image.crop((x.first, y.first, x.first + x.count, y.first + y.count)))
    elif interpolation == "nearest" or _is_far_larger(windows, reducing_gap):
        left, top = (window.first * window.end / window.total for window in windows)
        right, bottom = (_stop(window, px) for window, px in zip(windows, picture.size, strict=True))
        box = (left, top, right, bottom)
        found = as_array(picture.image().resize((x.count, y.count), PILLOW_FILTERS[interpolation], box, reducing_gap))
    else:
        resize(picture.pixels(), out, x, y, interpolation=interpolation)
        return
    out[:] = found


def _stop(window: Window, length_px: int) -> float:
    return min((window.first + window.count) * window.end / window.total, length_px)


def _is_far_larger(windows: tuple[Window, Window], reducing_gap: float | None) -> bool:
    """Whether Pillow, told of this gap, would average whole pixels first."""
    return reducing_gap is not None and any(int(w.end / w.total / reducing_gap) > 1 for w in windows)
