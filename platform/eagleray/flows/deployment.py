"""The Serve deployment: one replica holds the models of a service and answers HTTP; Serve decides how many and where.

What is set and why (Ray Serve 2.60, read in its source and measured, docs/log.md):

- a replica is RUNNING once its models are loaded, held to their probe sets and warmed, and a rolling update stops an
  old one only then (``max_surge_percent``): no request meets a replica that cannot answer;
- the canary runs in the replica, in its own rhythm; Serve asks only for the verdict, each second, and replaces the
  replica at the third bad one, its fixed count: a hung engine is gone a few seconds after the canary says so;
- Serve 2.60 gives every replica a gRPC server for calls between deployments, on every address, without TLS or a token
  unless RAY_USE_TLS is set, and what it is sent is unpickled: it is bound to the node's own address, which is loopback
  for an embedded Ray;
- Serve's own delays of scaling are off, as the policy has its own; its counts of requests stay for scale to zero.

Example:
    >>> serve.run(build(config), name=APP, route_prefix="/")
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

from eagleray.core.config import load
from eagleray.core.errors import CapabilityError
from eagleray.flows.multiplexing import routed
from eagleray.flows.scale_policy import ScalePolicy
from eagleray.serving.settings import ServingConfig

APP = "eagleray"  # the application's and the deployment's name
DEPLOYMENT = "models"
CANARY_FAILURES = 2  # in a row: one may be a machine that stood still for a moment
VERDICT_PERIOD_S, VERDICT_TIMEOUT_S = 1.0, 5.0  # Serve asks for the verdict
VERDICTS = 3  # bad ones in a row until Serve replaces a replica; a constant of its own
EVERY_ADDRESS = "[::]"
DRAIN_LOOP_S = 0.2
RETRY_AFTER_S = 1.0
# Of the replicas at a time: with few of them one by one, with many in four rounds
UPDATE_SHARE = 0.25
CONSTRUCTOR_TRIES = 3  # a full disk or a busy GPU may pass; a wrong bundle does not
LOOK_BACK_S = 11.0  # Serve warns below 10; the policy reads the newest value of each replica, not the mean


class Replica:
    """One replica: the models on their engines, the app that speaks HTTP, and what Serve asks of it.

    Serve makes its deployment of it in ``build``; without Serve it is a class like others.

    Args:
        settings: A ServingConfig as JSON values.
        generation: Names the deployment that made this replica; an update tells new from old by it.

    Raises:
        EagleError: A bundle does not hold, or an engine is not here, or fails its probe set.
    """

    async def __init__(self, settings: dict[str, Any], generation: str) -> None:  # type: ignore[misc]
        from eagleray.flows.serve_metrics import RayMeter
        from eagleray.serving.models import ModelShelf
        from eagleray.serving.window import RequestWindow

        bind_inner_server()
        self._config, self._generation = load(ServingConfig, overrides=settings), generation
        self._meter = RayMeter()
        self.shelf = ModelShelf(self._config, meter=self._meter)
        self._window, self._illness = RequestWindow(late_s=self._config.slo.latency_p99_ms / 1000), ""
        await self.shelf.start()
        self._watch = asyncio.get_running_loop().create_task(self._watch_health())

    def __serve_build_asgi_app__(self) -> Any:
        """The app of this replica (Serve calls it once, after the constructor)."""
        from eagleray.flows.serve_gateway import request_log
        from eagleray.flows.tracing import tracer_from_environment
        from eagleray.serving.app import build_app
        from eagleray.serving.window import Watched

        app = build_app(
            self.shelf,
            limits=self._config.limits,
            meter=self._meter,
            tracer=tracer_from_environment(),
            log=request_log(),
        )
        return Watched(app, self._window)

    async def check_health(self) -> None:
        """The canary's verdict.

        Raises:
            RuntimeError: An engine hangs or answers otherwise than it did: Serve replaces this replica.
        """
        if self._illness:
            raise RuntimeError(self._illness)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling policy looks at."""
        figures = self._window.figures(since_s=10 * self._config.autoscale.period_s)
        p99 = figures.latency_ms_p99
        return {
            "queue_delay_s": self.shelf.queue_delay_s(),
            "utilization": self.shelf.utilization(),
            "latency_ms_p99": -1.0 if p99 is None else p99,
        }

    async def settings(self) -> dict[str, Any]:
        """The service's settings as JSON values; no secret is among them."""
        return self._config.model_dump(mode="json")

    async def figures(self, since_s: float) -> dict[str, Any]:
        """This replica's last requests (window.Figures), and which deployment it is of.

        Args:
            since_s: Requests that ended within so many seconds.
        """
        from ray import serve

        return {
            "generation": self._generation,
            "replica": serve.get_replica_context().replica_id.unique_id,
            **self._window.figures(since_s).to_json(),
        }

    async def _watch_health(self) -> None:
        """Runs the canaries in their rhythm. An illness stands: an engine that came back is not trusted.

        A canary is of one engine, and the next one of another: one failure is forgotten when all engines have passed.
        """
        engines = _most_engines(self._config)
        failures = passes = 0
        while failures < CANARY_FAILURES:
            await asyncio.sleep(self._config.canary.period_s)
            try:
                await self.shelf.check_health()
                passes += 1
                failures = 0 if passes >= engines else failures
            except Exception as error:  # noqa: BLE001  whatever it is, this replica cannot show that it is well
                failures, passes = failures + 1, 0
                verdict = f"{type(error).__name__}: {error}"
        self._illness = verdict

    async def __del__(self) -> None:
        """Serve calls it after the requests have ended."""
        with contextlib.suppress(AttributeError):  # the constructor failed
            self._watch.cancel()
            await self.shelf.drain(self._config.drain_s)


