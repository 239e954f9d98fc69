"""Bytes to pixels: simplejpeg for JPEG, Pillow for the rest, both held to the written policy below.

Pixel policy (docs/adr of the images module): gray stays gray and is repeated on three channels; a palette gives its colours;
alpha and tRNS are dropped, not composited (as Pillow's ``convert("RGB")``, which timm's reference uses); CMYK and YCCK go through
Pillow's plain conversion, Adobe's inversion undone; 9 to 16 bits are scaled to 8 by their high bits, never clipped; 32-bit and
float pixels are refused (``format_refused``), as no white point is agreed for them; ICC profiles are not applied; of an
animation or a multi-page file the first frame counts.

Damage policy: what ends early is ``truncated``. A JPEG whose decoder warns is accepted where the damage is outside the entropy
data (extraneous bytes) or bounded by restart markers, and where Pillow reads it too; else it is ``corrupt``.

Example:
    >>> picture = load(data, Limits(), needed=(341, 256))
    >>> picture.image.size, picture.reduction
    ((500, 375), 1)
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from eagleray.vision.image_containers import read_jpeg, read_png, read_tiff, read_webp
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


@dataclass(frozen=True, slots=True)
class Picture:
    """Decoded pixels.

    Attributes:
        header: The upright size.
        turn: The EXIF orientation, 1 to 8, still to apply to ``image`` (Pillow turns a TIFF by itself).
        image: Mode L or RGB. It may lie in memory of its own or in a buffer that it keeps alive.
        reduction: 1, 2, 4 or 8: how many stored pixels one pixel of ``image`` stands for, along each axis.
    """

    header: Header
    turn: int
    image: Image.Image
    reduction: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the whole picture as ``image`` lies, at full size."""
        return self.header.stored_size if self.turn == self.header.orientation else (self.header.width, self.header.height)


# Whatever a codec raises on broken input. Found by fuzzing and by reading Pillow's plugins; MemoryError is apart.
_CODEC_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
)
_TRUNCATED_TEXTS = ("truncated", "premature end", "buffer is not large enough", "unexpected end", "not enough data")
_PLUGINS = {
    "JPEG": "PIL.JpegImagePlugin",
    "PNG": "PIL.PngImagePlugin",
    "WEBP": "PIL.WebPImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "GIF": "PIL.GifImagePlugin",
    "BMP": "PIL.BmpImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
}
# Pillow mode -> mode without palette, alpha or ink. A mode that is not here is refused.
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


def refusal(fault: BaseException, doing: str) -> ImageRefused:
    """The typed reason for what a codec raised."""
    if isinstance(fault, MemoryError):
        return ImageRefused(Reason.POISON, f"{doing} needs more memory than there is")
    if isinstance(fault, Image.DecompressionBombError):
        return ImageRefused(Reason.TOO_LARGE, "over Pillow's own cap of pixels")
    text = str(fault).lower()
    if "decompressed data too large" in text:
        return ImageRefused(Reason.TOO_LARGE, "metadata that inflates beyond Pillow's cap")
    is_cut = isinstance(fault, EOFError) or any(part in text for part in _TRUNCATED_TEXTS)
    detail = "the header cannot be read" if isinstance(fault, UnidentifiedImageError) else str(fault)[:200]
    return ImageRefused(Reason.TRUNCATED if is_cut else Reason.CORRUPT, f"{doing}: {detail or type(fault).__name__}")


