"""Serve's question "how many replicas", put to the policy of serving/autoscale.py.

A module of its own, as Serve pickles the module that holds a policy by value into its controller.

Example:
    >>> ScalePolicy(config.autoscale.model_dump(mode="json"), config.slo.model_dump(mode="json"))(context)
    (2, {'why': 'queue'})
"""

from __future__ import annotations

import time
from typing import Any

from eagleray.serving.autoscale import Decision, Sample, State, decide
from eagleray.serving.settings import AutoscaleConfig, SloConfig


class ScalePolicy:
    """Serve's autoscaling policy; it lives in the controller.

    Args:
        autoscale: An AutoscaleConfig as JSON values.
        slo: A SloConfig as JSON values.
    """

    def __init__(self, autoscale: dict[str, Any], slo: dict[str, Any]) -> None:
        self._autoscale, self._slo = AutoscaleConfig(**autoscale), SloConfig(**slo)
        self._state = State()
        self._calm_since_s: float | None = None  # since when those that run would do, while others are still to come

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas to have.

        Args:
            context: Serve's AutoscalingContext.
        """
        running, target = context.current_num_replicas, context.target_num_replicas
        if running == 0 < target or running > target:
            return target, {}  # on its way already: what is measured now is what was
        latencies = [value for value in _newest(context, "latency_ms_p99") if value >= 0]
        sample = Sample(
            replicas=running,
            queue_delay_s=max(_newest(context, "queue_delay_s"), default=0.0),
            utilization=_mean(_newest(context, "utilization")),
            latency_p99_ms=max(latencies, default=None),
            ongoing=float(context.total_num_requests or 0.0),
        )
        now_s = time.time()
        decision = decide(sample, self._state, self._autoscale, self._slo, now_s)
        self._state = decision.state
        if running < target:
            return self._while_more_come(running, target, decision, now_s), {"why": decision.why}
        self._calm_since_s = None
        return decision.target, {"why": decision.why}

    def _while_more_come(self, running: int, target: int, decision: Decision, now_s: float) -> int:
        """The target while fewer run; they may never come, where the cluster is full or they do not start.

        What is missing is wanted until those that run have done for ``downscale_after_s``; no more is asked for.
        """
        if decision.target < running:
            return decision.target
        if decision.target > running or decision.state.over_since_s is not None:
            self._calm_since_s = None
            return target
        self._calm_since_s = now_s if self._calm_since_s is None else self._calm_since_s
        return running if now_s - self._calm_since_s >= self._autoscale.downscale_after_s else target


def _newest(context: Any, name: str) -> list[float]:
    """The newest value of a figure from each running replica."""
    series = (context.raw_metrics or {}).get(name, {})
    running = set(context.running_replicas)
    return [values[-1].value for replica, values in series.items() if values and replica in running]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