def bind_inner_server() -> None:
    """Has this replica's inner gRPC server, which Serve starts after the constructor, bound to the node's address only.

    Raises:
        CapabilityError: Serve starts it otherwise than the release that this was written for: nothing is served then.
    """
    import ray
    from ray.serve._private import replica

    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is None:
        raise CapabilityError(
            f"Ray {ray.__version__} starts a replica's gRPC server in another way",
            expected="Ray 2.60",
            fix="pip install -c constraints.txt eagleray",
        )
    host = ray.util.get_node_ip_address()

    def bound(server: Any, address: str) -> Any:
        return bind(server, address.replace(EVERY_ADDRESS, f"[{host}]" if ":" in host else host))

    replica.add_port_to_grpc_server = bound


def build(config: ServingConfig, *, generation: str = "") -> Any:
    """The Serve application of a service.

    Args:
        config: Checked already: what does not fit together is refused before anything starts.
        generation: Names this deployment among those of an update; with one there are as many replicas as before.

    Returns:
        An Application for ``serve.run`` or a builder.
    """
    from ray import serve

    settings = config.model_dump(mode="json")
    kind = serve.ingress()(routed(Replica, config))
    deployed = serve.deployment(name=DEPLOYMENT, **options(config, is_update=bool(generation)))(kind)
    return deployed.bind(settings, generation)


def options(config: ServingConfig, *, is_update: bool = False) -> dict[str, Any]:
    """The deployment's options.

    Args:
        config: The service.
        is_update: It runs already.
    """
    return {
        "max_ongoing_requests": config.limits.max_ongoing_requests,
        # Serve knows no queue of length 0; its shortest is one request
        "max_queued_requests": max(1, config.limits.max_queued_requests),
        "backpressure_config": {"status_code": 503, "retry_after_s": RETRY_AFTER_S},
        "graceful_shutdown_wait_loop_s": DRAIN_LOOP_S,
        "graceful_shutdown_timeout_s": config.drain_s,
        "health_check_period_s": VERDICT_PERIOD_S,
        "health_check_timeout_s": VERDICT_TIMEOUT_S,
        "max_constructor_retry_count": CONSTRUCTOR_TRIES,
        "rolling_update_percentage": UPDATE_SHARE,
        "max_surge_percent": int(100 * UPDATE_SHARE),
        "logging_config": log_settings(),
        "ray_actor_options": {"num_cpus": config.memory.cpus, "num_gpus": config.memory.gpus},
        **_replicas(config, is_update=is_update),
    }


def replaced_within_s(config: ServingConfig) -> float:
    """The longest time from an engine's hang until Serve starts another replica in its place, in s.

    A canary has just passed; the next ones run into their timeout, or meet the model's other engines first; Serve asks
    for the verdict and looks at the answers in turns of its own, which double its period at most.
    """
    canary, engines = config.canary, _most_engines(config)
    return CANARY_FAILURES * (engines * canary.period_s + canary.timeout_s) + 2 * VERDICTS * VERDICT_PERIOD_S


def _most_engines(config: ServingConfig) -> int:
    return max(entry.engines for entry in config.models)


def log_settings() -> dict[str, Any]:
    """How Serve's processes log: JSON, and no line a request, which is the request log's business."""
    return {"encoding": "JSON", "enable_access_log": False, "log_level": "WARNING"}


def _replicas(config: ServingConfig, *, is_update: bool) -> Mapping[str, Any]:
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    scale = config.autoscale
    if scale.min_replicas == scale.max_replicas:
        return {"num_replicas": scale.min_replicas}
    policy = AutoscalingPolicy(
        policy_function=ScalePolicy,
        policy_kwargs={"autoscale": scale.model_dump(mode="json"), "slo": config.slo.model_dump(mode="json")},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scaling = AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            # Serve takes it at every deployment, and stops what the load has brought; without it it keeps its target
            initial_replicas=None if is_update else max(1, scale.min_replicas),
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            look_back_period_s=LOOK_BACK_S,
            policy=policy,
        )
    return {"autoscaling_config": scaling}
