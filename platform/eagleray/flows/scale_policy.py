"""Serve's question "how many replicas", put to the policy of serving/autoscale.py.

A module of its own, as Serve pickles the module that holds a policy by value into its controller.

Example:
    >>> ScalePolicy(config.autoscale.model_dump(mode="json"), config.slo.model_dump(mode="json"))(context)
    (2, {'why': 'queue'})
"""

from __future__ import annotations

import time
from typing import Any

from eagleray.serving.autoscale import Sample, State, decide
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

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas to have.

        Args:
            context: Serve's AutoscalingContext.
        """
        running, target = context.current_num_replicas, context.target_num_replicas
        if running != target:
            return target, {}  # on its way already: what is measured now is what was
        latencies = [value for value in _newest(context, "latency_ms_p99") if value >= 0]
        sample = Sample(
            replicas=running,
            queue_delay_s=max(_newest(context, "queue_delay_s"), default=0.0),
            utilization=_mean(_newest(context, "utilization")),
            latency_p99_ms=max(latencies, default=None),
            ongoing=float(context.total_num_requests or 0.0),
        )
        decision = decide(sample, self._state, self._autoscale, self._slo, time.time())
        self._state = decision.state
        return decision.target, {"why": decision.why}


def _newest(context: Any, name: str) -> list[float]:
    """The newest value of a figure from each running replica."""
    series = (context.raw_metrics or {}).get(name, {})
    running = set(context.running_replicas)
    return [values[-1].value for replica, values in series.items() if values and replica in running]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
