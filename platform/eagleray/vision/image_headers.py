"""What an image file says of itself, read from its first bytes before any pixel exists: format, size, orientation.

Everything here runs on bytes that nobody has looked at yet. It allocates nothing in proportion to what the header
claims and refuses, with a typed reason, what is empty, no image, a format outside the allow-list, or beyond the caps.
The allow-list is JPEG, PNG, WEBP, AVIF, GIF, BMP and TIFF: what Pillow decodes without outside programs and with codecs
under active fuzzing.

Example:
    >>> read_header(png_bytes, Limits())
    Header(format='PNG', width=640, height=480, orientation=1)
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why an image was set aside: one closed list, the same in every table and report."""

    EMPTY = "empty"
    NOT_IMAGE = "not_image"
    FORMAT_REFUSED = "format_refused"
    TOO_LARGE = "too_large"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNREADABLE = "unreadable"
    POISON = "poison"


class ImageRefused(Exception):
    """One image that cannot be used, and why. It concerns this image only; a run goes on.

    Args:
        reason: One of the closed list.
        detail: What was found, in one line, without image content or file names.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps that are checked before pixels are allocated."""

    max_pixels: int = 25_000_000
    max_side_px: int = 16_384
    max_bytes: int = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Header:
    """An image's format and its size in pixels as a person sees it, after the EXIF orientation.

    Attributes:
        orientation: EXIF orientation, 1 to 8, that turns the stored picture into the upright one.
    """

    format: str
    width: int
    height: int
    orientation: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) in pixels as stored, before the orientation."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """What decides how a JPEG is decoded.

    Attributes:
        header: Format, upright size and orientation.
        num_components: 1 gray, 3 colour, 4 CMYK or YCCK.
        has_restarts: Whether restart markers bound the damage that a lost byte does.
    """

    header: Header
    num_components: int
    has_restarts: bool


# Formats that we know and refuse, by their first bytes: (offset, magic, name).
_REFUSED_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"8BPS", "PSD"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"\xd7\xcd\xc6\x9a", "WMF"),
    (0, b"\x01\x00\x09\x00\x00\x03", "WMF"),
    (40, b" EMF", "EMF"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"jP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n\x87\n", "JPEG XL"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"\x00\x00\x02\x00", "CUR"),
    (0, b"icns", "ICNS"),
    (0, b"DDS ", "DDS"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"qoif", "QOI"),
    (0, b"\x01\xda", "SGI"),
    (0, b"/* XPM */", "XPM"),
    (0, b"\x59\xa6\x6a\x95", "SUN raster"),
    (0, b"gimp xcf", "XCF"),
    (0, b"AT&TFORM", "DjVu"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (128, b"DICM", "DICOM"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"FUJIFILMCCD-RAW", "camera raw"),
    (0, b"IIU\x00", "camera raw"),
    (0, b"IIRO", "camera raw"),
    (8, b"CR\x02", "camera raw"),
)
_REFUSED_BRANDS = {
    b"heic": "HEIF",
    b"heix": "HEIF",
    b"heim": "HEIF",
    b"heis": "HEIF",
    b"hevc": "HEIF",
    b"hevx": "HEIF",
    b"crx ": "camera raw",
}
# Of OS/2 1 and 2 and Windows 3, 4 and 5; "BM" alone begins many a text.
_BMP_HEADER_BYTES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
_PNM = re.compile(rb"P[1-7F f]\s")
_SVG = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]", re.DOTALL)


def sniff(data: bytes) -> str:
    """The format by the first bytes, whatever the file is called.

    Returns:
        One of JPEG, PNG, WEBP, AVIF, GIF, BMP, TIFF.

    Raises:
        ImageRefused: ``empty``, ``format_refused`` (an image format outside the allow-list) or ``not_image``.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if not data:
        raise ImageRefused(Reason.EMPTY, "no bytes")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    head = bytes(data[:132])
    for offset, magic, name in _REFUSED_MAGIC:
        if head.startswith(magic, offset):
            raise ImageRefused(Reason.FORMAT_REFUSED, f"{name} is not read")
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _sniff_ftyp(head)
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if _PNM.match(head):
        raise ImageRefused(Reason.FORMAT_REFUSED, "PNM is not read")
    if _SVG.match(bytes(data[:4096])):
        raise ImageRefused(Reason.FORMAT_REFUSED, "SVG is not read")
    raise ImageRefused(Reason.NOT_IMAGE, "the first bytes are those of no image format we know")


