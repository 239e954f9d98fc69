"""What a new model is held to: the labels that clients know, its probe set on the service's hardware, and the SLO.

Example:
    >>> refuse_labels(bundle, before, is_allowed=False)
    >>> parity = check_probes(entry, serving)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.core.errors import ClusterError, ConfigError, EagleError, KpiNotMet
from eagleray.flows.pool import error_json, rebuild_error
from eagleray.flows.runtime import first_fault
from eagleray.serving.models import bundle_of
from eagleray.serving.settings import ModelEntry, ServingConfig, SloConfig
from eagleray.serving.window import Figures
from eagleray.vision.bundle import ModelBundle

if TYPE_CHECKING:
    from eagleray.flows.rollout import RolloutConfig

CHECK_TIMEOUT_S = 600.0


def running_bundle(entry: ModelEntry) -> ModelBundle | None:
    """The bundle of a model that runs, which the way back needs.

    Returns:
        None where the entry does not say which model it was deployed with and nothing lies in its folder here.

    Raises:
        ArtifactError: Its folder holds it no more.
    """
    return bundle_of(entry) if entry.digest is not None or Path(entry.bundle).exists() else None


def refuse_labels(bundle: ModelBundle, before: ModelBundle | None, *, is_allowed: bool) -> None:
    """Clients act on labels: a model with others is another service.

    Raises:
        ConfigError: They differ.
    """
    if before is None or is_allowed:
        return
    old, new = [label.id for label in before.labels], [label.id for label in bundle.labels]
    if old != new:
        lost, more = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        gone = (
            f"without {', '.join(lost[:3])}" if lost else f"with {', '.join(more[:3])}" if more else "in another order"
        )
        raise ConfigError(
            f"the new bundle has other labels: {gone}",
            expected=f"the {len(old)} labels of the running model, in its order",
            fix="--allow-new-labels, once the clients know them",
        )


def check_probes(entry: ModelEntry, config: ServingConfig) -> Mapping[str, Any]:
    """Asks the bundle its probe set in a task that holds what a replica holds.

    Raises:
        ArtifactError: It answers otherwise than it must.
        EagleError: The engine cannot be had there.
    """
    import ray
    from ray.exceptions import RayError

    task = ray.remote(num_cpus=config.memory.cpus, num_gpus=config.memory.gpus, max_retries=0)(answer_probes)
    try:
        said = ray.get(task.remote(entry.model_dump(mode="json")), timeout=CHECK_TIMEOUT_S)
    except (RayError, TimeoutError) as error:
        raise ClusterError(
            f"the probe set could not be asked: {first_fault(error)}",
            expected=f"{config.memory.cpus:g} CPUs and {config.memory.gpus:g} GPUs that are free for a moment",
            fix="free some, and run it again; the service is as it was",
        ) from error
    if "error" in said:
        raise rebuild_error(said["error"])
    return said  # type: ignore[no-any-return]


def answer_probes(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine on this machine answers to a bundle's probe set (runs in a task of the cluster).

    Args:
        entry: A ModelEntry as JSON values.

    Returns:
        Parity.to_json, or ``error``.
    """
    from eagleray.infer.parity import check_parity, refuse
    from eagleray.infer.runtimes.measure import choose_runtime

    try:
        model = ModelEntry(**entry)
        bundle, runtime = bundle_of(model), model.runtime
        if runtime == "auto":
            runtime = choose_runtime(bundle, threads=model.threads, device=model.device).name
        parity = check_parity(bundle, runtime, threads=model.threads, device=model.device)
        refuse(bundle, parity)
        return parity.to_json()
    except EagleError as error:
        return {"error": error_json(error)}


def refuse_figures(figures: Figures, slo: SloConfig, config: RolloutConfig) -> None:
    """Holds the new replicas to the SLO, once they have been asked often enough.

    Raises:
        KpiNotMet: They leave it.
    """
    if figures.requests < config.min_requests:
        return
    most_errors = 1 - slo.availability if config.max_error_rate is None else config.max_error_rate
    most_ms = config.max_p99_ms or slo.latency_p99_ms
    rate, p99 = figures.failures / figures.requests, figures.latency_ms_p99
    if rate > most_errors or (p99 is not None and p99 > most_ms):
        said = "-" if p99 is None else f"{p99:,.0f} ms"
        raise KpiNotMet(
            f"the new replicas failed {figures.failures:,} of {figures.requests:,} requests, p99 {said}",
            expected=f"at most {most_errors:.2%} failed and p99 <= {most_ms:g} ms",
            fix="look into it with `eagleray evaluate` and `eagleray export --check`",
        )


def refuse_failed(application: Any) -> str:
    """Holds a deployment to its start.

    Args:
        application: Serve's status of it; None where it is gone.

    Returns:
        The state, in Serve's word.

    Raises:
        ClusterError: Its replicas do not start, or somebody has deleted it.
    """
    state = "gone" if application is None else str(application.status.value)
    if state in ("DEPLOY_FAILED", "gone"):
        raise ClusterError(
            f"the new replicas did not start: {_last_line(application)}",
            expected="replicas that load the bundle and stay",
            fix="try it with `eagleray predict`; look at `serve status`",
        )
    return state


def refuse_ill(application: Any) -> None:
    """Holds the new replicas to their health, which Serve tells of the newest deployment alone.

    Args:
        application: As for refuse_failed.

    Raises:
        KpiNotMet: One died, or its canary failed: its requests failed with it, and its figures are gone.
        ClusterError: As refuse_failed says.
    """
    if refuse_failed(application) == "UNHEALTHY":
        raise KpiNotMet(
            f"a new replica died or turned ill: {_last_line(application)}",
            expected="replicas that stay well while they are watched",
            fix="look into its log by `serve status` and Ray's dashboard; try the bundle with `eagleray predict`",
        )


def _last_line(application: Any) -> str:
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line for text in messages for line in str(text).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason is given"
