"""The batcher's laws: work is conserved, order is kept, nobody starves, and what fails or leaves harms no neighbour."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from eagleray.serving.batcher import Batcher, Closed, DeadlinePassed, Done
from eagleray.serving.run_times import LEAST_S, BusyShare, RunTimes
from eagleray.serving.telemetry import DROPPED, SPLIT_BATCHES, MemoryMeter
from hypothesis import given, settings
from hypothesis import strategies as st

BUCKETS = (1, 2, 4, 8)
LATE = 1e9  # a deadline that is never met


class Clock:
    """Time that stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Ten times each item; waits for a permit before every batch, and keeps what it was given."""

    def __init__(self, clock: Clock | None = None, *, seconds: float = 0.0, is_gated: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.permits = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.clock, self.seconds, self.is_gated = clock, seconds, is_gated
        self.bad: set[int] = set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.began.release()
        if self.is_gated:
            self.permits.acquire()
        if self.clock is not None:
            self.clock.now += self.seconds
        if self.bad & set(items):
            raise ValueError(f"cannot run {sorted(self.bad & set(items))}")
        return [10 * item for item in items]

    async def has_begun(self) -> None:
        """Waits until the next batch is in the engine."""
        await asyncio.to_thread(self.began.acquire)


@contextmanager
def batching(*engines: Engine, clock: Clock | None = None, meter: MemoryMeter | None = None) -> Iterator[Batcher]:
    batcher: Batcher[int, int] = Batcher(engines, buckets=BUCKETS, model="m", clock=clock or Clock(), meter=meter)
    try:
        yield batcher
    finally:
        batcher.close()
        for engine in engines:
            engine.permits.release(1000)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):  # a fault would wait for ever
            await body()

    asyncio.run(bounded())


def submit(batcher: Batcher[int, int], *items: int, deadline: float = LATE) -> list[asyncio.Task[Done[int]]]:
    return [asyncio.create_task(batcher.submit(item, deadline)) for item in items]


async def ticks(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
@settings(max_examples=40)
def test_a_free_engine_takes_all_that_waits_up_to_the_largest_bucket(arrivals: list[int]) -> None:
    """Against an oracle: whenever the engine is free, its batch is the queue's head, min(queue, largest) long."""
    engine = Engine()

    async def body() -> None:
        with batching(engine) as batcher:
            tasks, number, waiting, expected = submit(batcher, 0), 1, 0, [1]
            await engine.has_begun()
            for count in arrivals:
                tasks += submit(batcher, *range(number, number + count))
                number, waiting = number + count, waiting + count
                await ticks()
                assert batcher.queued == waiting
                engine.permits.release()
                if waiting == 0:
                    tasks += submit(batcher, number)
                    number, waiting = number + 1, 1
                await engine.has_begun()
                expected.append(min(waiting, BUCKETS[-1]))
                waiting -= expected[-1]
            engine.permits.release(1000)
            found = [done.value for done in await asyncio.gather(*tasks)]
            assert found == [10 * item for item in range(number)]
            assert [len(batch) for batch in engine.batches[: len(expected)]] == expected
            assert [item for batch in engine.batches for item in batch] == list(range(number))
            assert max(map(len, engine.batches)) <= BUCKETS[-1]

    run(body)


def test_no_batch_waits_to_be_fuller() -> None:
    engine = Engine(is_gated=False)

    async def body() -> None:
        with batching(engine) as batcher:
            for item in range(5):
                assert (await batcher.submit(item, LATE)).batch_size == 1

    run(body)


def test_nobody_starves_however_many_come_after() -> None:
    """An item behind k others runs in batch 1 + k // largest, whatever comes later."""
    engine = Engine()

    async def body() -> None:
        with batching(engine) as batcher:
            tasks = submit(batcher, *range(20))
            await ticks()
            for batch in range(4):
                await engine.has_begun()
                tasks += submit(batcher, *range(100 + 50 * batch, 150 + 50 * batch))
                await ticks()
                engine.permits.release()
            await asyncio.gather(*tasks[:20])
            assert [item for one in engine.batches for item in one][:20] == list(range(20))
            for task in tasks:
                task.cancel()

    run(body)


