"""How many replicas there should be: a pure function of what is measured, what is promised, and for how long.

What is looked at is what a user feels: the wait in the queue against the latency that is promised, and how much of the
time the engines run. Counts of requests are not: a request of 32 images is not one of one image. Replicas are added
within seconds, by a factor; they are taken away one look after another only when the fewer would have carried all that
came for a while, so a load that swings does not make the service swing.

Example:
    >>> sample = Sample(replicas=2, queue_delay_s=0.08, utilization=0.99, latency_p99_ms=140.0, ongoing=60.0)
    >>> decide(sample, State(over_since_s=0.0), AutoscaleConfig(max_replicas=8), SloConfig(), now_s=2.0).target
    4
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from eagleray.serving.settings import AutoscaleConfig, SloConfig

# Fewer replicas must run at this part of the target or below: what is taken away is not wanted back at once
ROOM = 0.9
CALM = 0.5  # of the wait that is allowed: above it nothing is taken away
# A latency over the promise calls for replicas only where engines are this busy: a model that is too slow by itself, or
# a slow network, is not made faster by another replica
BUSY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is measured now.

    Attributes:
        replicas: Replicas that answer.
        queue_delay_s: The wait that a new image would have, of the replica where it is longest.
        utilization: Share of the time in which engines ran, mean of all replicas, 0..1.
        latency_p99_ms: Of the last requests; None when there was none.
        ongoing: Requests that are being answered or wait, all together.
    """

    replicas: int
    queue_delay_s: float
    utilization: float
    latency_p99_ms: float | None
    ongoing: float


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered from one look to the next.

    Attributes:
        over_since_s: Since when the load has been too high; None when it is not.
        under_since_s: Since when fewer replicas would have done; None when they would not.
        most_needed: The most that were needed since then.
        idle_since_s: Since when nothing has come; None when something has.
    """

    over_since_s: float | None = None
    under_since_s: float | None = None
    most_needed: int = 0
    idle_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be.

    Attributes:
        target: The number.
        state: To hand in at the next look.
        why: In words, for the log.
    """

    target: int
    state: State
    why: str


def decide(sample: Sample, state: State, config: AutoscaleConfig, slo: SloConfig, now_s: float) -> Decision:
    """How many replicas there should be.

    Args:
        sample: What is measured now.
        state: What the decision before left.
        config: Bounds, targets, delays.
        slo: What is promised.
        now_s: The time, on a clock that does not go back.

    Returns:
        A target within the config's bounds, above the present number by ``max_growth`` at most.
    """
    replicas = sample.replicas
    if replicas == 0:
        wanted = max(config.min_replicas, 1 if sample.ongoing > 0 else 0)
        return Decision(min(wanted, config.max_replicas), State(), "asked for" if sample.ongoing > 0 else "idle")
    within = min(max(replicas, config.min_replicas), config.max_replicas)
    if within != replicas:
        return Decision(within, State(), "bounds")
    pressure, why = _pressure(sample, config, slo)
    if pressure > 1:
        return _up(replicas, pressure, why, state, config, now_s)
    return _down(sample, state, config, slo, now_s)


def _pressure(sample: Sample, config: AutoscaleConfig, slo: SloConfig) -> tuple[float, str]:
    """The load over what is wanted, by the worst of three measures: above 1 there are too few replicas."""
    slo_s = slo.latency_p99_ms / 1000
    # A p99 is of the last seconds, and stays high after replicas have come: it adds one at a time
    late = min((sample.latency_p99_ms or 0.0) / slo.latency_p99_ms, (sample.replicas + 1) / sample.replicas)
    is_busy = sample.utilization >= BUSY * config.target_utilization
    measures = {
        "queue delay": sample.queue_delay_s / (config.queue_share * slo_s),
        "utilization": sample.utilization / config.target_utilization,
        "p99": late if is_busy else 0.0,
    }
    why = max(measures, key=lambda name: measures[name])
    return measures[why], why


def _up(replicas: int, pressure: float, why: str, state: State, config: AutoscaleConfig, now_s: float) -> Decision:
    since_s = now_s if state.over_since_s is None else state.over_since_s
    if now_s - since_s < config.upscale_after_s or replicas >= config.max_replicas:
        return Decision(replicas, State(over_since_s=since_s), f"{why} {pressure:.2f}x")
    wanted = math.ceil(replicas * min(pressure, config.max_growth))
    most = max(replicas + 1, math.floor(replicas * config.max_growth))
    return Decision(min(max(wanted, replicas + 1), most, config.max_replicas), State(), f"{why} {pressure:.2f}x")


def _down(sample: Sample, state: State, config: AutoscaleConfig, slo: SloConfig, now_s: float) -> Decision:
    replicas = sample.replicas
    # Counts of requests are samples, which a short request falls between; an answer leaves a latency
    is_idle = sample.ongoing <= 0 and sample.queue_delay_s <= 0 and sample.latency_p99_ms is None
    idle_since_s = (now_s if state.idle_since_s is None else state.idle_since_s) if is_idle else None
    if config.min_replicas == 0 and idle_since_s is not None and now_s - idle_since_s >= config.idle_after_s:
        return Decision(0, State(), f"idle for {now_s - idle_since_s:.0f} s")
    needed = max(1, config.min_replicas, math.ceil(replicas * sample.utilization / (ROOM * config.target_utilization)))
    is_calm = sample.queue_delay_s <= CALM * config.queue_share * slo.latency_p99_ms / 1000
    if needed >= replicas or not is_calm:
        return Decision(replicas, State(idle_since_s=idle_since_s), "as wanted")
    since_s = now_s if state.under_since_s is None else state.under_since_s
    most_needed = min(max(needed, state.most_needed), replicas)
    if now_s - since_s < config.downscale_after_s:
        return Decision(replicas, State(None, since_s, most_needed, idle_since_s), "fewer would do")
    return Decision(most_needed, State(idle_since_s=idle_since_s), f"{most_needed} would have done")
