"""How many requests are let in at a time: simulated services under loads that they can and cannot bear."""

from __future__ import annotations

import heapq
import random

import pytest
from eagleray.serving.concurrency import LEAST, TARGET_SHARE, ConcurrencyLimit
from eagleray.serving.refusals import Refusal

SLO_S = 0.1


class Free:
    """Lets everything in: what a service does without a limit."""

    def begin(self) -> None:
        pass

    def end(self, seconds: float | None, *, images: int = 1) -> None:
        pass


def simulate(
    gate: ConcurrencyLimit | Free,
    clock: list[float],
    *,
    rate: float,
    service_s: float,
    servers: int = 1,
    refusal_s: float = 0.0001,
    until_s: float = 60.0,
    seed: int = 0,
) -> tuple[float, float, float]:
    """One queue, first come first served, as an event loop works through what has come; a refusal costs some of it too.

    Returns:
        Answers within the SLO a second, p99 of what was answered, share refused; all of the second half.
    """
    draw, free = random.Random(seed), [0.0] * servers
    ending: list[tuple[float, float]] = []
    arrival, taken, refused, asked = 0.0, [], 0, 0
    while arrival < until_s:
        arrival += draw.expovariate(rate)
        while ending and ending[0][0] <= arrival:
            clock[0], began = heapq.heappop(ending)
            gate.end(clock[0] - began)
        clock[0] = arrival
        asked += arrival > until_s / 2
        start = max(arrival, heapq.heappop(free))
        try:
            gate.begin()
        except Refusal:
            refused += arrival > until_s / 2
            heapq.heappush(free, start + refusal_s)
            continue
        done = start + service_s
        heapq.heappush(free, done)
        heapq.heappush(ending, (done, arrival))
        if arrival > until_s / 2:
            taken.append(done - arrival)
    taken.sort()
    good = sum(seconds <= 2 * SLO_S for seconds in taken) / (until_s / 2)
    return good, taken[int(0.99 * (len(taken) - 1))], refused / max(1, asked)


def limited(clock: list[float]) -> ConcurrencyLimit:
    return ConcurrencyLimit(TARGET_SHARE * SLO_S, clock=lambda: clock[0])


@pytest.mark.parametrize(("service_s", "servers"), [(0.007, 1), (0.003, 1), (0.02, 4)])
@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_at_twice_the_load_the_good_answers_stay_and_come_in_time(
    service_s: float, servers: int, factor: float
) -> None:
    capacity, clock = servers / service_s, [0.0]
    load = {"rate": factor * capacity, "service_s": service_s, "servers": servers}
    good, p99_s, _ = simulate(limited(clock), clock, **load)
    assert good >= 0.9 * capacity
    assert p99_s <= 2 * SLO_S
    assert simulate(Free(), clock, **load)[0] < 0.05 * capacity  # without a limit nothing comes in time


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_load_that_can_be_borne_is_not_refused(share: float) -> None:
    clock = [0.0]
    _, p99_s, refused = simulate(limited(clock), clock, rate=share / 0.007, service_s=0.007)
    assert refused <= 0.001
    assert p99_s <= 2 * SLO_S


def test_after_a_stall_it_goes_back_to_where_it_began() -> None:
    clock = [0.0]
    gate = limited(clock)
    first = gate.limit
    for _ in range(200):  # a machine that stands still for a while: few on their way, all slow
        clock[0] += 0.5
        gate.begin()
        gate.end(0.5)
        gate.begin()
        gate.end(0.01)
    assert gate.limit <= first / 2
    for _ in range(1_000):
        clock[0] += 0.02
        gate.begin()
        gate.end(0.01)
    assert gate.limit == first


def test_large_requests_of_an_idle_service_leave_the_limit_as_it_is() -> None:
    clock = [0.0]
    gate = limited(clock)
    first = gate.limit
    for _ in range(500):  # 32 images in 150 ms, eight at a time
        for _ in range(8):
            gate.begin()
        clock[0] += 0.15
        for _ in range(8):
            gate.end(0.15, images=32)
    assert gate.limit == first


def test_large_requests_of_a_busy_service_lower_it_all_the_same() -> None:
    clock = [0.0]
    gate = limited(clock)
    first = gate.limit
    gate.begin()
    gate.end(0.15, images=32)
    for _ in range(20):
        for _ in range(8):
            gate.begin()
        clock[0] += 5.0
        for _ in range(8):
            gate.end(5.0, images=32)
    assert gate.limit < first / 2


def test_a_model_that_is_slower_than_promised_is_served_all_the_same() -> None:
    clock = [0.0]
    gate = limited(clock)
    good = simulate(gate, clock, rate=20.0, service_s=0.3, servers=2, until_s=240)
    assert good[2] > 0.5
    assert gate.limit >= LEAST


def test_it_grows_where_more_can_be_borne() -> None:
    clock = [0.0]
    gate = limited(clock)
    simulate(gate, clock, rate=3_900.0, service_s=0.05, servers=200, until_s=30)
    assert gate.limit > 150


def test_a_crowd_at_once_is_let_in_up_to_the_limit_and_no_further() -> None:
    gate = ConcurrencyLimit(0.075)
    for _ in range(gate.limit):
        gate.begin()
    with pytest.raises(Refusal) as caught:
        gate.begin()
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    assert gate.ongoing == gate.limit
    gate.end(None)
    gate.begin()
