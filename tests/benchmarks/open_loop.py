"""The serving benchmark's client: a process of its own that sends pictures at fixed times, whatever the server does.

Open loop: request i is due at start + i / rate, and its latency counts from then, so that a server that falls behind
cannot make the client ask less. A request that gets no 200 within the timeout has an infinite latency. Connections are
kept alive, one is opened when none is idle, up to a cap. Commands are JSON lines on stdin, figures JSON lines on
stdout.

Example:
    {"do": "open", "rate": 200, "seconds": 4}      ->  {"p99_ms": 31.2, "answered_per_s": 199.8, ...}
    {"do": "closed", "connections": 1, "seconds": 2}
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_CONNECTIONS = 512
WINDOW_FROM_S = 0.5  # answers per second are counted after this, when the queue has filled
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
clock = time.perf_counter  # uvloop's own counts in whole milliseconds
Waiter = asyncio.Future[None] | None


class Connection(asyncio.Protocol):
    """One keep-alive connection: a request, then its answer."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._done: Callable[[int], None] | None = None
        self.transport: Any = None
        self.is_open = False

    def connection_made(self, transport: Any) -> None:
        """Ready to send."""
        self.transport, self.is_open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        """What was asked stays without an answer: status 0."""
        self.is_open = False
        self._finish(0)

    def send(self, request: bytes, done: Callable[[int], None]) -> None:
        """Sends a request; `done` gets the status of its answer."""
        self._buffer.clear()
        self._done = done
        self.transport.write(request)

    def abort(self) -> None:
        """Waits no longer."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Reads until the answer is whole."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end])
        length = LENGTH.search(head)
        if length:
            is_whole = len(self._buffer) >= end + 4 + int(length[1])
        else:
            is_whole = bool(CHUNKED.search(head)) and self._buffer.endswith(b"0\r\n\r\n")
        if is_whole:
            if CLOSES.search(head):
                self.is_open = False
                self.transport.close()
            self._finish(int(head[9:12]))

    def _finish(self, status: int) -> None:
        done, self._done = self._done, None
        if done:
            done(status)


@dataclass
class Tally:
    """What came of the requests of one run; times in seconds of `clock`."""

    statuses: Counter[int] = field(default_factory=Counter)
    answers: list[tuple[float, float]] = field(default_factory=list)  # (when it came, latency) of each 200
    late: list[float] = field(default_factory=list)  # how long after its time each request was sent
    sent: int = 0

    def figures(self, start: float, seconds: float, cpu_s: float) -> dict[str, Any]:
        """The run in numbers; latencies in ms, None = infinite."""
        good = sorted(latency for _, latency in self.answers)
        everything = good + [math.inf] * (self.sent - len(good))
        window = seconds - WINDOW_FROM_S
        counted = sum(start + WINDOW_FROM_S <= when <= start + seconds for when, _ in self.answers)
        return {
            "sent": self.sent,
            "ok": len(good),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "p50_ms": quantile_ms(everything, 0.5),
            "p99_ms": quantile_ms(everything, 0.99),
            "accepted_p50_ms": quantile_ms(good, 0.5),
            "accepted_p99_ms": quantile_ms(good, 0.99),
            "answered_per_s": counted / window if window > 0 else 0.0,
            "late_p99_ms": quantile_ms(sorted(self.late), 0.99),
            "client_cpu_share": cpu_s / seconds,
        }


def quantile_ms(rising: Sequence[float], share: float) -> float | None:
    """The smallest value that a share of them does not exceed, in ms; None when it is infinite or there is none."""
    if not rising:
        return None
    value = rising[min(len(rising) - 1, math.ceil(share * len(rising)) - 1)]
    return None if math.isinf(value) else value * 1_000


class Client:
    """Sends the same few hundred requests again and again.

    Args:
        address: Host and port.
        requests: Whole HTTP requests, in the order in which they are sent.
        timeout_s: An answer that takes longer is of no use.
    """

    def __init__(self, address: tuple[str, int], requests: Sequence[bytes], timeout_s: float) -> None:
        self._address, self._requests, self._timeout_s = address, requests, timeout_s
        self._loop = asyncio.get_running_loop()
        self._idle: list[Connection] = []
        self._open = self._next = self._pending = 0

    async def open_loop(self, rate: float, seconds: float) -> dict[str, Any]:
        """Requests at fixed times, for so long; then the answers to them are waited for."""
        tally, begin_cpu = Tally(), time.process_time()
        start = clock() + 0.05
        for number in range(round(rate * seconds)):
            due = start + number / rate
            wait = due - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            self._fire(due, tally)
        await self._drain()
        return tally.figures(start, seconds, time.process_time() - begin_cpu)

    async def closed_loop(self, connections: int, seconds: float) -> dict[str, Any]:
        """Each connection asks as soon as it is answered."""
        tally, begin_cpu = Tally(), time.process_time()
        start = clock()

        async def ask() -> None:
            while clock() < start + seconds:
                answered = self._loop.create_future()
                self._fire(clock(), tally, answered)
                await answered

        await asyncio.gather(*(ask() for _ in range(connections)))
        return tally.figures(start, seconds, time.process_time() - begin_cpu)

    def _fire(self, due: float, tally: Tally, after: Waiter = None) -> None:
        tally.sent += 1
        self._pending += 1
        while self._idle and not self._idle[-1].is_open:  # closed by the server meanwhile
            self._idle.pop()
            self._open -= 1
        if self._idle:
            self._send(self._idle.pop(), due, tally, after)
        elif self._open >= MOST_CONNECTIONS:
            self._answered(0, due, tally, after)
        else:
            self._open += 1
            self._loop.create_task(self._connect(due, tally, after))

    async def _connect(self, due: float, tally: Tally, after: Waiter) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                _, connection = await self._loop.create_connection(Connection, *self._address)
        except (OSError, TimeoutError):
            self._open -= 1
            self._answered(0, due, tally, after)
        else:
            self._send(connection, due, tally, after)

    def _send(self, connection: Connection, due: float, tally: Tally, after: Waiter) -> None:
        request = self._requests[self._next % len(self._requests)]
        self._next += 1
        tally.late.append(max(0.0, clock() - due))
        timer = self._loop.call_later(max(due + self._timeout_s - clock(), 0.0), connection.abort)

        def done(status: int) -> None:
            timer.cancel()
            if connection.is_open:
                self._idle.append(connection)
            else:
                self._open -= 1
            self._answered(status, due, tally, after)

        connection.send(request, done)

    def _answered(self, status: int, due: float, tally: Tally, after: Waiter) -> None:
        now = clock()
        tally.statuses[status] += 1
        if status == 200:
            tally.answers.append((now, now - due))
        self._pending -= 1
        if after:  # a refusal that comes at once must not become a busy loop
            self._loop.call_later(0 if status == 200 else 0.01, after.set_result, None)

    async def _drain(self) -> None:
        while self._pending:
            await asyncio.sleep(0.01)


def http_request(path: str, host: str, headers: Sequence[str], body: bytes) -> bytes:
    """A whole request."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Connection: keep-alive", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def read_requests(args: argparse.Namespace) -> list[bytes]:
    """A request for each picture; what a header holds of secrets comes from the environment."""
    headers = [*args.header, *(line for line in os.environ.get("BENCH_HEADERS", "").splitlines() if line)]
    lines = [*headers, "Content-Type: image/jpeg"]
    paths = sorted(args.folder.rglob("*.jpg"))[: args.images]
    return [http_request(args.path, f"{args.host}:{args.port}", lines, path.read_bytes()) for path in paths]


async def serve_commands(args: argparse.Namespace) -> None:
    """Reads commands until stdin ends."""
    client = Client((args.host, args.port), read_requests(args), args.timeout_s)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        if order.pop("do") == "open":
            told = await client.open_loop(**order)
        else:
            told = await client.closed_loop(**order)
        print(json.dumps(told), flush=True)


def main() -> None:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/predict")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--timeout-s", type=float, default=2.0)
    args = parser.parse_args()
    with contextlib.suppress(PermissionError):  # arrivals must come when they are due, and it spends little
        os.nice(-10)
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    import uvloop

    uvloop.run(serve_commands(args))


if __name__ == "__main__":
    main()
