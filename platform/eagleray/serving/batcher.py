"""The work-conserving batcher: whenever an engine is free it takes all that waits, up to the largest bucket.

No batch waits to be fuller: while the engine runs, the next one grows by itself. Items are taken in the order in which
they came. One that is cancelled or past its deadline leaves the queue and costs the engine nothing; a batch that fails
is run again item by item, so that only what is at fault fails. Each engine has a thread of its own that takes its next
batch without asking the event loop, so a busy loop never leaves it idle.

An item enters from any thread (a decoder's, as a rule); its ticket is made, and its answer awaited, on an event loop.

Example:
    >>> batcher = Batcher([engine.run], buckets=(1, 2, 4, 8))
    >>> done = await batcher.submit(pixels, deadline=time.monotonic() + 1.0)
    >>> done.value, done.batch_size
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar, cast

from eagleray.serving.run_times import RunTimes
from eagleray.serving.telemetry import BATCH, DROPPED, INFER, QUEUE, SPLIT_BATCHES, Meter, NullMeter

In = TypeVar("In")
Out = TypeVar("Out")
Clock = Callable[[], float]
Run = Callable[[Sequence[In]], Sequence[Out]]

# A batch is cut for the sake of a deadline only where that costs less throughput than this: cut batches under load
# would make the queue longer and the next deadline tighter.
DEAREST_CUT = 1.25


class DeadlinePassed(Exception):
    """The item was not answered by its deadline."""


class Closed(Exception):
    """The batcher takes no more items: its model is being put away."""


@dataclass(frozen=True, slots=True)
class Done(Generic[Out]):
    """An item's answer.

    Attributes:
        value: What ``run`` gave for it.
        started: When its batch began, on the batcher's clock, in s.
        run_s: How long its batch took.
        batch_size: Items in that batch.
    """

    value: Out
    started: float
    run_s: float
    batch_size: int


class Ticket(Generic[In, Out]):
    """A place for one item, made on an event loop before the item is ready; cancel ``future`` to leave.

    Attributes:
        future: Gives the answer, or raises DeadlinePassed, Closed, or what ``run`` or the maker of the item raised.
        deadline: On the batcher's clock, in s.
        made: When the ticket was made.
        prepared_s: Seconds that its maker spent on the item: no part of its wait.
        is_gone: Whether nobody awaits it any more.
        is_queued: Whether it is in the queue now.
        is_ahead: Whether no engine has begun it yet.
    """

    __slots__ = ("deadline", "future", "is_ahead", "is_gone", "is_queued", "item", "loop", "made", "prepared_s")

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline: float, made: float) -> None:
        self.loop, self.deadline, self.made = loop, deadline, made
        self.future: asyncio.Future[Done[Out]] = loop.create_future()
        self.item: In | None = None
        self.prepared_s = 0.0
        self.is_gone = self.is_queued = False
        self.is_ahead = True

    def fail(self, error: Exception) -> None:
        """Ends it with an error; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.fail_here, error)

    def fail_here(self, error: Exception) -> None:
        """Ends it with an error; on its own loop."""
        if not self.future.done():
            self.future.set_exception(error)


