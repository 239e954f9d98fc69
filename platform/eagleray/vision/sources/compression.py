"""Compressed streams by their first bytes: gzip, bzip2, xz and Zstandard, read forward only."""

from __future__ import annotations

import bz2
import gzip
import lzma
from typing import IO, Any

from eagleray.vision.sources import locations

MAGICS = {
    "gzip": (b"\x1f\x8b\x08",),
    "bz2": tuple(b"BZh%d" % level + mark for level in range(1, 10) for mark in (b"1AY&SY", b"\x17rE8P\x90")),
    "xz": (b"\xfd7zXZ\x00",),
    "zstd": (b"\x28\xb5\x2f\xfd",),
}
DAMAGED = (EOFError, ValueError, lzma.LZMAError)  # what the readers raise besides OSError and zlib.error


def compression_of(container: str) -> str:
    """``"gzip"``, ``"bz2"``, ``"xz"``, ``"zstd"``, or empty for anything else."""
    with locations.open_container(container) as file:
        return compression_of_bytes(file.read(16))


def compression_of_bytes(head: bytes) -> str:
    """The same of a file's first bytes (10 or more)."""
    return next((name for name, magics in MAGICS.items() if head.startswith(magics)), "")


def open_unpacked(container: str) -> IO[bytes]:
    """Opens a container for forward reads of its unpacked bytes; a plain one as it is."""
    file: Any = locations.open_container(container)
    kind = compression_of_bytes(file.read(16))
    file.seek(0)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file, mode="rb")  # type: ignore[return-value]
    if kind == "bz2":
        return bz2.BZ2File(file, "rb")
    if kind == "xz":
        return lzma.LZMAFile(file, "rb")
    if kind == "zstd":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(file, "rb"), "zstd")  # type: ignore[no-any-return]
    return file  # type: ignore[no-any-return]
