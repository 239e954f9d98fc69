"""One progress interface: a live line on a terminal, one log line every few seconds elsewhere.

Ray's and the libraries' own bars are off. Lines go to stderr, so that stdout stays for results.

Example:
    >>> with Progress(total=2000, what="score") as progress:
    ...     progress.update(done=128, quarantined=1)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

LOG_EVERY_S = 10.0
DRAW_EVERY_S = 0.2
Note = Callable[[str], None]
WINDOW_S = 20.0  # the rate shown is the mean over this window, so that a slow start does not weigh for ever


def notes(*, is_quiet: bool) -> Note:
    """What a flow tells a person in a line on stderr, or keeps to itself."""
    return _silent if is_quiet else _say


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _silent(text: str) -> None:
    """Says nothing."""


class Progress:
    """Counts of a run, shown as it goes.

    Args:
        total: Images in all; None while it is not known.
        what: The verb, e.g. ``"score"``.
        already: Images that an earlier run has done; they count as done and not into the rate.
        is_live: Draw one live line; default: when stderr is a terminal.
        is_quiet: Show nothing.
    """

    def __init__(
        self, *, total: int | None, what: str, already: int = 0, is_live: bool | None = None, is_quiet: bool = False
    ) -> None:
        self.total, self.what, self.done, self.quarantined = total, what, already, 0
        self._stream: TextIO = sys.stderr
        self._is_live = self._stream.isatty() if is_live is None else is_live
        self._is_quiet = is_quiet
        self._start = self._shown = time.monotonic()
        self._samples: list[tuple[float, int]] = [(self._start, already)]
        self.history: list[dict[str, float]] = []

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(is_last=True)

    def update(self, *, done: int = 0, quarantined: int = 0, total: int | None = None) -> None:
        """Adds to the counts, and shows them when it is time."""
        self.done += done
        self.quarantined += quarantined
        self.total = self.total if total is None else total
        now = time.monotonic()
        if len(self._samples) == 1:  # the rate counts from the first answer: workers start before it
            self._samples = [(now, self.done)]
        self._samples.append((now, self.done))
        while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW_S:
            self._samples.pop(0)
        self.history.append({"t_s": round(now - self._start, 3), "done": self.done})
        if len(self.history) > 4000:  # a long run keeps every other sample: the page draws a few hundred
            self.history = self.history[::2]
        if now - self._shown >= (DRAW_EVERY_S if self._is_live else LOG_EVERY_S):
            self._show()

    def beat(self) -> None:
        """Shows the line when it is time although nothing was done, so that a person sees that the run lives."""
        if time.monotonic() - self._shown >= (DRAW_EVERY_S * 5 if self._is_live else LOG_EVERY_S):
            self._show()

    @property
    def rate(self) -> float:
        """Images per second over the last window."""
        (t0, n0), (t1, n1) = self._samples[0], self._samples[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def line(self) -> str:
        """The line, e.g. ``score  1,280/2,000  64 %  142 img/s  ETA 5 s  quarantined 1``."""
        parts = [self.what, f"{self.done:,}" + (f"/{self.total:,}" if self.total is not None else "")]
        if self.total:
            parts.append(f"{100 * self.done // self.total} %")
        if self.rate > 0:
            parts.append(f"{self.rate:,.0f} img/s" if self.rate >= 10 else f"{self.rate:.1f} img/s")
            if self.total is not None and self.total > self.done:
                parts.append(f"ETA {duration((self.total - self.done) / self.rate)}")
        parts.append(f"quarantined {self.quarantined:,}")
        return "  ".join(parts)

    def _show(self, *, is_last: bool = False) -> None:
        self._shown = time.monotonic()
        if self._is_quiet:
            return
        if self._is_live:
            self._stream.write("\r\x1b[2K" + self.line() + ("\n" if is_last else ""))
        else:
            self._stream.write(self.line() + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class StatusLine:
    """Lines that replace one another on a terminal, and stand one below the other elsewhere.

    Args:
        what: The verb, which each line begins with.
        is_live: Draw over the line before; default: when stderr is a terminal.
        is_quiet: Show nothing.
    """

    def __init__(self, what: str, *, is_live: bool | None = None, is_quiet: bool = False) -> None:
        self._what, self._stream = what, sys.stderr
        self._is_live = sys.stderr.isatty() if is_live is None else is_live
        self._is_quiet, self._is_open = is_quiet, False

    def show(self, text: str) -> None:
        """The newest state of things."""
        if not self._is_quiet:
            line = f"{self._what}  {text}"
            self._stream.write(f"\r\x1b[2K{line}" if self._is_live else f"{line}\n")
            self._stream.flush()
            self._is_open = self._is_live

    def note(self, text: str) -> None:
        """Something that must stay to be read."""
        self.close()
        if not self._is_quiet:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def close(self) -> None:
        """Leaves the last line as it stands."""
        if self._is_open:
            self._stream.write("\n")
            self._stream.flush()
            self._is_open = False