def _sniff_ftyp(head: bytes) -> str:
    """The format of an ISO base media file, by its brands."""
    brand, brands = head[8:12], head[8 : min(len(head), int.from_bytes(head[:4], "big"))]
    if brand in (b"avif", b"avis") or (brand in (b"mif1", b"msf1") and b"avif" in brands):
        return "AVIF"
    if brand in _REFUSED_BRANDS or brand in (b"mif1", b"msf1"):
        raise ImageRefused(Reason.FORMAT_REFUSED, f"{_REFUSED_BRANDS.get(brand, 'HEIF')} is not read")
    raise ImageRefused(Reason.NOT_IMAGE, "an ISO media file that is not an image")


def check_bytes(data: bytes, limits: Limits) -> None:
    """Raises ``too_large`` where the file itself is over the cap."""
    if len(data) > limits.max_bytes:
        raise ImageRefused(Reason.TOO_LARGE, f"{len(data):,} bytes, the cap is {limits.max_bytes:,}")


def check_size(width: int, height: int, limits: Limits) -> None:
    """Raises ``too_large`` over the caps, ``corrupt`` where a side is not positive."""
    if width <= 0 or height <= 0:
        raise ImageRefused(Reason.CORRUPT, f"the header says {width} x {height} pixels")
    if width > limits.max_side_px or height > limits.max_side_px:
        raise ImageRefused(Reason.TOO_LARGE, f"{width} x {height} pixels, the cap is {limits.max_side_px:,} a side")
    if width * height > limits.max_pixels:
        raise ImageRefused(Reason.TOO_LARGE, f"{width} x {height} pixels, the cap is {limits.max_pixels:,} in all")


def upright(format_: str, stored_width: int, stored_height: int, orientation: int) -> Header:
    """The header of a picture that is stored ``stored_width`` x ``stored_height`` with an EXIF orientation."""
    if orientation >= 5:
        return Header(format_, stored_height, stored_width, orientation)
    return Header(format_, stored_width, stored_height, orientation)


_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def exif_orientation(exif: bytes | memoryview) -> int:
    """The orientation in a TIFF-structured EXIF block, 1 where it has none or is broken.

    Args:
        exif: From the byte-order mark on (``II*\\0`` or ``MM\\0*``), with or without ``Exif\\0\\0`` before it.
    """
    exif = bytes(exif)
    if exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10:
        return 0
    ifd = struct.unpack_from(order + "I", exif, 4)[0]
    if ifd + 2 > len(exif):
        return 0
    count = min(struct.unpack_from(order + "H", exif, ifd)[0], (len(exif) - ifd - 2) // 12)
    for tag, kind, num, short, long in struct.iter_unpack(order + "HHI2s2s", exif[ifd + 2 : ifd + 2 + 12 * count]):
        if tag == 0x0112 and num == 1:
            return _orientation_value(order, kind, short + long)
    return 0


def _orientation_value(order: str, kind: int, raw: bytes) -> int:
    """An IFD value of type BYTE, SHORT or LONG as an orientation; 0 where it is none."""
    code = {1: "B", 3: "H", 4: "I"}.get(kind)
    value: int = struct.unpack_from(order + code, raw)[0] if code else 0
    return value if 1 <= value <= 8 else 0


def xmp_orientation(xmp: bytes | memoryview) -> int:
    """``tiff:Orientation`` of an XMP packet, 0 where it has none."""
    found = _XMP_ORIENTATION.search(xmp)
    value = int(found[1]) if found else 0
    return value if 1 <= value <= 8 else 0