def test_what_is_cancelled_leaves_the_queue() -> None:
    engine, meter = Engine(), MemoryMeter()

    async def body() -> None:
        with batching(engine, meter=meter) as batcher:
            first = submit(batcher, 0)
            await engine.has_begun()
            tasks = submit(batcher, 1, 2, 3)
            await ticks()
            tasks[1].cancel()
            await ticks()
            assert (batcher.queued, batcher.open) == (2, 3)
            engine.permits.release(2)
            assert [done.value for done in await asyncio.gather(*first, tasks[0], tasks[2])] == [0, 10, 30]
            assert engine.batches == [[0], [1, 3]]
            assert meter.number(DROPPED, model="m", why="cancelled") == 1

    run(body)


def test_a_ticket_that_is_cancelled_before_its_item_is_there_is_passed_over() -> None:
    engine = Engine(is_gated=False)

    async def body() -> None:
        with batching(engine) as batcher:
            ticket = batcher.ticket(LATE)
            ticket.future.cancel()
            await ticks()
            batcher.enter(ticket, 1)
            assert (await batcher.submit(2, LATE)).value == 20
            assert (engine.batches, batcher.open) == ([[2]], 0)

    run(body)


def test_what_is_past_its_deadline_is_not_run_and_costs_its_neighbours_nothing() -> None:
    clock, engine, meter = Clock(), Engine(), MemoryMeter()

    async def body() -> None:
        with batching(engine, clock=clock, meter=meter) as batcher:
            first = submit(batcher, 0)
            await engine.has_begun()
            late, early = submit(batcher, 1, deadline=5.0), submit(batcher, 2, 3)
            await ticks()
            clock.now = 6.0
            engine.permits.release(2)
            assert [done.value for done in await asyncio.gather(*first, *early)] == [0, 20, 30]
            with pytest.raises(DeadlinePassed):
                await late[0]
            assert engine.batches == [[0], [2, 3]]
            await ticks()
            assert meter.number(DROPPED, why="expired") == 1

    run(body)


def test_what_would_come_too_late_makes_room_but_the_last_is_tried() -> None:
    clock, engine = Clock(), Engine()

    async def body() -> None:
        with batching(engine, clock=clock) as batcher:
            batcher.times.learn(1, 2.0)  # wrong by far
            first = submit(batcher, 0)
            await engine.has_begun()
            hopeless, fine = submit(batcher, 1, deadline=1.0), submit(batcher, 2)
            await ticks()
            engine.permits.release(2)
            await asyncio.gather(*first, *fine)
            with pytest.raises(DeadlinePassed):
                await hopeless[0]
            alone = submit(batcher, 3, deadline=1.0)
            engine.permits.release()
            assert (await alone[0]).value == 30
            assert batcher.times.of(1) < 2.0  # put right by what it took

    run(body)


def test_a_batch_is_cut_where_its_most_pressing_item_would_be_late_in_the_whole() -> None:
    clock, engine = Clock(), Engine()

    async def body() -> None:
        with batching(engine, clock=clock) as batcher:
            for size in BUCKETS:
                batcher.times.learn(size, 1.0 * size)  # a batch gains nothing here, so a cut costs nothing
            first = submit(batcher, 0)
            await engine.has_begun()
            tasks = submit(batcher, 1, deadline=2.5) + submit(batcher, 2, 3, 4, 5)
            await ticks()
            engine.permits.release(100)
            await asyncio.gather(*first, *tasks)
            assert engine.batches[:2] == [[0], [1, 2]]

    run(body)


