"""Walks the container of an image file: the size, the EXIF orientation, and what must not be unpacked.

A codec library reads a container to decode it; this walk runs before that, on the bytes alone, so that caps hold before
anything is allocated or inflated: the number of segments, chunks, scans and strips, and text and profile chunks of a
PNG that inflate to gigabytes (they are cut out; the pixels do not need them).

Example:
    >>> read_jpeg(data, Limits()).header
    Header(format='JPEG', width=375, height=500, orientation=6)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from eagleray.vision.image_headers import (
    Header,
    ImageRefused,
    JpegFrame,
    Limits,
    Reason,
    check_size,
    exif_orientation,
    upright,
    xmp_orientation,
)

# Encoders write about 10; libjpeg-turbo's own fuzz targets stop at 500. Each scan of a large picture is a full pass.
MAX_JPEG_SCANS = 100
# The largest metadata that we met (a 32 MB ICC profile) has 512 segments.
MAX_JPEG_SEGMENTS = 20_000
# A 25 MP picture in 512-byte chunks has about 150,000.
MAX_PNG_CHUNKS = 500_000
MAX_WEBP_CHUNKS = 100_000
# Pillow gathers comments 255 bytes at a time, at a cost that grows with the square.
MAX_GIF_EXTENSION_BYTES = 2**20
# 25 MP in tiles of 16 x 16 are 97,657; one value of a tag costs Pillow about 40 bytes.
MAX_TIFF_VALUES = 400_000
MAX_TIFF_TAGS = 1_000

_SOF = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_LOSSLESS_SOF = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF})
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
_NO_SCAN = "the JPEG ends before its first scan"


def read_jpeg(data: bytes, limits: Limits) -> JpegFrame:
    """The frame of a JPEG, from its markers up to the first scan.

    Raises:
        ImageRefused: ``truncated`` before the first scan, ``format_refused`` (12-bit, lossless, hierarchical),
            ``too_large`` (pixels, segments or scans), ``corrupt``.
    """
    frame: tuple[int, int, int, int] | None = None
    orientation, xmp, has_restarts = 0, b"", False
    for marker, body, after in _jpeg_segments(data):
        if marker in _SOF:
            frame = _read_sof(data, body, after, marker)
        elif marker == 0xE1 and not orientation:
            if data.startswith(b"Exif\0\0", body):
                orientation = exif_orientation(data[body:after])
            elif data.startswith(_XMP_PREFIX, body):
                xmp = data[body:after]
        elif marker == 0xDD and after - body >= 2:
            has_restarts = data[body : body + 2] != b"\0\0"
    if frame is None:
        raise ImageRefused(Reason.CORRUPT, "the JPEG has a scan but no frame")
    width, height, components, sof = frame
    check_size(width, height, limits)
    # only a progressive frame, or a first scan of fewer components than the frame has, is followed by further scans
    if (sof in (0xC2, 0xCA) or data[body] < components) and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
        raise ImageRefused(Reason.TOO_LARGE, f"{scans} scans, the cap is {MAX_JPEG_SCANS}")
    if not orientation and xmp:
        orientation = xmp_orientation(xmp)
    return JpegFrame(upright("JPEG", width, height, orientation or 1), components, has_restarts)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment's body up to the first scan's; ``truncated`` where there is no scan."""
    at, end = 2, len(data)
    for _ in range(MAX_JPEG_SEGMENTS):
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 >= end:
            raise ImageRefused(Reason.TRUNCATED, _NO_SCAN)
        marker = data[at + 1]
        if marker == 0xD9:
            raise ImageRefused(Reason.TRUNCATED, _NO_SCAN)
        if marker == 0xFF or marker <= 0x01 or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2  # fill bytes, and markers without a body
            continue
        after = at + 2 + max(2, (data[at + 2] << 8) | data[at + 3])
        yield marker, at + 4, after
        if marker == 0xDA:
            return
        at = after
    raise ImageRefused(Reason.TOO_LARGE, f"the JPEG has more than {MAX_JPEG_SEGMENTS:,} segments")


