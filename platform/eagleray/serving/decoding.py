"""Bytes to the model's pixels on threads of their own, so that no image, however strange, holds up the event loop.

An image goes straight from the thread that decoded it into the batcher's queue. One that is refused ends its own ticket
with ImageRefused and no other. Its header is read first: a picture far larger than a photo is decoded on a lane beside
the others, so that a few of them do not make every other image wait. An image that nobody awaits any more, or whose
deadline has passed, is not decoded.

Example:
    >>> decoder = Decoder(threads=2)
    >>> decoder.put(data, spec, ticket, batcher.enter)
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eagleray.serving.batcher import Clock, Closed, DeadlinePassed, Ticket
from eagleray.vision.images import ImageRefused, ImageSpec, Limits, decode, probe

Uint8 = npt.NDArray[np.uint8]
Place = Ticket[Uint8, Any]
Enter = Callable[[Place, Uint8], None]

NEWEST = 0.05  # weight of the newest image in what a byte is thought to take: a mean of the last twenty or so
LARGE_PIXELS = 16_000_000  # a phone's 12 MP photo is none: a JPEG of that size is decoded at reduced scale


@dataclass(frozen=True, slots=True)
class _Job:
    data: bytes
    spec: ImageSpec
    ticket: Place
    enter: Enter


class Decoder:
    """Threads that decode.

    Args:
        threads: Of the common lane; half as many, at least one, decode large pictures beside it.
        limits: Caps on file and picture.
        large_pixels: Pictures of more pixels than this are large.
        clock: Gives seconds; tickets' deadlines are on it.
    """

    def __init__(
        self,
        *,
        threads: int,
        limits: Limits | None = None,
        large_pixels: int = LARGE_PIXELS,
        clock: Clock = time.monotonic,
    ) -> None:
        self._limits, self._large_pixels, self._clock = limits or Limits(), large_pixels, clock
        self._large = _Lane("decode-large", max(1, threads // 2), self._decode, clock)
        self._common = _Lane("decode", threads, self._sort, clock)

    def put(self, data: bytes, spec: ImageSpec, ticket: Place, enter: Enter) -> None:
        """Decodes an image when a thread is free, and puts its pixels into the ticket's queue.

        Args:
            data: An encoded image.
            spec: What the model takes.
            ticket: Ends with ImageRefused where the image cannot be used, with DeadlinePassed where it is too late.
            enter: Batcher.enter of the ticket's batcher.
        """
        self._common.put(_Job(data, spec, ticket, enter))

    def delay_s(self) -> float:
        """The wait for a thread that a new image of a common size would have, estimated."""
        return self._common.delay_s()

    def longest_s(self) -> float:
        """How long the oldest image on any thread has been there: seconds mean that a codec hangs."""
        return max(self._common.longest_s(), self._large.longest_s())

    def close(self) -> None:
        """Ends the threads; what waits is refused."""
        self._common.close()
        self._large.close()

    def _sort(self, job: _Job) -> bool:
        """Decodes a common image, and passes a large one on: False."""
        header = probe(job.data, self._limits)
        if header.width * header.height > self._large_pixels:
            self._large.put(job)
            return False
        return self._decode(job)

    def _decode(self, job: _Job) -> bool:
        started = self._clock()
        try:
            pixels = decode(job.data, job.spec, limits=self._limits)
        finally:
            job.ticket.prepared_s = self._clock() - started
        job.enter(job.ticket, pixels)
        return True


class _Lane:
    """A queue of images before some threads."""

    def __init__(self, name: str, threads: int, work: Callable[[_Job], bool], clock: Clock) -> None:
        self._work, self._clock = work, clock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._seconds, self._bytes = 0.0, 0.0  # moving sums: their ratio is what a byte takes
        self._since: list[float | None] = [None] * threads
        self._is_closed = False
        for number in range(threads):
            threading.Thread(target=self._serve, args=(number,), name=f"{name}-{number}", daemon=True).start()

    def put(self, job: _Job) -> None:
        if self._is_closed:
            job.ticket.fail(Closed())
            return
        with self._lock:
            self._waiting_bytes += len(job.data)
        self._jobs.put(job)

    def delay_s(self) -> float:
        with self._lock:
            if self._waiting_bytes == 0 or self._bytes == 0:
                return 0.0
            return self._waiting_bytes * self._seconds / self._bytes / len(self._since)

    def longest_s(self) -> float:
        now = self._clock()
        return max((now - since for since in self._since if since is not None), default=0.0)

    def close(self) -> None:
        self._is_closed = True
        for _ in self._since:
            self._jobs.put(None)

    def _serve(self, number: int) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(number, job)
            del job  # else it would be kept, image and all, until the next one comes

    def _do(self, number: int, job: _Job) -> None:
        started = self._clock()
        with self._lock:
            self._waiting_bytes -= len(job.data)
        if job.ticket.is_gone:
            return
        if self._is_closed or job.ticket.deadline <= started:
            job.ticket.fail(Closed() if self._is_closed else DeadlinePassed())
            return
        self._since[number] = started
        is_measured = True
        try:
            is_measured = self._work(job)
        except ImageRefused as refused:  # a new one: this one's traceback holds the image
            job.ticket.fail(ImageRefused(refused.reason, refused.detail))
        except Exception as error:  # noqa: BLE001  a fault of ours is this image's: the thread goes on
            job.ticket.fail(error)
        self._since[number] = None
        if is_measured:
            with self._lock:
                self._seconds += NEWEST * (self._clock() - started - self._seconds)
                self._bytes += NEWEST * (len(job.data) - self._bytes)
