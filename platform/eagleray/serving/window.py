"""The last requests of one process: how many failed and how long they took, to judge a model that was just put in.

A pure ASGI wrapper measures; nothing of a request is kept but a time, a duration and a status. Refusals (a bad image, a
missing key, an overload) are answers, not failures: what counts is a 5xx that is not 503, and a 503 that came late. An
overload is refused at once; who was kept waiting for it met a model that hangs or is too slow.

Example:
    >>> window = RequestWindow()
    >>> app = Watched(app, window)
    >>> window.figures(since_s=30.0).failures
    0
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

MOST = 8192  # requests kept: at 300 a second half a minute, 200 KB
OVERLOADED = 503


@dataclass(frozen=True)
class Figures:
    """What a window says.

    Attributes:
        requests: Requests answered with a prediction, a refusal or a failure.
        failures: Of them, those that failed through no fault of the client.
        overloaded: Of them, those refused at once because too many came.
        latency_ms_p99: Of the answered ones (2xx); None when there was none.
    """

    requests: int
    failures: int
    overloaded: int
    latency_ms_p99: float | None

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)


class RequestWindow:
    """The last requests.

    Args:
        most: How many are kept.
        clock: Monotonic, in s.
        late_s: A 503 that took longer is a failure.
    """

    def __init__(
        self, most: int = MOST, clock: Callable[[], float] = time.monotonic, *, late_s: float = math.inf
    ) -> None:
        self._requests: deque[tuple[float, float, int]] = deque(maxlen=most)
        self._clock, self._late_s = clock, late_s

    def add(self, seconds: float, status: int) -> None:
        """Keeps a request that has just ended.

        Args:
            seconds: How long it took.
            status: Of HTTP; 0 when it ended without an answer.
        """
        self._requests.append((self._clock(), seconds, status))

    def figures(self, since_s: float = math.inf) -> Figures:
        """What the last requests say.

        Args:
            since_s: Only those that ended within so many seconds.
        """
        oldest = self._clock() - since_s
        kept = [(seconds, status) for ended, seconds, status in list(self._requests) if ended >= oldest]
        answered = sorted(seconds for seconds, status in kept if 200 <= status < 300)
        return Figures(
            requests=len(kept),
            failures=sum(
                status == 0 or (status >= 500 and not self._is_shed(seconds, status)) for seconds, status in kept
            ),
            overloaded=sum(self._is_shed(seconds, status) for seconds, status in kept),
            latency_ms_p99=1000 * answered[math.ceil(0.99 * len(answered)) - 1] if answered else None,
        )

    def _is_shed(self, seconds: float, status: int) -> bool:
        return status == OVERLOADED and seconds <= self._late_s


def together(parts: list[Figures]) -> Figures:
    """The figures of several processes as one; the p99 is the worst of theirs, which is never too low."""
    latencies = [part.latency_ms_p99 for part in parts if part.latency_ms_p99 is not None]
    return Figures(
        requests=sum(part.requests for part in parts),
        failures=sum(part.failures for part in parts),
        overloaded=sum(part.overloaded for part in parts),
        latency_ms_p99=max(latencies, default=None),
    )


class Watched:
    """An ASGI app whose requests go into a window; a client that left early counts for nothing.

    Args:
        app: The app.
        window: Where they go.
        prefixes: Paths that count: the others (the page, health) say nothing about a model.
    """

    def __init__(self, app: Any, window: RequestWindow, prefixes: tuple[str, ...] = ("/v1/", "/v2/models/")) -> None:
        self._app, self._window, self._prefixes = app, window, prefixes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith(self._prefixes):
            await self._app(scope, receive, send)
            return
        status = 0
        started = whole = time.perf_counter()

        async def read() -> Any:
            nonlocal whole
            message = await receive()
            if message["type"] == "http.request":
                whole = time.perf_counter()
            return message

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, read, watched)
        except Exception:
            self._window.add(time.perf_counter() - started, 0)
            raise
        if status:
            # A body that comes slowly makes no refusal late
            self._window.add(time.perf_counter() - (whole if status == OVERLOADED else started), status)