def _read_sof(data: bytes, body: int, after: int, marker: int) -> tuple[int, int, int, int]:
    """(width, height, components, marker) of a frame header that we can decode."""
    if after - body < 6 or body + 6 > len(data):
        raise ImageRefused(Reason.CORRUPT, "the JPEG's frame header is too short")
    precision, height, width, components = struct.unpack_from(">BHHB", data, body)
    if marker in _LOSSLESS_SOF:
        raise ImageRefused(Reason.FORMAT_REFUSED, "lossless or hierarchical JPEG is not read")
    if precision != 8:
        raise ImageRefused(Reason.FORMAT_REFUSED, f"{precision}-bit JPEG is not read")
    if components not in (1, 3, 4):
        raise ImageRefused(Reason.CORRUPT, f"a JPEG of {components} components")
    return width, height, components, marker


# What the pixels need. All else (text, profiles, EXIF, animation) is cut out before a decoder sees the file.
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"})


def read_png(data: bytes, limits: Limits) -> tuple[Header, bytes]:
    """The header of a PNG, and the PNG with its pixel chunks only.

    Raises:
        ImageRefused: ``truncated`` inside the pixel data, ``corrupt``, ``too_large``.
    """
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageRefused(Reason.TRUNCATED if len(data) < 33 else Reason.CORRUPT, "the PNG has no header chunk")
    width, height = struct.unpack_from(">II", data, 16)
    check_size(width, height, limits)
    orientation, kept, start = 0, [], 0
    has_pixels = False
    for at, after, kind in _png_chunks(data):
        if kind == b"eXIf":
            orientation = orientation or exif_orientation(data[at + 8 : after - 4])
        if kind == b"IDAT":
            has_pixels = True
        if kind not in _PNG_KEPT:
            kept.append(data[start:at])
            start = after
    if not has_pixels:
        raise ImageRefused(Reason.CORRUPT, "the PNG has no pixel data")
    lean = b"".join([*kept, data[start:]]) if kept else data
    return upright("PNG", width, height, orientation or 1), lean