def test_a_batch_is_not_cut_where_that_would_cost_throughput() -> None:
    clock, engine = Clock(), Engine()

    async def body() -> None:
        with batching(engine, clock=clock) as batcher:
            for size in BUCKETS:
                batcher.times.learn(size, 2.0)  # as on a GPU: eight cost what one costs
            first = submit(batcher, 0)
            await engine.has_begun()
            tasks = submit(batcher, 1, deadline=1.9) + submit(batcher, 2, 3, 4, 5)
            await ticks()
            engine.permits.release(100)
            await asyncio.gather(*first, *tasks)
            assert engine.batches == [[0], [1, 2, 3, 4, 5]]

    run(body)


@given(st.sets(st.integers(1, 8)), st.integers(1, 8))
@settings(max_examples=30)
def test_what_fails_fails_alone(bad: set[int], count: int) -> None:
    engine, meter = Engine(), MemoryMeter()
    engine.bad = bad

    async def body() -> None:
        with batching(engine, meter=meter) as batcher:
            first = submit(batcher, 0)
            await engine.has_begun()
            tasks = submit(batcher, *range(1, count + 1))
            await ticks()
            engine.permits.release(1000)
            found = await asyncio.gather(*first, *tasks, return_exceptions=True)
            for item, one in enumerate(found):
                assert (
                    isinstance(one, ValueError) if item in bad else (isinstance(one, Done) and one.value == 10 * item)
                )
            is_split = count > 1 and bool(bad & set(range(1, count + 1)))
            await ticks()
            assert meter.number(SPLIT_BATCHES, model="m") == is_split
            assert (await batcher.submit(50, LATE)).value == 500

    run(body)


def test_an_engine_that_gives_too_few_answers_is_refused() -> None:
    async def body() -> None:
        batcher: Batcher[int, int] = Batcher([lambda items: []], buckets=BUCKETS)
        with pytest.raises(RuntimeError, match="0 answers for 1"):
            await batcher.submit(1, LATE)
        batcher.close()

    run(body)


def test_an_urgent_item_goes_before_all_that_wait() -> None:
    engine = Engine()

    async def body() -> None:
        with batching(engine) as batcher:
            tasks = submit(batcher, *range(1))
            await engine.has_begun()
            tasks += submit(batcher, *range(1, 20))
            await ticks()
            urgent = asyncio.create_task(batcher.submit(99, LATE, is_urgent=True))
            await ticks()
            engine.permits.release(1000)
            await asyncio.gather(urgent, *tasks)
            assert engine.batches[1][0] == 99

    run(body)


def test_two_engines_share_what_waits() -> None:
    one, two = Engine(), Engine()

    async def body() -> None:
        with batching(one, two) as batcher:
            tasks = submit(batcher, 0, 1)
            await asyncio.gather(one.has_begun(), two.has_begun())
            assert sorted([*one.batches, *two.batches]) == [[0], [1]]
            tasks += submit(batcher, *range(2, 6))
            await ticks()
            one.permits.release()
            await one.has_begun()  # the other still runs: all of it is this one's
            assert one.batches[1] == [2, 3, 4, 5]
            one.permits.release(100)
            two.permits.release(100)
            assert [done.value for done in await asyncio.gather(*tasks)] == [10 * item for item in range(6)]

    run(body)


def test_an_engine_that_hangs_leaves_the_work_to_the_other_and_is_seen() -> None:
    clock, engines = Clock(), [Engine(), Engine()]

    async def body() -> None:
        with batching(*engines, clock=clock) as batcher:
            stuck = submit(batcher, 0)
            while not any(engine.batches for engine in engines):
                await asyncio.sleep(0.001)
            well = next(engine for engine in engines if not engine.batches)
            well.permits.release(1000)
            clock.now = 7.0
            assert [done.value for done in await asyncio.gather(*submit(batcher, 1, 2, 3))] == [10, 20, 30]
            assert batcher.longest_s() == 7.0
            stuck[0].cancel()

    run(body)


