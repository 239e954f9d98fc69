"""The scaling policy: bounds, direction and calm as laws; step, spike and day traces against a simulated service."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from eagleray.serving.autoscale import Sample, State, decide
from eagleray.serving.settings import AutoscaleConfig, SloConfig
from hypothesis import given
from hypothesis import strategies as st

SLO = SloConfig(latency_p99_ms=100.0)
CONFIG = AutoscaleConfig(min_replicas=1, max_replicas=16, upscale_after_s=2.0, downscale_after_s=60.0)
ZERO = CONFIG.model_copy(update={"min_replicas": 0, "idle_after_s": 120.0})


def sample(**changes: float) -> Sample:
    base = Sample(replicas=2, queue_delay_s=0.0, utilization=0.6, latency_p99_ms=20.0, ongoing=4.0)
    return replace(base, **changes)  # type: ignore[arg-type]


samples = st.builds(
    Sample,
    replicas=st.integers(0, 40),
    queue_delay_s=st.floats(0, 100),
    utilization=st.floats(0, 1),
    latency_p99_ms=st.none() | st.floats(0, 1e6),
    ongoing=st.floats(0, 1e5),
)
times = st.none() | st.floats(0, 100)
states = st.builds(State, times, times, st.integers(0, 16), times)


@given(samples, states)
def test_a_target_is_within_its_bounds_and_grows_by_no_more_than_the_factor(seen: Sample, state: State) -> None:
    target = decide(seen, state, CONFIG, SLO, 100.0).target
    assert CONFIG.min_replicas <= target <= CONFIG.max_replicas
    assert target <= max(seen.replicas + 1, seen.replicas * CONFIG.max_growth, CONFIG.min_replicas)


@given(samples.filter(lambda one: one.replicas > 0), states, st.floats(0, 10), st.floats(0, 1))
def test_more_load_never_gives_fewer_replicas(seen: Sample, state: State, more_s: float, more: float) -> None:
    loaded = replace(seen, queue_delay_s=seen.queue_delay_s + more_s, utilization=min(1.0, seen.utilization + more))
    assert decide(loaded, state, CONFIG, SLO, 100.0).target >= decide(seen, state, CONFIG, SLO, 100.0).target


@given(samples.filter(lambda one: 1 <= one.replicas <= 16))
def test_the_first_look_at_anything_changes_nothing(seen: Sample) -> None:
    assert decide(seen, State(), CONFIG, SLO, 100.0).target == seen.replicas


def test_what_the_policy_takes_away_it_does_not_want_back() -> None:
    """The load that let a replica go runs on what is left below the target."""
    for replicas in range(2, 17):
        for percent in range(101):
            seen = sample(replicas=replicas, utilization=percent / 100, latency_p99_ms=None)
            fewer = decide(seen, State(under_since_s=0.0), CONFIG, SLO, 60.0).target
            if fewer < replicas:
                after = seen.utilization * replicas / fewer
                assert after <= CONFIG.target_utilization
                assert (
                    decide(replace(seen, replicas=fewer, utilization=after), State(), CONFIG, SLO, 60.0).target == fewer
                )


@given(samples, states)
def test_calm_never_adds_replicas(seen: Sample, state: State) -> None:
    calm = replace(seen, replicas=max(1, seen.replicas), queue_delay_s=0.0, utilization=0.2, latency_p99_ms=None)
    assert decide(calm, state, CONFIG, SLO, 100.0).target <= calm.replicas


def test_a_long_wait_adds_replicas_once_it_has_lasted() -> None:
    late = sample(queue_delay_s=0.09, utilization=1.0)
    first = decide(late, State(), CONFIG, SLO, 10.0)
    second = decide(late, first.state, CONFIG, SLO, 11.9)
    third = decide(late, second.state, CONFIG, SLO, 12.0)
    assert (first.target, second.target, third.target) == (2, 2, 4)
    assert "queue delay" in third.why


def test_a_pause_in_the_load_starts_the_count_again() -> None:
    late = sample(queue_delay_s=0.09, utilization=1.0)
    first = decide(late, State(), CONFIG, SLO, 10.0)
    calm = decide(sample(), first.state, CONFIG, SLO, 11.0)
    assert decide(late, calm.state, CONFIG, SLO, 12.0).target == 2


def test_a_model_that_is_slow_by_itself_gets_no_replicas_for_it() -> None:
    slow = sample(latency_p99_ms=400.0, utilization=0.2)
    assert decide(slow, State(over_since_s=0.0), CONFIG, SLO, 60.0).target == 2
    assert decide(replace(slow, utilization=0.5), State(over_since_s=0.0), CONFIG, SLO, 60.0).target > 2


def test_nothing_is_taken_away_while_images_wait() -> None:
    waiting = sample(utilization=0.05, queue_delay_s=0.02)
    assert decide(waiting, State(under_since_s=0.0), CONFIG, SLO, 600.0).target == 2


def test_scale_to_zero_is_an_option_and_one_request_ends_it() -> None:
    nothing = sample(replicas=1, utilization=0.0, latency_p99_ms=None, ongoing=0.0)
    assert decide(nothing, State(idle_since_s=0.0), CONFIG, SLO, 1e6).target == 1
    assert decide(nothing, State(idle_since_s=0.0), ZERO, SLO, 119.0).target == 1
    assert decide(nothing, State(idle_since_s=0.0), ZERO, SLO, 120.0).target == 0
    assert decide(replace(nothing, replicas=0), State(), ZERO, SLO, 1e6).target == 0
    assert decide(replace(nothing, replicas=0, ongoing=1.0), State(), ZERO, SLO, 1e6).target == 1
    busy = decide(replace(nothing, ongoing=1.0), State(idle_since_s=0.0), ZERO, SLO, 119.0)
    assert busy.state.idle_since_s is None
    answered = decide(replace(nothing, latency_p99_ms=8.0), State(idle_since_s=0.0), ZERO, SLO, 121.0)
    assert (answered.target, answered.state.idle_since_s) == (1, None)  # short requests fall between the counts


@dataclass
class Outcome:
    """What a simulated service did, second by second."""

    replicas: list[int]
    refused: list[float]  # share of what came, 0..1
    load: list[float]

    @property
    def changes(self) -> int:
        return sum(a != b for a, b in pairwise(self.replicas))


def simulate(load: Callable[[float], float], seconds: int, config: AutoscaleConfig, *, start_s: float = 4.0) -> Outcome:
    """A service whose replicas answer 100 images/s each and take ``start_s`` to start; the queue is cut at the SLO.

    An oracle in tenths of a second, without randomness: a fluid queue before R servers.
    """
    rate, step_s, allowed_s = 100.0, 0.1, SLO.latency_p99_ms / 1000
    ready, coming, backlog, state = max(1, config.min_replicas), list[tuple[float, int]](), 0.0, State()
    outcome, busy, seen, lost = Outcome([], [], []), 0.0, 0.0, 0.0
    waits: list[float] = []
    for tick in range(seconds * 10):
        now = tick * step_s
        ready = next((count for due, count in reversed(coming) if due <= now), ready)
        coming = [one for one in coming if one[0] > now]
        arriving, capacity = load(now) * step_s, ready * rate * step_s
        room = ready * rate * allowed_s + capacity - backlog
        taken = min(arriving, max(0.0, room))
        served = min(capacity, backlog + taken)
        backlog += taken - served
        busy, seen, lost = busy + served, seen + arriving, lost + arriving - taken
        if tick % 10 == 9:
            wait_s = backlog / (ready * rate) if ready else 0.0
            waits.append(wait_s)
            share = busy / (ready * rate) if ready else 0.0
            look = Sample(
                replicas=ready,
                queue_delay_s=wait_s,
                utilization=min(1.0, share),
                latency_p99_ms=1000 * max(waits[-10:]) + 10 if busy else None,
                ongoing=backlog + (arriving if ready == 0 else served),
            )
            if not coming:
                decision = decide(look, state, config, SLO, now)
                state = decision.state
                if decision.target > ready:
                    coming.append((now + start_s, decision.target))
                ready = min(ready, decision.target)
            outcome.replicas.append(ready)
            outcome.refused.append(lost / seen if seen else 0.0)
            outcome.load.append(seen)
            busy = seen = lost = 0.0
    return outcome


def needed(load: float) -> int:
    """Replicas that carry a load at the target."""
    return max(1, math.ceil(load / (100.0 * CONFIG.target_utilization)))


def test_a_step_is_carried_within_seconds_and_then_nothing_moves() -> None:
    found = simulate(lambda now: 60.0 if now < 30 else 600.0, 300, CONFIG)
    # 1 to 16 doubles four times; each look waits 2 s and a start takes 4 s
    settled = 30 + 4 * (2 + 4 + 2)
    assert max(found.refused[:30]) == 0
    assert max(found.refused[settled:]) == 0
    assert needed(600) <= found.replicas[settled] <= 2 * needed(600)
    assert set(found.replicas[150:]) == {found.replicas[-1]}
    assert needed(600) <= found.replicas[-1] <= needed(600) + 2


def test_a_spike_is_answered_and_let_go_after_it() -> None:
    found = simulate(lambda now: 500.0 if 60 <= now < 75 else 50.0, 300, CONFIG)
    assert max(found.replicas[60:90]) >= 4
    assert found.replicas[-1] == 1
    assert max(found.refused[100:]) == 0


def test_a_short_burst_moves_nothing() -> None:
    found = simulate(lambda now: 90.0 if 60 <= now < 61 else 40.0, 180, CONFIG)
    assert set(found.replicas) == {1}


def test_a_day_is_followed_without_waste_and_without_swinging() -> None:
    def day(now: float) -> float:
        return 450.0 - 400.0 * math.cos(2 * math.pi * now / 3600)  # an hour stands for the day: harder to follow

    found = simulate(day, 3600, CONFIG)
    lost = sum(share * load for share, load in zip(found.refused, found.load, strict=True))
    assert lost / sum(found.load) < 0.001
    ideal = sum(needed(load) for load in found.load)
    assert sum(found.replicas) <= 1.3 * ideal
    assert found.changes <= 2 * (needed(850) - 1) + 2  # up once and down once


def test_a_service_nobody_asks_goes_and_comes_back() -> None:
    found = simulate(lambda now: 50.0 if now < 30 or 300 <= now < 330 else 0.0, 600, ZERO)
    assert (found.replicas[29], found.replicas[250]) == (1, 0)
    assert 1 in found.replicas[300:310]
    assert found.replicas[-1] == 0


@pytest.mark.parametrize("swing_s", [5, 20, 60])
def test_a_load_that_swings_does_not_make_the_service_swing(swing_s: int) -> None:
    found = simulate(lambda now: 300.0 if int(now / swing_s) % 2 else 100.0, 900, CONFIG)
    late = found.replicas[300:]
    assert sum(a != b for a, b in pairwise(late)) <= 900 // 60
    assert max(found.refused[300:]) < 0.5
