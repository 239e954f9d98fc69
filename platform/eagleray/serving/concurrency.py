"""How many requests may be on their way at a time, found by watching how long they take.

Serve's proxy is slower than what stands behind it (docs/log.md), so under too many requests the time is lost in the
proxy, where no queue of the model sees it: each request takes seconds, and most of the work is for clients that have
given up. By Little's law what is on its way is rate x time; so the number is kept at which the time stays below what is
promised. Requests beyond it are refused before their body is read, which costs a hundredth of answering them.

The number rises by one each round while answers are fast and falls by a part when they are slow (additive increase,
multiplicative decrease: Chiu and Jain 1989, as TCP and Netflix's concurrency-limits do). Slow is what is slower than
promised, and than LEAST_FACTOR times the fastest answer: a model that takes longer than is promised is still served.
The time is that of an image: few large requests say nothing against many small ones.
After a stall, once answers are fast again, it goes back to where it began, whether it is used or not.

Example:
    >>> limit = ConcurrencyLimit(target_s=0.075)
    >>> limit.begin()
    >>> limit.end(0.012)
"""

from __future__ import annotations

import time
from collections.abc import Callable

from eagleray.serving.refusals import overloaded

FIRST_PER_S, LEAST, MOST = 850.0, 8.0, 4096.0  # 64 at the default of 0.1 s promised
SMOOTHING = 0.1  # weight of one answer in the smoothed time: some 20 answers decide
DECREASE = 0.85
LEAST_FACTOR = 3.0
FORGET_PER_S = 0.01  # the fastest answer counts less by this share a second: a service may become slower for good
FAST_SHARE, RECOVERY = 0.5, 0.25  # answers below half the target: so much is given back with each
TARGET_SHARE = 0.75  # of what is promised for 99 of 100: the mean must be below it
RETRY_S = 1.0


class ConcurrencyLimit:
    """Counts requests on their way.

    Args:
        target_s: The smoothed time of an answer that is still fast.
        clock: Monotonic seconds.
    """

    def __init__(self, target_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._target_s, self._clock = target_s, clock
        self._first = min(MOST, max(LEAST, FIRST_PER_S * target_s))
        self._limit, self._ongoing = self._first, 0
        self._smoothed_s, self._fastest_s = 0.0, 0.0
        self._changed_s = self._seen_s = clock()

    @property
    def limit(self) -> int:
        """How many may be on their way now."""
        return int(self._limit)

    @property
    def ongoing(self) -> int:
        """How many are."""
        return self._ongoing

    def check(self) -> None:
        """Whether one more may begin.

        Raises:
            Refusal: 503.
        """
        if self._ongoing >= self.limit:
            raise overloaded(RETRY_S)

    def begin(self) -> None:
        """One begins.

        Raises:
            Refusal: 503, and it has not begun.
        """
        self.check()
        self._ongoing += 1

    def end(self, seconds: float | None, *, images: int = 1) -> None:
        """One that began is over.

        Args:
            seconds: From its beginning to its answer; None when it had none, or what it took says nothing.
            images: That it held: one of many takes longer, which is not the service's slowness.
        """
        self._ongoing -= 1
        if seconds is None:
            return
        seconds /= max(1, images)
        now_s = self._clock()
        forgotten = 1.0 + FORGET_PER_S * (now_s - self._seen_s)
        self._seen_s = now_s
        self._fastest_s = min(self._fastest_s * forgotten, seconds) if self._fastest_s else seconds
        self._smoothed_s += SMOOTHING * (seconds - self._smoothed_s)
        slow_s = max(self._target_s, LEAST_FACTOR * self._fastest_s)
        if self._smoothed_s > slow_s:
            if now_s - self._changed_s >= self._smoothed_s:  # once a round: its effect is seen a round later
                self._limit, self._changed_s = max(LEAST, self._limit * DECREASE), now_s
        elif 2 * self._ongoing >= self._limit:  # what is not used says nothing of whether more would do
            self._limit = min(MOST, self._limit + 1 / self._limit)
        if self._smoothed_s < FAST_SHARE * slow_s and self._limit < self._first:
            self._limit = min(self._first, self._limit + RECOVERY)


class Places:
    """A fixed number of places, for what is not worth a measure.

    Args:
        most: How many.
    """

    def __init__(self, most: int) -> None:
        self._free = most

    def take(self) -> Callable[[], None]:
        """Takes one.

        Returns:
            What gives it back; called again it does nothing.

        Raises:
            Refusal: 503: none is free.
        """
        if self._free == 0:
            raise overloaded(RETRY_S)
        self._free -= 1
        is_taken = True

        def give() -> None:
            nonlocal is_taken
            self._free += is_taken
            is_taken = False

        return give