def test_draining_answers_what_was_given_and_takes_no_more() -> None:
    engine = Engine()

    async def body() -> None:
        with batching(engine) as batcher:
            tasks, unmade = submit(batcher, *range(5)), batcher.ticket(LATE)
            await engine.has_begun()
            draining = asyncio.create_task(batcher.drain())
            await ticks()
            with pytest.raises(Closed):
                await batcher.submit(9, LATE)
            batcher.enter(unmade, 7)  # its ticket is older
            engine.permits.release(100)
            assert [done.value for done in await asyncio.gather(*tasks)] == [0, 10, 20, 30, 40]
            assert (await unmade.future).value == 70
            await draining
            assert batcher.open == 0

    run(body)


def test_what_is_cancelled_while_its_batch_begins_does_not_harm_the_batch() -> None:
    """Its item was once taken away before the engine had read it, and the batch failed."""
    engine = Engine(is_gated=False)

    async def body() -> None:
        with batching(engine) as batcher:
            real = batcher._attempt

            def attempt(run: Any, items: list[int]) -> Any:
                loop.call_soon_threadsafe(tasks[1].cancel)
                asyncio.run_coroutine_threadsafe(ticks(), loop).result(10)
                return real(run, items)

            loop, tasks = asyncio.get_running_loop(), submit(batcher, 0, 1, 2)
            batcher._attempt = attempt  # type: ignore[method-assign]
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [getattr(one, "value", None) for one in found] == [0, None, 20]
            assert sorted(item for batch in engine.batches for item in batch) == [0, 1, 2]

    run(body)


def test_a_meter_that_fails_costs_nobody_an_answer() -> None:
    class Broken(MemoryMeter):
        def observe(self, *arguments: Any, **labels: str) -> None:
            raise ConnectionError("no agent")

    engine = Engine(is_gated=False)

    async def body() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        with batching(engine, meter=Broken()) as batcher:
            assert [done.value for done in await asyncio.gather(*submit(batcher, 1, 2, 3))] == [10, 20, 30]

    run(body)


def test_two_who_drain_both_see_the_end() -> None:
    engine = Engine()

    async def body() -> None:
        with batching(engine) as batcher:
            tasks = submit(batcher, 0)
            await engine.has_begun()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await batcher.drain()
            both = [asyncio.create_task(batcher.drain()) for _ in range(2)]
            await ticks()
            engine.permits.release()
            await asyncio.gather(*tasks, *both)

    run(body)


def test_closing_refuses_what_waits_and_answers_what_runs() -> None:
    engine = Engine()

    async def body() -> None:
        with batching(engine) as batcher:
            tasks = submit(batcher, 0)
            await engine.has_begun()
            tasks += submit(batcher, 1, 2)
            await ticks()
            batcher.close()
            engine.permits.release()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(found[0], Done)
            assert [type(one) for one in found[1:]] == [Closed, Closed]

    run(body)


def test_a_loop_that_is_gone_does_not_end_the_engine() -> None:
    engine = Engine()
    batcher: Batcher[int, int] = Batcher([engine], buckets=BUCKETS)

    async def leave() -> None:
        batcher.enter(batcher.ticket(LATE), 1)
        await engine.has_begun()

    async def come_back() -> None:
        assert (await batcher.submit(2, LATE)).value == 20

    asyncio.run(leave())
    engine.permits.release(10)
    run(come_back)
    batcher.close()


def test_the_wait_is_estimated_from_what_runs_what_waits_and_what_is_on_its_way() -> None:
    clock, engine = Clock(), Engine()

    async def body() -> None:
        with batching(engine, clock=clock) as batcher:
            for size in BUCKETS:
                batcher.times.learn(size, 0.1 * size)
            assert batcher.queue_delay_s() == 0.0
            tasks = submit(batcher, 0)
            await engine.has_begun()
            assert batcher.queue_delay_s() == pytest.approx(0.1)
            clock.now = 0.06
            assert batcher.queue_delay_s() == pytest.approx(0.04)
            tasks += submit(batcher, *range(1, 17))
            coming = [batcher.ticket(LATE) for _ in range(8)]  # being decoded
            await ticks()
            assert batcher.queue_delay_s() == pytest.approx(0.04 + 3 * 0.8)
            for one in [*tasks, *(ticket.future for ticket in coming)]:
                one.cancel()
            await ticks()
            assert batcher.queue_delay_s() < 0.1

    run(body)


