"""A compressed tar read forward: the members of later slices come by reading on, not by starting again."""

from __future__ import annotations

import lzma
import zlib
from typing import IO

from eagleray.core.errors import DataError
from eagleray.vision.sources import locations
from eagleray.vision.sources.compression import open_unpacked

SKIP_BYTES = 1 << 20


class Forward:
    """A stream of unpacked bytes with a position.

    Args:
        container: The archive, as a listing names it.
    """

    def __init__(self, container: str) -> None:
        self._container = container
        self._file: IO[bytes] | None = None
        self._at = 0

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes at an offset of the unpacked stream.

        Raises:
            DataError: The stream is damaged or shorter than it was when listed.
        """
        try:
            if self._file is None or offset < self._at:
                self.close()
                self._file = open_unpacked(self._container)
            while self._at < offset:
                self._at += len(self._take(min(SKIP_BYTES, offset - self._at)))
            data = bytearray()
            while len(data) < size:
                data += self._take(size - len(data))
        except (EOFError, ValueError, lzma.LZMAError, zlib.error, OSError) as error:
            shown = locations.shown_container(self._container)
            if isinstance(error, OSError) and error.errno:
                raise locations.store_error(error, shown) from error
            raise DataError(
                f"{shown} is damaged or has changed since it was listed: {error}",
                expected="the same whole archive",
                fix="check the file, copy it again, and use another --out",
            ) from None
        self._at += size
        return bytes(data)

    def _take(self, size: int) -> bytes:
        piece = self._file.read(size) if self._file else b""
        if not piece:
            raise EOFError("it ends early")
        return piece

    def close(self) -> None:
        """Closes the archive."""
        if self._file is not None:
            self._file.close()
        self._file, self._at = None, 0
