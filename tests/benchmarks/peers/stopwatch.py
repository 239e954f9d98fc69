"""What every training peer has in common: its options, its steady time, its last line."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from itertools import count, islice
from typing import Any


def options(**more: Any) -> argparse.Namespace:
    """The options of a peer; `more` are its own, with their defaults."""
    parser = argparse.ArgumentParser()
    given = {"folder": "", "backbone": "", "out": "", "size": 64, "batch": 64, "steps": 100, "warm": 10, "seed": 0}
    for name, value in {**given, "workers": 2, "threads": 2, **more}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()


def take(loader: Any, steps: int) -> Iterator[tuple[int, Any]]:
    """(epoch, batch) of a number of steps, epoch after epoch."""
    rows = ((epoch, batch) for epoch in count() for batch in loader)
    yield from islice(rows, steps)


class Stopwatch:
    """Steady time: from the end of the first `warm` steps to the end of the last.

    Args:
        warm: Steps that are not counted.
    """

    def __init__(self, warm: int) -> None:
        self.warm, self.steps, self.images, self.began = warm, 0, 0, time.perf_counter()

    def step(self, images: int) -> None:
        """Counts a step that has just ended."""
        self.steps += 1
        if self.steps <= self.warm:
            self.began = time.perf_counter()
            return
        self.images += images

    def tell(self, **more: Any) -> None:
        """Prints the figures as one line of JSON."""
        seconds = time.perf_counter() - self.began
        cpu_s = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(json.dumps({"images": self.images, "seconds_steady": seconds, "peer_cpu_s": cpu_s, **more}), flush=True)