def _png_chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, type) of each chunk up to IEND; raises ``truncated`` where a chunk that pixels need is cut off."""
    at, end = 8, len(data)
    for _ in range(MAX_PNG_CHUNKS):
        if at + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, at)
        after = at + 12 + size
        if after > end:
            if kind in _PNG_KEPT and kind != b"IEND":
                raise ImageRefused(Reason.TRUNCATED, "the PNG ends inside its pixel data")
            after = end
        yield at, after, kind
        if kind == b"IEND":
            return
        at = after
    raise ImageRefused(Reason.TOO_LARGE, f"the PNG has more than {MAX_PNG_CHUNKS:,} chunks")


def read_webp(data: bytes, limits: Limits) -> Header:
    """The header of a WebP, from its RIFF chunks.

    Raises:
        ImageRefused: ``truncated``, ``corrupt``, ``too_large``.
    """
    if len(data) < 30:
        raise ImageRefused(Reason.TRUNCATED, "the WebP ends before its size")
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ImageRefused(Reason.TRUNCATED, "the WebP is shorter than its header says")
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", data, 26))
    elif kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    else:
        raise ImageRefused(Reason.CORRUPT, "the WebP has no frame header")
    check_size(width, height, limits)
    return upright("WEBP", width, height, _webp_orientation(data) if kind == b"VP8X" else 1)


def _webp_orientation(data: bytes) -> int:
    """The orientation in the EXIF chunk, else in the XMP chunk, of an extended WebP."""
    found: dict[bytes, int] = {}
    at = 12
    for _ in range(MAX_WEBP_CHUNKS):
        if at + 8 > len(data):
            break
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            found.setdefault(kind, exif_orientation(data[at + 8 : at + 8 + size]))
        elif kind == b"XMP ":
            found.setdefault(kind, xmp_orientation(data[at + 8 : at + 8 + size]))
        at += 8 + size + (size & 1)
    return found.get(b"EXIF") or found.get(b"XMP ") or 1


def read_gif(data: bytes, limits: Limits) -> None:
    """Checks a GIF up to its first frame: the screen's size, and how much stands before the pixels.

    Raises:
        ImageRefused: ``truncated`` before the first frame, ``too_large``.
    """
    if len(data) < 13:
        raise ImageRefused(Reason.TRUNCATED, "the GIF ends before its size")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    if width and height:  # a screen of 0 takes the size of its first frame
        check_size(width, height, limits)
    start = at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while at + 2 <= len(data):
        if data[at] == 0x2C:
            return
        if data[at] != 0x21:
            at += 1  # Pillow skips what it does not know, byte by byte
            continue
        at += 2
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
        if at - start > MAX_GIF_EXTENSION_BYTES:
            raise ImageRefused(Reason.TOO_LARGE, f"more than {MAX_GIF_EXTENSION_BYTES:,} bytes before the first frame")
    raise ImageRefused(Reason.TRUNCATED, "the GIF ends before its first frame")


def read_tiff(data: bytes, limits: Limits) -> Header:
    """The header of a TIFF, from its first image file directory.

    Raises:
        ImageRefused: ``truncated``, ``corrupt``, ``too_large`` (pixels, tags, strips), ``format_refused`` (camera raw).
    """
    order = "<" if data[:2] == b"II" else ">"
    values: dict[int, int] = {}
    orientation = xmp = 0
    for tag, kind, num, raw in _tiff_tags(data, order):
        # raw metadata of type BYTE, ASCII or UNDEFINED stays one bytes object; numbers become one object each
        if num > MAX_TIFF_VALUES and kind not in (1, 2, 7):
            raise ImageRefused(Reason.TOO_LARGE, f"a TIFF tag of {num:,} values, the cap is {MAX_TIFF_VALUES:,}")
        if tag == 50706:
            raise ImageRefused(Reason.FORMAT_REFUSED, "camera raw is not read")
        code = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if code and num == 1 and struct.calcsize(code) <= len(raw):
            values[tag] = struct.unpack_from(order + code, raw)[0]
        elif tag == 700 and kind in (1, 7) and num > len(raw):
            at = int.from_bytes(raw, "little" if order == "<" else "big")
            xmp = xmp_orientation(data[at : at + num])
    if 256 not in values or 257 not in values:
        raise ImageRefused(Reason.CORRUPT, "the TIFF does not say its size")
    check_size(values[256], values[257], limits)
    if 322 in values and 323 in values:
        check_size(values[322], values[323], limits)  # a tile is allocated whole, however small the picture
    orientation = values.get(274, xmp)
    return upright("TIFF", values[256], values[257], orientation if 1 <= orientation <= 8 else 1)


def _tiff_tags(data: bytes, order: str) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, number of values, value or offset) of the first directory of a TIFF or BigTIFF."""
    is_big = data[2:4] in (b"+\0", b"\0+")
    entry, head, number = ("HHQ8s", 8, "Q") if is_big else ("HHI4s", 4, "H")
    at = struct.unpack_from(order + ("Q" if is_big else "I"), data, head)[0] if len(data) >= 2 * head else len(data)
    size = struct.calcsize(order + number)
    if at + size > len(data):
        raise ImageRefused(Reason.TRUNCATED, "the TIFF ends before its directory")
    count = struct.unpack_from(order + number, data, at)[0]
    if count > MAX_TIFF_TAGS:
        raise ImageRefused(Reason.TOO_LARGE, f"{count} TIFF tags, the cap is {MAX_TIFF_TAGS}")
    fields = struct.Struct(order + entry)
    directory = data[at + size : at + size + count * fields.size]
    if len(directory) < count * fields.size:
        raise ImageRefused(Reason.TRUNCATED, "the TIFF ends inside its directory")
    yield from fields.iter_unpack(directory)