class _PillowGuard:
    """Holds Pillow strict and silent while any thread decodes, whatever the rest of the process has set.

    ``ImageFile.LOAD_TRUNCATED_IMAGES`` and the warning filters are global. The first thread in sets them, the last one out
    restores them; ``warnings.catch_warnings`` alone is not safe between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._accepts_truncated = False
        self._filter: object = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._accepts_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._filter = warnings.filters[0]
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    ImageFile.LOAD_TRUNCATED_IMAGES = self._accepts_truncated
                    if self._filter in warnings.filters:
                        warnings.filters.remove(self._filter)  # type: ignore[attr-defined]


_pillow_guard = _PillowGuard()


def read_header(data: bytes, limits: Limits) -> Header:
    """Format, upright size and orientation; no pixel is allocated.

    Raises:
        ImageRefused: With any reason but ``poison`` and ``unreadable``.
    """
    format_ = _checked_format(data, limits)
    if format_ == "JPEG":
        return read_jpeg(data, limits).header
    if format_ == "PNG":
        return read_png(data, limits)[0]
    if format_ == "WEBP":
        return read_webp(data, limits)
    if format_ == "TIFF":
        return read_tiff(data, limits)
    with _pillow_guard():
        return _opened(data, format_, limits)[1]


def load(data: bytes, limits: Limits, *, needed: Callable[[int, int], tuple[int, int]] | None = None) -> Picture:
    """Decodes once, whole.

    Args:
        data: A file's bytes.
        limits: Caps.
        needed: From the upright (width, height) in pixels to the one that the caller will resize the whole picture to.
            When given, a JPEG is decoded at 1/2, 1/4 or 1/8 where that still is no smaller.

    Raises:
        ImageRefused: With any reason but ``unreadable``.
    """
    format_ = _checked_format(data, limits)
    if format_ == "JPEG":
        return _load_jpeg(data, read_jpeg(data, limits), needed)
    with _pillow_guard():
        return _load_by_pillow(data, format_, limits)


def _checked_format(data: bytes, limits: Limits) -> str:
    check_bytes(data, limits)
    return sniff(data)


# ---- JPEG


def _reduction(stored: tuple[int, int], needed: tuple[int, int]) -> int:
    """The strongest of the reductions that libjpeg-turbo has SIMD code for whose result is no smaller than needed."""
    for factor in (8, 4, 2):
        if -(-stored[0] // factor) >= needed[0] and -(-stored[1] // factor) >= needed[1] and min(stored) >= 64:
            return factor
    return 1


def _load_jpeg(data: bytes, frame: JpegFrame, needed: Callable[[int, int], tuple[int, int]] | None) -> Picture:
    header = frame.header
    stored = header.stored_size
    factor = 1
    if needed is not None:
        across, down = needed(header.width, header.height)
        factor = _reduction(stored, (down, across) if header.orientation >= 5 else (across, down))
    if frame.num_components == 4:
        return _load_jpeg_by_pillow(data, header)
    try:
        pixels = _decode_jpeg(data, "GRAY" if frame.num_components == 1 else "RGBX", stored, factor)
    except MemoryError as fault:
        raise refusal(fault, "JPEG") from fault
    except (ValueError, RuntimeError) as fault:
        reason = _judge_warning(str(fault), frame)
        if reason is not None:
            raise ImageRefused(reason, f"JPEG: {str(fault)[:200]}") from fault
        return _load_jpeg_by_pillow(data, header)
    height, width = pixels.shape[:2]
    if pixels.shape[2] == 1:
        return Picture(header, header.orientation, Image.frombuffer("L", (width, height), pixels, "raw", "L", 0, 1), factor)
    return Picture(header, header.orientation, _as_rgb(pixels), factor)


def _decode_jpeg(data: bytes, colorspace: str, stored: tuple[int, int], factor: int) -> NDArray[np.uint8]:
    """uint8 (height, width, channels) at 1/factor; raises ValueError on any warning of the decoder."""
    if factor == 1:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace)
        return pixels
    width, height = -(-stored[0] // factor), -(-stored[1] // factor)
    pixels = simplejpeg.decode_jpeg(data, colorspace, min_height=height, min_width=width)
    return pixels


def _as_rgb(pixels_rgbx: NDArray[np.uint8]) -> Image.Image:
    """uint8 (height, width, 4) as an RGB image, over the same memory where Pillow can.

    Pillow keeps RGB in 4 bytes a pixel, so no byte need move: ``fromarray`` would copy (0.1 ms at 500 x 375, 9 ms at 12 MP),
    and resizing RGB is a fifth faster than resizing RGBX.
    """
    size = (pixels_rgbx.shape[1], pixels_rgbx.shape[0])
    if _maps_rgb():
        return Image.Image()._new(Image.core.map_buffer(pixels_rgbx, size, "raw", 0, ("RGB", 0, 1)))
    return Image.frombuffer("RGBX", size, pixels_rgbx, "raw", "RGBX", 0, 1).convert("RGB")


@lru_cache(maxsize=1)
def _maps_rgb() -> bool:
    """Whether this Pillow lays an RGB image over a buffer. What ``frombuffer`` calls does; it is not Pillow's public face."""
    probe = np.array([[[1, 2, 3, 4], [5, 6, 7, 8]]], np.uint8)
    try:
        image = Image.Image()._new(Image.core.map_buffer(probe, (2, 1), "raw", 0, ("RGB", 0, 1)))
        return image.mode == "RGB" and image.tobytes() == bytes([1, 2, 3, 5, 6, 7])
    except (AttributeError, TypeError, ValueError):
        return False


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
    """For CMYK and YCCK, odd sampling, and files with harmless extra bytes: Pillow's decoder has the last word."""
    with _pillow_guard():
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG",))
            image.load()
            return Picture(header, header.orientation, _plain(image))
        except (MemoryError, Image.DecompressionBombError, *_CODEC_FAULTS) as fault:
            raise refusal(fault, "JPEG") from fault


# ---- all other formats


def _opened(data: bytes, format_: str, limits: Limits) -> tuple[Image.Image, Header]:
    """The image as Pillow opens it, no pixel loaded, and its header; the caps are checked before and after."""
    known: Header | None = None
    if format_ == "PNG":
        known, data = read_png(data, limits)
    elif format_ == "WEBP":
        known = read_webp(data, limits)
    elif format_ == "TIFF":
        known = read_tiff(data, limits)
    plugin = import_module(_PLUGINS[format_])
    if format_ == "AVIF":
        plugin.DEFAULT_MAX_THREADS = 1  # type: ignore[attr-defined]
    try:
        image = Image.open(io.BytesIO(data), formats=(format_,))
        check_size(*image.size, limits)
        if known is None:
            orientation = exif_orientation(image.info.get("exif") or b"") or xmp_orientation(
                image.info.get("xmp") or b""
            )
            known = upright(format_, *image.size, orientation or 1)
    except (MemoryError, Image.DecompressionBombError, *_CODEC_FAULTS) as fault:
        raise refusal(fault, format_) from fault
    if image.mode not in _PLAIN_MODES and image.mode not in _DEEP_MODES:
        raise ImageRefused(Reason.FORMAT_REFUSED, f"{format_} pixels of mode {image.mode} have no agreed scale")
    return image, known


def _load_by_pillow(data: bytes, format_: str, limits: Limits) -> Picture:
    image, header = _opened(data, format_, limits)
    try:
        image.load()
        plain = _plain(image)
    except (MemoryError, Image.DecompressionBombError, *_CODEC_FAULTS) as fault:
        raise refusal(fault, format_) from fault
    picture = Picture(header, 1 if format_ == "TIFF" else header.orientation, plain)
    if plain.size != picture.stored_size:
        raise ImageRefused(Reason.CORRUPT, f"{format_}: {picture.stored_size} by its header, {plain.size} by its pixels")
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
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    deep = np.asarray(image)
    return Image.fromarray((deep >> (bits - 8 if 8 < bits < 16 else 8)).astype(np.uint8))
