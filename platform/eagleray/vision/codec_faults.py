"""What codecs raise on broken input, as typed reasons, and the guard that keeps Pillow strict while they run.

Example:
    >>> try:
    ...     with pillow_guard():
    ...         image.load()
    ... except (MemoryError, *CODEC_FAULTS) as fault:
    ...     raise refusal(fault, "PNG") from fault
"""

from __future__ import annotations

import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile, UnidentifiedImageError

from eagleray.vision.image_headers import ImageRefused, Reason

# Whatever Pillow's plugins raise on broken input, found by fuzzing and by reading them. MemoryError is answered apart.
CODEC_FAULTS = (
    Image.DecompressionBombError,
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


def refusal(fault: BaseException, doing: str) -> ImageRefused:
    """The typed reason for what a codec raised.

    Args:
        fault: A MemoryError or one of CODEC_FAULTS.
        doing: The format that was read, for the detail.
    """
    if isinstance(fault, MemoryError):
        return ImageRefused(Reason.POISON, f"{doing}: more memory is needed than there is")
    if isinstance(fault, Image.DecompressionBombError):
        return ImageRefused(Reason.TOO_LARGE, f"{doing}: over Pillow's own cap of pixels")
    text = str(fault).lower()
    if "decompressed data too large" in text:
        return ImageRefused(Reason.TOO_LARGE, f"{doing}: metadata that inflates beyond Pillow's cap")
    is_cut = isinstance(fault, EOFError) or any(part in text for part in _TRUNCATED_TEXTS)
    # Pillow names the buffer's address when it cannot identify a file: that would make two runs differ
    detail = "the header cannot be read" if isinstance(fault, UnidentifiedImageError) else str(fault)[:200]
    return ImageRefused(Reason.TRUNCATED if is_cut else Reason.CORRUPT, f"{doing}: {detail or type(fault).__name__}")


class _PillowGuard:
    """Holds Pillow strict and silent while any thread decodes, whatever the rest of the process has set.

    ``ImageFile.LOAD_TRUNCATED_IMAGES`` and the warning filters belong to the process. The first thread in sets them,
    the last one out restores them; ``warnings.catch_warnings`` alone is not safe between threads.
    ``Image.MAX_IMAGE_PIXELS`` is left as it is: our caps come first, and other users of Pillow keep theirs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._accepts_truncated = False
        self._filter = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1:
                self._accepts_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            if self._filter not in warnings.filters[:1]:
                warnings.filters.insert(0, self._filter)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if self._num_inside == 0:
                    ImageFile.LOAD_TRUNCATED_IMAGES = self._accepts_truncated
                    while self._filter in warnings.filters:
                        warnings.filters.remove(self._filter)  # type: ignore[attr-defined]


pillow_guard = _PillowGuard()
