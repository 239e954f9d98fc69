"""Bytes to pixels: simplejpeg for JPEG, Pillow for the rest, both held to the written policy below.

Pixel policy: gray stays gray and is repeated on three channels; a palette gives its colours; alpha and tRNS are
dropped, not composited (Pillow's ``convert("RGB")``, which the reference of timm and torchvision uses, does so); CMYK
and YCCK go through Pillow's plain conversion with Adobe's inversion undone; 9 to 16 bits are scaled to 8 by their high
bits, never clipped; 32-bit and float pixels are refused (``format_refused``), as no white point is agreed for them; ICC
profiles are not applied; of an animation or a multi-page file the first frame counts.

Damage policy: what ends early is ``truncated``. A JPEG whose decoder warns is accepted where the damage lies outside
the entropy data (extraneous bytes) or is bounded by restart markers, and Pillow reads it too; else it is ``corrupt``.

Example:
    >>> picture = load(data, Limits(), needed=spec.resized)
    >>> picture.size, picture.reduction
    ((500, 375), 8)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from eagleray.vision.codec_faults import CODEC_FAULTS, pillow_guard, refusal
from eagleray.vision.image_containers import read_gif, read_jpeg, read_png, read_tiff, read_webp
from eagleray.vision.image_headers import (
    Header,
    ImageRefused,
    JpegFrame,
    Limits,
    Reason,
    check_bytes,
    check_size,
    exif_orientation,
    sniff,
    upright,
    xmp_orientation,
)

# From the upright (width, height) of a picture to the one that it will be resized to.
Resized = Callable[[int, int], tuple[int, int]]

# A reduced decode must stay this much larger than the resize that follows. Against the exact resize, on a 10 MP photo
# of foliage (the worst natural picture we have): mean |d| 2.1 at 1.25, 1.5 at 1.46, 1.0 at 1.8 of 255 (docs/log.md).
# 1.45 still lets 12 MP (4000 x 3000) go to 256 px by way of 1/8.
_REDUCTION_MARGIN = 1.45


@dataclass(frozen=True, slots=True)
class Picture:
    """Decoded pixels.

    Attributes:
        header: The upright size.
        turn: The EXIF orientation, 1 to 8, still to apply to ``pixels`` (Pillow turns a TIFF by itself).
        source: uint8 (height, width, 1 or 3), or an image in mode L or RGB: as its decoder gave it.
        reduction: 1, 2, 4 or 8: how many stored pixels one pixel of ``source`` stands for, along each axis.
    """

    header: Header
    turn: int
    source: NDArray[np.uint8] | Image.Image
    reduction: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the whole picture as ``source`` lies, at full size."""
        return (self.header.height, self.header.width) if self.turn >= 5 else (self.header.width, self.header.height)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of ``source``."""
        if isinstance(self.source, np.ndarray):
            return self.source.shape[1], self.source.shape[0]
        return self.source.size

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 (height, width, 1 or 3), read-only where it is a copy of an image."""
        return self.source if isinstance(self.source, np.ndarray) else as_array(self.source)

    def image(self) -> Image.Image:
        """The same in mode L or RGB."""
        if not isinstance(self.source, np.ndarray):
            return self.source
        return Image.fromarray(self.source[:, :, 0] if self.source.shape[2] == 1 else self.source)


