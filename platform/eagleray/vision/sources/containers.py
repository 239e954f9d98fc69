"""What readers of items share: open containers, and what a read gives."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from eagleray.vision.images import ImageRefused, Reason

MAX_OPEN = 8  # containers kept open; a slice seldom touches more than two

Row = dict[str, Any]
Found = bytes | ImageRefused


class Containers:
    """Open containers by name, the least recently used closed first; kept over slices, a stream is read on."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def __enter__(self) -> Containers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, kind: str, container: str, opener: Any) -> Any:
        """The open container, opened by ``opener(container)`` when it is not."""
        key = (kind, container)
        if key not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[key] = opener(container)
        self._open.move_to_end(key)
        return self._open[key]

    def close(self) -> None:
        """Closes all."""
        while self._open:
            self._open.popitem()[1].close()


def too_large(size: int, limit: int) -> ImageRefused:
    """The refusal of an image over the limit."""
    return ImageRefused(Reason.TOO_LARGE, f"{size} bytes, at most {limit}")