class Batcher(Generic[In, Out]):
    """A queue before one or more engines of one model.

    Args:
        runs: One callable an engine; takes 1..largest items and gives as many values, in order. Each is called from a
            thread of its own.
        buckets: Batch sizes, rising; the last is the most that an engine is given.
        model: The model's name, for the meter and the threads.
        clock: Gives seconds; deadlines are on it.
        meter: Counts.
    """

    def __init__(
        self,
        runs: Sequence[Run[In, Out]],
        *,
        buckets: Sequence[int],
        model: str = "none",
        clock: Clock = time.monotonic,
        meter: Meter | None = None,
    ) -> None:
        self.times = RunTimes(buckets)
        self._buckets, self._largest, self._model, self._clock = tuple(buckets), buckets[-1], model, clock
        self._meter: Meter = meter or NullMeter()
        self._changed = threading.Condition()
        self._queue: deque[Ticket[In, Out]] = deque()
        self._running: list[tuple[float, int] | None] = [None] * len(runs)  # when each engine began, on how many
        self._busy_s = 0.0
        self._open = 0  # tickets that are not answered yet: being made, queued or running
        self._ahead = 0  # of them, those that no engine has begun
        self._is_draining = self._is_closed = False
        self._emptied: asyncio.Future[None] | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(number, run), name=f"engine-{model}-{number}", daemon=True)
            for number, run in enumerate(runs)
        ]
        for thread in self._threads:
            thread.start()

    def ticket(self, deadline: float) -> Ticket[In, Out]:
        """A place for an item that is being made; called on the loop that will await it.

        Raises:
            Closed: The batcher drains.
        """
        if self._is_draining:
            raise Closed
        ticket: Ticket[In, Out] = Ticket(asyncio.get_running_loop(), deadline, self._clock())
        with self._changed:
            self._open += 1
            self._ahead += 1
        ticket.future.add_done_callback(lambda future: self._end(ticket, is_cancelled=future.cancelled()))
        return ticket

    def enter(self, ticket: Ticket[In, Out], item: In, *, is_urgent: bool = False) -> None:
        """Puts a ticket's item into the queue; from any thread.

        Args:
            ticket: Of this batcher; one that is gone is passed over.
            item: What ``run`` takes.
            is_urgent: It goes before all others: for a canary, whose wait must not be the load's.
        """
        ticket.item = item
        with self._changed:
            if ticket.is_gone:
                return
            if not self._is_closed:
                ticket.is_queued = True
                (self._queue.appendleft if is_urgent else self._queue.append)(ticket)
                self._changed.notify()
                return
        ticket.fail(Closed())

    async def submit(self, item: In, deadline: float, *, is_urgent: bool = False) -> Done[Out]:
        """The answer of one item.

        Raises:
            DeadlinePassed: An engine came to it after its deadline.
            Closed: The batcher drains.
        """
        ticket = self.ticket(deadline)
        self.enter(ticket, item, is_urgent=is_urgent)
        return await ticket.future

    @property
    def queued(self) -> int:
        """Items that wait for an engine."""
        return len(self._queue)

    @property
    def open(self) -> int:
        """Tickets that are not answered yet."""
        return self._open

    @property
    def num_engines(self) -> int:
        """How many batches run at a time, at most."""
        return len(self._running)

    @property
    def busy_s(self) -> float:
        """Seconds that the engines have run, all together."""
        with self._changed:
            now = self._clock()
            return self._busy_s + sum(now - one[0] for one in self._running if one)

    def longest_s(self) -> float:
        """How long the batch that has been in an engine longest is there; 0 when none runs."""
        with self._changed:
            now = self._clock()
            return max((now - one[0] for one in self._running if one), default=0.0)

    def queue_delay_s(self) -> float:
        """The wait for an engine that a new item would have, estimated; those not yet in the queue are counted too."""
        with self._changed:
            running = [one for one in self._running if one]
            ahead = self._ahead
            free = len(self._running) - len(running)
            if free > 0 and ahead < free:
                return 0.0
            now = self._clock()
            left = [max(0.0, started + self.times.of(size) - now) for started, size in running]
            full = self.times.of(self._largest) * (ahead // self._largest)
        return (0.0 if free else min(left)) + full / len(self._running)

    async def drain(self) -> None:
        """Takes no new ticket, waits until all that were given are answered, and ends the threads."""
        self._is_draining = True
        if self._open:
            self._emptied = self._emptied or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._emptied)
        self.close()

    def close(self) -> None:
        """Ends it now: what waits is refused, what runs is answered. An engine that hangs keeps its thread."""
        with self._changed:
            self._is_draining = self._is_closed = True
            waiting = list(self._queue)
            self._queue.clear()
            for ticket in waiting:
                ticket.is_queued = False
            self._changed.notify_all()
        for ticket in waiting:
            ticket.fail(Closed())

    def _end(self, ticket: Ticket[In, Out], *, is_cancelled: bool) -> None:
        """A ticket is answered, or nobody wants its answer."""
        with self._changed:
            self._open -= 1
            self._count_out(ticket)
            ticket.is_gone = True
            if ticket.is_queued:
                self._queue.remove(ticket)
                ticket.is_queued = False
        ticket.item = None
        if not self._open and self._emptied and not self._emptied.done():
            self._emptied.set_result(None)
        if is_cancelled:
            self._meter.add(DROPPED, model=self._model, why="cancelled")
        elif isinstance(ticket.future.exception(), DeadlinePassed):
            self._meter.add(DROPPED, model=self._model, why="expired")

    def _work(self, number: int, run: Run[In, Out]) -> None:
        """One engine's thread; what a round held is let go before the next is waited for."""
        while self._round(number, run):
            pass

    def _round(self, number: int, run: Run[In, Out]) -> bool:
        """Takes the next batch when there is one, and runs it; False when the batcher is closed."""
        with self._changed:
            while not (batch := self._take()):
                if self._is_closed:
                    return False
                self._changed.wait()
            started = self._clock()
            self._running[number] = (started, len(batch))
            items = [cast(In, ticket.item) for ticket in batch]  # a ticket that is cancelled now loses its own
            for ticket in batch:
                self._count_out(ticket)
        outcome = self._attempt(run, items)
        if isinstance(outcome, Exception) and len(batch) > 1:  # run again one by one: only what is at fault fails
            self._tell(batch, _Split())
            for ticket, item in zip(batch, items, strict=True):
                if not ticket.is_gone:
                    self._tell([ticket], self._attempt(run, [item]))
            batch = []
        with self._changed:  # before the answers are told: who asks next must not find this batch still running
            self._busy_s += self._clock() - started
            self._running[number] = None
        self._tell(batch, outcome)
        return True

    def _count_out(self, ticket: Ticket[In, Out]) -> None:
        """It does not wait any more; lock held."""
        if ticket.is_ahead:
            ticket.is_ahead = False
            self._ahead -= 1

    def _take(self) -> list[Ticket[In, Out]]:
        """The next batch, lock held: the share of a free engine, without those whom it could not help any more."""
        now, free = self._clock(), self._running.count(None)
        size = min(self._largest, -(-len(self._queue) // free))
        least_s, taken = self.times.of(1), list[Ticket[In, Out]]()
        while self._queue and len(taken) < size:
            ticket = self._queue.popleft()
            ticket.is_queued = False
            # What is thought to come too late makes room for others; the last of the queue is tried all the same, or
            # an estimate that is wrong once would never be put right
            is_last = not self._queue and not taken
            if ticket.deadline <= now or (ticket.deadline < now + least_s and not is_last):
                ticket.fail(DeadlinePassed())
            elif not ticket.is_gone:
                taken.append(ticket)
        size = self._fit(taken, now)
        for ticket in reversed(taken[size:]):
            ticket.is_queued = True
            self._queue.appendleft(ticket)
        if self._queue and free > 1:
            self._changed.notify()
        return taken[:size]

    def _fit(self, taken: Sequence[Ticket[In, Out]], now: float) -> int:
        """How many of these to run at once, so that the most pressing of them is in time where that can be had."""
        size = len(taken)
        if size < 2:
            return size
        pressing = min(range(size), key=lambda place: taken[place].deadline)
        left_s = taken[pressing].deadline - now
        if self.times.of(size) <= left_s:
            return size
        item_s = self.times.of(size) / size
        for smaller in reversed(self._buckets[: bisect_left(self._buckets, size)]):
            is_cheap = self.times.of(smaller) <= DEAREST_CUT * item_s * smaller
            if pressing < smaller and is_cheap and self.times.of(smaller) <= left_s:
                return smaller
        return size

    def _attempt(self, run: Run[In, Out], items: list[In]) -> _Ran | Exception:
        """Runs a batch; what the engine raised is its outcome."""
        started = self._clock()
        try:
            values = run(items)
            if len(values) != len(items):
                raise RuntimeError(f"the engine gave {len(values)} answers for {len(items)} items")
        except Exception as error:  # noqa: BLE001  whatever an engine raises is these items', not the thread's
            return error
        run_s = self._clock() - started
        with self._changed:
            self.times.learn(len(items), run_s)
        return _Ran(values, started, run_s)

    def _tell(self, batch: list[Ticket[In, Out]], what: _Split | _Ran | Exception) -> None:
        """Goes to the loops that wait: one call a batch."""
        start = 0
        for loop, group in groupby(batch, key=lambda ticket: ticket.loop):
            part = list(group)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._answer, part, what, start, len(batch))
            start += len(part)

    def _answer(self, part: list[Ticket[In, Out]], what: _Split | _Ran | Exception, start: int, size: int) -> None:
        if isinstance(what, _Split):
            if start == 0:
                self._meter.add(SPLIT_BATCHES, model=self._model)
            return
        if isinstance(what, Exception):
            for ticket in part:
                ticket.fail_here(what)
            return
        for place, ticket in enumerate(part, start):
            if not ticket.future.done():
                ticket.future.set_result(Done(what.values[place], what.started, what.run_s, size))
        for ticket in part:  # after the answers: counting is nobody's wait, and a meter that fails nobody's fault
            waited_s = max(0.0, what.started - ticket.made - ticket.prepared_s)
            self._meter.observe(QUEUE, waited_s, model=self._model)
        if start == 0:
            self._meter.observe(INFER, what.run_s, model=self._model)
            self._meter.observe(BATCH, float(size), model=self._model)


@dataclass(frozen=True, slots=True)
class _Split:
    """A batch failed and is run item by item."""


@dataclass(frozen=True, slots=True)
class _Ran:
    """A batch ran."""

    values: Sequence[Any]
    started: float
    run_s: float