_PLUGINS = {
    "PNG": "PIL.PngImagePlugin",
    "WEBP": "PIL.WebPImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "GIF": "PIL.GifImagePlugin",
    "BMP": "PIL.BmpImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
}
# Pillow mode -> mode without palette, alpha or ink. A mode that is in neither table is refused.
_PLAIN_MODES = {
    "L": "L",
    "RGB": "RGB",
    "1": "L",
    "LA": "L",
    "P": "RGB",
    "PA": "RGB",
    "RGBA": "RGB",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


def read_header(data: bytes, limits: Limits) -> Header:
    """Format, upright size and orientation; no pixel is allocated.

    Raises:
        ImageRefused: With any reason but ``poison`` and ``unreadable``.
    """
    format_ = _checked_format(data, limits)
    if format_ == "JPEG":
        return read_jpeg(data, limits).header
    known, _ = _read_container(data, format_, limits)
    if known is not None:
        return known
    with pillow_guard():
        return _opened(data, format_, limits)[1]


def load(data: bytes, limits: Limits, *, needed: Resized | None = None) -> Picture:
    """Decodes once, whole.

    Args:
        data: A file's bytes.
        limits: Caps.
        needed: What the caller will resize the whole picture to. When given, a JPEG is decoded at 1/2, 1/4 or 1/8
            where that leaves enough for the resize.

    Raises:
        ImageRefused: With any reason but ``unreadable``.
    """
    _keep_freed_memory()
    format_ = _checked_format(data, limits)
    if format_ == "JPEG":
        return _load_jpeg(data, read_jpeg(data, limits), needed)
    with pillow_guard():
        return _load_by_pillow(data, format_, limits)


def load_rgb(data: bytes, limits: Limits) -> tuple[Header, NDArray[np.uint8], int]:
    """Decodes once, whole, at full size, into an array.

    Returns:
        The header; uint8 (height, width, 3 or 1) as stored; the EXIF orientation still to apply.

    Raises:
        ImageRefused: With any reason but ``unreadable``.
    """
    if _checked_format(data, limits) == "JPEG":
        frame = read_jpeg(data, limits)
        pixels = _decode_jpeg(data, frame, "RGB", 1)
        if pixels is not None:
            return frame.header, pixels, frame.header.orientation
    picture = load(data, limits)
    try:
        return picture.header, picture.pixels(), picture.turn
    except MemoryError as fault:
        raise refusal(fault, picture.header.format) from fault


def as_array(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (height, width, 3 or 1), read-only, of an image in mode RGB or L."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)


def _checked_format(data: bytes, limits: Limits) -> str:
    check_bytes(data, limits)
    return sniff(data)


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    """Lets glibc keep up to 16 MB of freed memory a heap, by freeing one block of 8 MB (which was never touched).

    By its defaults it hands the 1.2 MB of a 500 x 375 decode back after each image and faults them in again: 310 page
    faults, 1.2 of 3.8 ms. The thresholds follow the largest block that was freed. Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    np.empty(8 * 2**20, np.uint8)


# ---- JPEG


def _reduction(stored: tuple[int, int], needed: tuple[int, int]) -> int:
    """The strongest reduction that libjpeg-turbo has SIMD code for and that leaves enough for the resize.

    The other N/8 do not pay: measured at 500 x 375, 5/8 to 7/8 take longer than the whole.
    """
    for factor in (8, 4, 2):
        if min(stored) >= 64 and all(
            -(-have // factor) >= _REDUCTION_MARGIN * need for have, need in zip(stored, needed, strict=True)
        ):
            return factor
    return 1


def _load_jpeg(data: bytes, frame: JpegFrame, needed: Resized | None) -> Picture:
    header, factor = frame.header, 1
    if needed is not None:
        across, down = needed(header.width, header.height)
        factor = _reduction(header.stored_size, (down, across) if header.orientation >= 5 else (across, down))
    pixels = _decode_jpeg(data, frame, "GRAY" if frame.num_components == 1 else "RGB", factor)
    if pixels is None:
        return _load_jpeg_by_pillow(data, header)
    return Picture(header, header.orientation, pixels, factor)


def _decode_jpeg(data: bytes, frame: JpegFrame, colorspace: str, factor: int) -> NDArray[np.uint8] | None:
    """uint8 (height, width, channels) as stored, at 1/factor; None where Pillow has to have the last word.

    Raises:
        ImageRefused: ``truncated``, ``corrupt`` or ``poison``.
    """
    if frame.num_components == 4:
        return None
    width, height = frame.header.stored_size
    smallest = {} if factor == 1 else {"min_width": -(-width // factor), "min_height": -(-height // factor)}
    pixels: NDArray[np.uint8]
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace, **smallest)
    except MemoryError as fault:
        raise refusal(fault, "JPEG") from fault
    except (ValueError, RuntimeError) as fault:
        reason = _judge_warning(str(fault), frame)
        if reason is not None:
            raise ImageRefused(reason, f"JPEG: {str(fault)[:200]}") from fault
        return None
    if pixels.shape[:2] != (-(-height // factor), -(-width // factor)):
        raise ImageRefused(Reason.CORRUPT, f"JPEG: {width} x {height} in its header, {pixels.shape} read")
    return pixels


def _judge_warning(text: str, frame: JpegFrame) -> Reason | None:
    """The verdict on what libjpeg-turbo said; None where Pillow has to say whether it can be read.

    Source: libjpeg-turbo 3, src/jerror.h, the JWRN_ messages.
    """
    if "Premature end of JPEG file" in text:
        return Reason.TRUNCATED
    if text.startswith("Corrupt JPEG data") and "extraneous bytes" not in text and not frame.has_restarts:
        return Reason.CORRUPT
    return None


def _load_jpeg_by_pillow(data: bytes, header: Header) -> Picture:
    """For CMYK and YCCK, odd sampling, and harmless extra bytes: Pillow's decoder says whether it can be read."""
    with pillow_guard():
        import_module("PIL.JpegImagePlugin")
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG",))
            image.load()
            return Picture(header, header.orientation, _plain(image))
        except (MemoryError, *CODEC_FAULTS) as fault:
            raise refusal(fault, "JPEG") from fault


# ---- all other formats


def _read_container(data: bytes, format_: str, limits: Limits) -> tuple[Header | None, bytes]:
    """The header where our own walk of the container knows it, and the bytes that a codec is to see."""
    if format_ == "PNG":
        return read_png(data, limits)
    if format_ == "WEBP":
        return read_webp(data, limits), data
    if format_ == "TIFF":
        return read_tiff(data, limits), data
    if format_ == "GIF":
        read_gif(data, limits)  # the first frame may be larger than the screen: Pillow says the size
    return None, data


def _opened(data: bytes, format_: str, limits: Limits) -> tuple[Image.Image, Header]:
    """The image as Pillow opens it, no pixel loaded, and its header; the caps are checked before and after."""
    known, data = _read_container(data, format_, limits)
    plugin = import_module(_PLUGINS[format_])
    if format_ == "AVIF":
        plugin.DEFAULT_MAX_THREADS = 1  # type: ignore[attr-defined]  # one actor a core: no threads beside ours
    try:
        image = Image.open(io.BytesIO(data), formats=(format_,))
        check_size(*image.size, limits)
        if known is None:
            exif, xmp = image.info.get("exif") or b"", image.info.get("xmp") or b""
            known = upright(format_, *image.size, exif_orientation(exif) or xmp_orientation(xmp) or 1)
    except (MemoryError, *CODEC_FAULTS) as fault:
        raise refusal(fault, format_) from fault
    if image.mode not in _PLAIN_MODES and image.mode not in _DEEP_MODES:
        raise ImageRefused(Reason.FORMAT_REFUSED, f"{format_} pixels of mode {image.mode} have no agreed scale")
    return image, known


def _load_by_pillow(data: bytes, format_: str, limits: Limits) -> Picture:
    image, header = _opened(data, format_, limits)
    try:
        image.load()
        plain = _plain(image)
    except (MemoryError, *CODEC_FAULTS) as fault:
        raise refusal(fault, format_) from fault
    picture = Picture(header, 1 if format_ == "TIFF" else header.orientation, plain)
    if plain.size != picture.stored_size:
        raise ImageRefused(Reason.CORRUPT, f"{format_}: {picture.stored_size} in its header, {plain.size} read")
    return picture


def _plain(image: Image.Image) -> Image.Image:
    """A loaded image in mode L or RGB by the policy of this module."""
    if image.mode in _DEEP_MODES:
        return _eight_bits(image)
    mode = _PLAIN_MODES.get(image.mode)
    if mode is None:
        raise ImageRefused(Reason.FORMAT_REFUSED, f"pixels of mode {image.mode} have no agreed scale")
    # with tRNS in place Pillow would look for the transparent colour and warn; alpha is dropped here
    image.info.pop("transparency", None)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 by the high bits; a TIFF of fewer bits (12) says so in BitsPerSample."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
    shift = bits - 8 if 8 < bits < 16 else 8
    return Image.fromarray((np.asarray(image) >> shift).astype(np.uint8))
