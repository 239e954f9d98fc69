"""How long a batch takes and how busy the engines are, learnt from what ran: what waits and loads are told from.

Example:
    >>> times = RunTimes((1, 2, 4, 8))
    >>> times.learn(8, 0.040)
    >>> times.of(4)
    0.02
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

NEWEST = 0.2  # weight of the newest batch in what a batch is thought to take
# A pause of the machine is not the engine's speed: one batch counts as this many times the estimate at most. An engine
# that did become ten times slower is believed after six batches.
OUTLIER = 4.0
LEAST_S = 0.25  # a share over less time than this is noise: the one before stands


class RunTimes:
    """How long a batch of n items takes, learnt from those that ran: a moving mean of the time an item, by bucket.

    Args:
        buckets: Batch sizes, rising.
    """

    def __init__(self, buckets: Sequence[int]) -> None:
        self._buckets = tuple(buckets)
        self._item_s: dict[int, float] = {}

    def learn(self, size: int, seconds: float) -> None:
        """Takes in that a batch of this size took so long."""
        place, item_s = self._place(size), seconds / size
        known = self._item_s.get(place)
        if known is None:
            self._item_s[place] = item_s
        else:
            self._item_s[place] = known + NEWEST * (min(item_s, OUTLIER * known) - known)

    def of(self, size: int) -> float:
        """Seconds of a batch of this size; of the nearest bucket that is known, 0 when none is."""
        if not self._item_s or size < 1:
            return 0.0
        place = self._place(size)
        if place not in self._item_s:
            place = min(self._item_s, key=lambda known: (abs(known - place), known))
        smaller = self._item_s.get(place - 1, 0.0) * self._buckets[place - 1] if place else 0.0
        return max(self._item_s[place] * size, smaller)  # on a GPU five cost what eight cost, and no less than four

    def _place(self, size: int) -> int:
        return min(bisect_left(self._buckets, size), len(self._buckets) - 1)


class Engines(Protocol):
    """What runs batches, and says for how long it has."""

    @property
    def busy_s(self) -> float:
        """Seconds that all engines together have run, since the beginning."""

    @property
    def num_engines(self) -> int:
        """How many there are."""


class BusyShare:
    """The share of the time in which engines ran, from one question to the next.

    Args:
        engines: What is asked.
        clock: Gives seconds.
    """

    def __init__(self, engines: Engines, clock: Callable[[], float]) -> None:
        self._engines, self._clock = engines, clock
        self._then, self._before_s, self._share = clock(), engines.busy_s, 0.0

    def share(self) -> float:
        """0..1, since it was asked before; asked again within LEAST_S it says the same."""
        now, busy_s = self._clock(), self._engines.busy_s
        span_s = (now - self._then) * self._engines.num_engines
        if now - self._then >= LEAST_S:
            self._share = min(1.0, max(0.0, (busy_s - self._before_s) / span_s))
            self._then, self._before_s = now, busy_s
        return self._share