def test_who_asks_when_the_answer_is_there_finds_no_queue() -> None:
    """A batch that has been answered was once counted as running still, and its caller's next request refused."""
    clock, engine = Clock(), Engine(is_gated=False)

    async def body() -> None:
        with batching(engine, clock=clock) as batcher:
            batcher.times.learn(8, 100.0)
            for _ in range(100):
                await asyncio.gather(*submit(batcher, *range(8)))
                assert batcher.queue_delay_s() == 0.0

    run(body)


@given(st.data())
@settings(max_examples=25)
def test_every_ticket_has_exactly_one_end(data: st.DataObject) -> None:
    """Whatever is cancelled, late or wrong: all others are answered, none is lost, the queue is empty at the end."""
    clock = Clock()
    engines = [Engine(clock, seconds=0.01, is_gated=False) for _ in range(data.draw(st.integers(1, 3)))]
    bad = data.draw(st.sets(st.integers(0, 40)))
    for engine in engines:
        engine.bad = bad
    plan = data.draw(st.lists(st.sampled_from(["submit", "cancel", "late", "breathe"]), min_size=1, max_size=40))

    async def body() -> None:
        with batching(*engines, clock=clock) as batcher:
            tasks: list[asyncio.Task[Done[int]]] = []
            for what in plan:
                if what in ("submit", "late"):
                    tasks += submit(batcher, len(tasks), deadline=LATE if what == "submit" else -1.0)
                elif what == "cancel" and tasks:
                    tasks[len(tasks) // 2].cancel()
                await ticks(1)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            for item, one in enumerate(found):
                if isinstance(one, Done):
                    assert one.value == 10 * item
                    assert item not in bad
                else:
                    assert isinstance(one, asyncio.CancelledError | DeadlinePassed | ValueError)
            await ticks()
            assert (batcher.queued, batcher.open) == (0, 0)

    run(body)


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(1e-4, 10)), min_size=1))
def test_a_time_is_never_thought_longer_than_the_longest_seen(seen: list[tuple[int, float]]) -> None:
    times = RunTimes(BUCKETS)
    for size, seconds in seen:
        times.learn(size, seconds)
    worst = max(seconds / size for size, seconds in seen)
    assert all(0 < times.of(size) <= worst * size * (1 + 1e-9) for size in range(1, 9))


def test_one_pause_is_not_believed_and_a_slower_engine_is() -> None:
    times = RunTimes(BUCKETS)
    for _ in range(20):
        times.learn(8, 0.08)
    times.learn(8, 60.0)
    assert times.of(8) < 0.2
    for _ in range(40):
        times.learn(8, 0.8)
    assert times.of(8) == pytest.approx(0.8, rel=0.05)


def test_the_busy_share_is_of_the_time_since_it_was_asked() -> None:
    class Engines:
        busy_s, num_engines = 0.0, 2

    clock, engines = Clock(), Engines()
    share = BusyShare(engines, clock)
    clock.now, engines.busy_s = 10.0, 10.0
    assert share.share() == 0.5
    clock.now += LEAST_S / 2
    assert share.share() == 0.5
    clock.now, engines.busy_s = 20.0, 30.0
    assert share.share() == 1.0


def test_busy_seconds_count_what_runs_now() -> None:
    clock, engine = Clock(), Engine()

    async def body() -> None:
        with batching(engine, clock=clock) as batcher:
            tasks = submit(batcher, 0)
            await engine.has_begun()
            clock.now = 3.0
            assert batcher.busy_s == 3.0
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    run(body)
