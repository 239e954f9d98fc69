"""Reads one member of a zip by the offset of its local header, unpacking no more than asked.

Refusals are values (ImageRefused), because a bad member is the member's fault and not the run's.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from typing import IO, Any

from eagleray.vision.images import ImageRefused, Reason

LOCAL_FORMAT = struct.Struct("<4s5H3L2H")  # 30 bytes
LOCAL = b"PK\x03\x04"
STORED, DEFLATED, BZIP2, LZMA = 0, 8, 12, 14
FLAG_ENCRYPTED = 0x41  # bit 0 traditional, bit 6 strong
PIECE_BYTES = 1 << 18
SLACK_BYTES = 256  # name and extra field of a usual local header: header and data come in one read


def read_member(file: IO[bytes], offset: int, stored: int, crc32: int, limit: int) -> bytes | ImageRefused:
    """The bytes of a member.

    Args:
        file: The archive, seekable.
        offset: Of the local header.
        stored: Compressed size, as the central directory says.
        crc32: Expected CRC-32.
        limit: Bytes at most; one more is too large.

    Returns:
        The bytes, or why not: unreadable (encrypted, unknown method, no header there), corrupt (does not unpack, CRC
        differs, cut off), too_large.

    Raises:
        OSError: The archive cannot be read.
    """
    file.seek(offset)
    head = file.read(LOCAL_FORMAT.size + SLACK_BYTES)
    if len(head) < LOCAL_FORMAT.size or not head.startswith(LOCAL):
        return ImageRefused(Reason.UNREADABLE, "no local header where the archive's directory says")
    _, _, flags, method, _, _, _, _, _, len_name, len_extra = LOCAL_FORMAT.unpack_from(head)
    if flags & FLAG_ENCRYPTED:
        return ImageRefused(Reason.UNREADABLE, "the member is encrypted")
    file.seek(offset + LOCAL_FORMAT.size + len_name + len_extra)
    if method == STORED:
        data: bytes | ImageRefused = file.read(min(stored, limit + 1))
        if len(data) < min(stored, limit + 1):  # type: ignore[arg-type]
            return ImageRefused(Reason.CORRUPT, "the archive ends inside the member")
    else:
        unpacker = _unpacker(method)
        if unpacker is None:
            return ImageRefused(Reason.UNREADABLE, f"zip compression method {method} is not supported")
        data = _unpack(file, unpacker, stored, limit)
    if isinstance(data, ImageRefused):
        return data
    if len(data) > limit:
        return ImageRefused(Reason.TOO_LARGE, f"more than {limit} bytes")
    if zlib.crc32(data) != crc32:
        return ImageRefused(Reason.CORRUPT, "the bytes do not match the archive's CRC-32")
    return data


def _unpacker(method: int) -> Any:
    if method == DEFLATED:
        return _Deflate()
    if method == BZIP2:
        return bz2.BZ2Decompressor()
    return _Lzma() if method == LZMA else None


def _unpack(file: IO[bytes], unpacker: Any, stored: int, limit: int) -> bytes | ImageRefused:
    out: list[bytes] = []
    size = 0
    try:
        while not unpacker.eof and size <= limit:
            piece = b""
            if unpacker.needs_input:
                piece = file.read(min(stored, PIECE_BYTES))
                if not piece:
                    break  # LZMA may have no end mark; the CRC-32 tells whether something is missing
                stored -= len(piece)
            plain = unpacker.decompress(piece, limit + 1 - size)
            out.append(plain)
            size += len(plain)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, struct.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        return ImageRefused(Reason.CORRUPT, f"does not unpack: {error}")
    return b"".join(out)


class _Deflate:
    """zlib's raw deflate with the interface of the bz2 and lzma decompressors."""

    def __init__(self) -> None:
        self._z = zlib.decompressobj(-15)

    @property
    def eof(self) -> bool:
        return self._z.eof

    @property
    def needs_input(self) -> bool:
        return not self._z.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._z.decompress(self._z.unconsumed_tail + data, max_length)


class _Lzma:
    """LZMA as zip wraps it: two version bytes, the length of the properties, the properties, then the raw stream."""

    def __init__(self) -> None:
        self._head = b""
        self._raw: Any = None

    @property
    def eof(self) -> bool:
        return self._raw is not None and bool(self._raw.eof)

    @property
    def needs_input(self) -> bool:
        return self._raw is None or bool(self._raw.needs_input)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if self._raw is None:
            self._head += data
            if len(self._head) < 4 or len(self._head) < 4 + struct.unpack_from("<H", self._head, 2)[0]:
                return b""
            (length,) = struct.unpack_from("<H", self._head, 2)
            decode: Any = lzma._decode_filter_properties  # type: ignore[attr-defined]  # as zipfile does
            filters = [decode(lzma.FILTER_LZMA1, self._head[4 : 4 + length])]
            self._raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
            data = self._head[4 + length :]
        plain: bytes = self._raw.decompress(data, max_length)
        return plain
