"""The resize of every pixel that a model sees: Pillow's antialiased filters bit for bit, several times as fast.

resample.c is compiled when Eagleray is installed and loaded by ctypes, which releases the interpreter's lock. It has
copies for AVX-512 and AVX2; all give the same bits. Where it was not built (no C compiler at install time), Pillow
resizes the whole and the window is cut out: the same pixels, slower; ``doctor`` says so, run.json keeps ``kernel()``.

Example:
    >>> out = np.empty((224, 224, 3), np.uint8)
    >>> x, y = Window.of_whole(500, 341, 58, 224), Window.of_whole(375, 256, 16, 224)
    >>> resize(pixels, out, x, y, interpolation="bicubic")
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eagleray.core.errors import CapabilityError

INTERFACE = 2  # what eagleray_interface of resample.c has to answer
SETS = ("c", "avx2", "avx512")  # what eagleray_choose answers, in its order
FILTERS = {"bilinear": 0, "bicubic": 1, "lanczos": 2}
PILLOW_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Without the kernel the whole is resized and cut, as in the reference; of a very long picture only the window is, which
# may differ in the last bit, as Pillow holds a box in 32-bit floats.
MOST_WHOLE_PIXELS = 4_000_000


@dataclass(frozen=True, slots=True)
class Window:
    """One axis of a resize: which part of the source becomes ``total`` pixels, and which of those are wanted.

    Attributes:
        total: Pixels that [begin, end) of the source becomes.
        first: The first of them that is wanted.
        count: How many are.
        begin: Where the part begins, in source pixels; the filter may read beyond it, as Pillow's ``box``.
        end: Where it ends.
        is_mirrored: Whether the wanted pixels are written from the last to the first.
    """

    total: int
    first: int
    count: int
    begin: float
    end: float
    is_mirrored: bool = False

    @classmethod
    def of_whole(cls, length_px: float, total: int, first: int, count: int) -> Window:
        """The window of a whole axis."""
        return cls(total, first, count, 0.0, length_px)


class _Axis(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("have", "total", "first", "count", "is_mirrored")),
        *((name, ctypes.c_float) for name in ("begin", "end")),
    ]


def resize(
    pixels_u8_hwc: NDArray[np.uint8],
    out: NDArray[np.uint8],
    x: Window,
    y: Window,
    *,
    interpolation: str,
    is_down_first: bool | None = None,
) -> None:
    """Resizes a picture into ``out``.

    Args:
        pixels_u8_hwc: uint8 (height, width, channels), 1, 3 or 4 channels; gray is repeated, a fourth is not read.
        out: uint8 (y.count, x.count, 3); its pixels lie one after the other in a row.
        x: Along a row.
        y: Along a column.
        interpolation: ``bilinear``, ``bicubic`` or ``lanczos``.
        is_down_first: The order of the two passes, each of which rounds; None: as Pillow would, of the whole.

    Raises:
        MemoryError: There is none left.
        CapabilityError: The kernel that is installed was built from another source.

    Source:
        Pillow 13, src/libImaging/Resample.c.
    """
    height, width, channels = pixels_u8_hwc.shape
    if is_down_first is None:
        is_down_first = is_vertical_first((width, height), (x.total, y.total))
    library = _library()
    if library is None:
        _resize_by_pillow(pixels_u8_hwc, out, x, y, interpolation)
        return
    source = _with_dense_pixels(pixels_u8_hwc)
    target = _with_dense_pixels(out)
    failed = library.eagleray_resize(
        source.ctypes.data,
        source.strides[0],
        channels,
        _Axis(width, x.total, x.first, x.count, x.is_mirrored, x.begin, x.end),
        _Axis(height, y.total, y.first, y.count, y.is_mirrored, y.begin, y.end),
        FILTERS[interpolation],
        is_down_first,
        target.ctypes.data,
        target.strides[0],
    )
    if failed:
        raise MemoryError(f"no memory to resize {width} x {height}")
    if target is not out:
        out[:] = target


def to_planes(
    pixels_u8_hwc: NDArray[np.uint8], scale: NDArray[np.float32], bias: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """float32 planes ``pixel * scale + bias``, each operation rounded.

    Args:
        pixels_u8_hwc: uint8 (height, width, 3).
        scale: float32 (3,).
        bias: float32 (3,).
        out: float32 (3, height, width), contiguous.
    """
    library = _library()
    if library is not None and pixels_u8_hwc.flags.c_contiguous and out.flags.c_contiguous:
        count = pixels_u8_hwc.shape[0] * pixels_u8_hwc.shape[1]
        pointers = (scale.ctypes.data, bias.ctypes.data, out.ctypes.data)
        library.eagleray_planes(pixels_u8_hwc.ctypes.data, count, *pointers)
        return
    for channel in range(3):  # converting plane by plane beats a strided multiply: 0.10 against 0.22 ms at 224 x 224
        out[channel] = pixels_u8_hwc[:, :, channel]
    out *= scale[:, None, None]
    out += bias[:, None, None]


def kernel() -> str:
    """What resizes here: ``avx512``, ``avx2``, ``c``, or ``pillow`` where resample.c was not built."""
    library = _library()
    return "pillow" if library is None else SETS[library.eagleray_choose(len(SETS) - 1)]


def is_vertical_first(have: tuple[int, int], want: tuple[int, int]) -> bool:
    """Whether Pillow 13 resizes along the columns first, by (width, height) alone. Source: Pillow's pull request 9549.

    Each pass rounds and clips, so the order shows: mean |d| 0.25, at most 10 of 255.
    """
    return have[1] > want[1] and have[1] - want[1] > 2 * (have[0] - want[0])


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    folder = Path(__file__).resolve().parent
    path = next((p for suffix in EXTENSION_SUFFIXES if (p := folder / f"_resample{suffix}").is_file()), None)
    if path is None or os.environ.get("EAGLERAY_KERNEL") == "pillow":
        return None
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "eagleray_interface") or library.eagleray_interface() != INTERFACE:
        raise CapabilityError(
            f"{path.name} was built from another resample.c than the one beside it",
            expected=f"a kernel of interface {INTERFACE}",
            fix="build it again: pip install -e . in the checkout",
        )
    axis, size, pointer, number = ctypes.POINTER(_Axis), ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int32
    library.eagleray_resize.argtypes = [pointer, size, number, axis, axis, number, number, pointer, size]
    library.eagleray_planes.argtypes = [pointer, number, pointer, pointer, pointer]
    library.eagleray_planes.restype = None
    library.eagleray_choose(len(SETS) - 1)
    return library


def _with_dense_pixels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The array itself where the bytes of a row lie one after the other, else a copy."""
    channels = pixels.shape[2]
    is_dense = pixels.strides[1:] == (channels, 1) and pixels.strides[0] > 0
    return pixels if is_dense else np.ascontiguousarray(pixels)


def _resize_by_pillow(
    pixels: NDArray[np.uint8], out: NDArray[np.uint8], x: Window, y: Window, interpolation: str
) -> None:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels[:, :, :3]))
    filter_ = PILLOW_FILTERS[interpolation]
    if x.total * y.total <= MOST_WHOLE_PIXELS:
        resized = image.resize((x.total, y.total), filter_, (x.begin, y.begin, x.end, y.end))
        found = resized.crop((x.first, y.first, x.first + x.count, y.first + y.count))
    else:
        wide, high = ((axis.end - axis.begin) / axis.total for axis in (x, y))
        left, top = x.begin + x.first * wide, y.begin + y.first * high
        right, bottom = min(left + x.count * wide, x.end), min(top + y.count * high, y.end)
        found = image.resize((x.count, y.count), filter_, (left, top, right, bottom))
    array = np.asarray(found)[:: -1 if y.is_mirrored else 1, :: -1 if x.is_mirrored else 1]
    out[:] = array if array.ndim == 3 else array[:, :, None]
