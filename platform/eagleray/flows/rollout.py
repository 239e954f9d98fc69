"""``eagleray rollout``: another bundle under a name of a running service, without a request that fails; or back.

In this order, and each step may end it with the service as it was:

1. the bundle is loaded, and must have the labels that its clients know;
2. it answers its probe set on this hardware: a task of the cluster asks it, with what a replica holds;
3. Serve starts replicas with it beside the old ones and stops an old one only when a new one is warm; replicas that do
   not start leave the old ones serving;
4. while that goes on and for a while after, the new replicas' failures and p99 are held against the SLO; beyond it, the
   old model is put back the same way and the command ends with exit code 6. So it is when the command is stopped.

Example:
    >>> run(RolloutConfig(model="lite0=bundles/lite0-int8", port=8000))["rolled_back"]
    False
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from eagleray.core.config import Config, load
from eagleray.core.errors import ClusterError, ConfigError, EagleError
from eagleray.core.progress import StatusLine
from eagleray.flows.rollout_checks import (
    check_probes,
    refuse_failed,
    refuse_figures,
    refuse_ill,
    refuse_labels,
    running_bundle,
)
from eagleray.flows.runtime import cluster, first_fault, resolve_address
from eagleray.serving.models import pinned
from eagleray.serving.settings import ModelEntry, ServingConfig, SloConfig
from eagleray.serving.window import Figures, together
from eagleray.vision.bundle import ModelBundle, load_bundle

POLL_S = 1.0
ASK_TIMEOUT_S = 10.0


class RolloutConfig(Config):
    """What is put where.

    Attributes:
        model: ``NAME=BUNDLE``: the service's name of the model, and its new bundle.
        port: Of the service on this machine; not read with an address.
        address: A cluster's, where the service runs; default RAY_ADDRESS.
        watch_s: How long the new replicas are watched once all of them serve.
        min_requests: Fewer requests than this at the new replicas prove nothing against them.
        max_error_rate: Share of failed requests beyond which it is taken back; none: what the SLO leaves.
        max_p99_ms: Latency beyond which it is taken back; none: the SLO's.
        allow_new_labels: Take a bundle with other labels.
        timeout_s: The longest time until all new replicas serve.
    """

    model: str = Field(pattern=r"^[^=]+=.+$")
    port: int = Field(8000, ge=1, le=65535)
    address: str | None = None
    watch_s: float = Field(30.0, ge=0)
    min_requests: int = Field(20, ge=1)
    max_error_rate: float | None = Field(None, ge=0, le=1)
    max_p99_ms: float | None = Field(None, gt=0)
    allow_new_labels: bool = False
    timeout_s: float = Field(600.0, gt=0)


@dataclass(frozen=True)
class Change:
    """One change of a service.

    Attributes:
        old, new: The settings before and after.
        parity: What it answered to its probe set on the service's hardware.
    """

    old: ServingConfig
    new: ServingConfig
    parity: Mapping[str, Any]


def run(config: RolloutConfig, *, is_quiet: bool = False) -> dict[str, Any]:
    """Puts the bundle in.

    Returns:
        ``model``, ``digest``, ``previous``, ``is_new``, ``parity``, ``seconds``; ``watched``: new replicas' Figures.

    Raises:
        ConfigError: No such service or model, or other labels.
        ArtifactError: A bundle does not hold, or fails its probe set on this hardware; or the folder of a model that
            runs holds another one by now, so there is no way back.
        KpiNotMet: It was taken back, with the figures that it was taken back for.
        ClusterError: Ray or Serve does not answer, or the new replicas did not start.
    """
    name, _, path = config.model.partition("=")
    bundle = load_bundle(path)
    address = _address(config)
    began, status = time.monotonic(), StatusLine("rollout", is_quiet=is_quiet)
    with cluster(address):
        from eagleray.flows.deployment import APP

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        handle = _handle(APP)
        old = load(ServingConfig, overrides=_asked(lambda: handle.settings.remote().result(timeout_s=ASK_TIMEOUT_S)))
        entry = _entry(old, name)
        before = running_bundle(entry)
        refuse_labels(bundle, before, is_allowed=config.allow_new_labels)
        previous = entry.digest or (before.model_digest if before else "")
        if before and entry.digest == bundle.model_digest and _policy(bundle) == _policy(before):
            return {"model": name, "digest": previous, "previous": previous, "is_new": False}
        changed = entry.model_copy(update={"bundle": str(Path(path).resolve()), "digest": bundle.model_digest})
        new = old.model_copy(update={"models": tuple(changed if e.name == name else e for e in old.models)})
        new = pinned(new)  # replicas that start load the other models too
        status.show("asking the bundle its probe set on the service's hardware")
        change = Change(old=old, new=new, parity=check_probes(changed, old))
        try:
            watched = _put_in(change, config, handle, status)
        finally:
            status.close()
    return {
        "model": name,
        "digest": bundle.model_digest,
        "previous": previous,
        "is_new": True,
        "parity": dict(change.parity),
        "seconds": round(time.monotonic() - began, 1),
        "watched": watched.to_json(),
    }


def _address(config: RolloutConfig) -> str:
    """The Ray of the service.

    Raises:
        ConfigError: None is given, and no service runs on the port.
    """
    from eagleray.flows.serve_local import read_state

    given = resolve_address(config.address)
    if given:
        return given
    state = read_state(config.port)
    if not state:
        raise ConfigError(
            f"no `eagleray serve` on port {config.port} of this machine",
            expected="a service that runs, by --port, or a cluster, by --address",
            fix="start it with `eagleray serve`, or name the cluster that `serve deploy` was given",
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # what an embedded Ray is started with
    return str(state["address"])


def _handle(app: str) -> Any:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_app_handle(app)
    except RayServeException as error:
        raise ConfigError(
            f"no application {app!r} on this cluster: {first_fault(error)}",
            expected="a service that `eagleray serve` or `serve deploy serve_apps/serve.yaml` started",
            fix="look at `serve status`",
        ) from error


def _asked(ask: Callable[[], Any]) -> Any:
    """What the service says.

    Raises:
        ClusterError: It does not answer.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        return ask()
    except (RayError, RayServeException, TimeoutError) as error:
        raise ClusterError(
            f"the service does not answer: {first_fault(error)}",
            expected="a service whose replicas run",
            fix="look at `serve status`, and run it again",
        ) from error


def _entry(config: ServingConfig, name: str) -> ModelEntry:
    entry = config.entry(name)
    if entry is None:
        raise ConfigError(
            f"the service has no model {name!r}",
            expected=f"one of {', '.join(e.name for e in config.models)}",
            fix="name one of them; a new name needs a new `eagleray serve`",
        )
    return entry


def _policy(bundle: ModelBundle) -> Any:
    return None if bundle.policy is None else bundle.policy.to_json()


def _put_in(change: Change, config: RolloutConfig, handle: Any, status: StatusLine) -> Figures:
    """Deploys the new settings, watches, and takes them back where they do not hold.

    Raises:
        KpiNotMet, ClusterError: As run says; the old settings are deployed again.
        KeyboardInterrupt: Of Ctrl-C, SIGTERM or a closed terminal; likewise.
    """
    with _ends_as_ctrl_c():
        try:
            return _watch(_deploy(change.new), change.new.slo, config, handle, status)
        except BaseException as error:  # whatever it is, nobody judges the new model any more
            back = _deploy(change.old)  # before a word: the terminal may be gone
            with contextlib.suppress(OSError):
                status.note(f"taking it back: {error.seen if isinstance(error, EagleError) else 'stopped'}")
                _await(back, config, handle, status)
            if not isinstance(error, EagleError):
                raise
            seen = f"{error.seen}; the old model serves again"
            raise type(error)(seen, expected=error.expected, fix=error.fix) from error


@contextlib.contextmanager
def _ends_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal are Ctrl-C; the ones after the first are not heard, as the way back has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def end(number: int, frame: object) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    saved = {one: signal.signal(one, end) for one in numbers if signal.getsignal(one) is not signal.SIG_IGN}  # nohup
    try:
        yield
    finally:
        for one, handler in saved.items():
            signal.signal(one, handler)


def _deploy(config: ServingConfig) -> str:
    """Hands settings to Serve, which replaces replicas one after another.

    Returns:
        The new deployment's generation.
    """
    from ray import serve

    from eagleray.flows.deployment import APP, build

    generation = secrets.token_hex(8)
    targets = [serve.RunTarget(build(config, generation=generation), name=APP, route_prefix="/")]
    _asked(lambda: serve.run_many(targets, wait_for_applications_running=False))
    return generation


def _watch(generation: str, slo: SloConfig, config: RolloutConfig, handle: Any, status: StatusLine) -> Figures:
    """Watches the new replicas until they have served alone for watch_s.

    Raises:
        KpiNotMet: They fail or are slow, or one of them died or turned ill: what it had answered went with it.
        ClusterError: They do not start, or not in time.
    """
    began = time.monotonic()
    alone_since: float | None = None
    while True:
        figures, is_alone = _figures(generation, handle, since_s=time.monotonic() - began)
        refuse_figures(figures, slo, config)
        application = _application()
        refuse_ill(application)
        now = time.monotonic()
        if alone_since is None and _is_done(is_alone, application, config, began):
            alone_since = now
        if alone_since is not None and now - alone_since >= config.watch_s:
            return figures
        phase = "starting new replicas" if alone_since is None else "watching the new replicas"
        p99 = "-" if figures.latency_ms_p99 is None else f"{figures.latency_ms_p99:,.0f} ms"
        status.show(f"{phase}: {figures.requests:,} requests, {figures.failures:,} failed, p99 {p99}")
        time.sleep(POLL_S)


def _await(generation: str, config: RolloutConfig, handle: Any, status: StatusLine) -> None:
    """Waits until a deployment serves alone.

    Raises:
        ClusterError: It does not, or not in time.
    """
    began = time.monotonic()
    while not _is_done(_figures(generation, handle, since_s=0.0)[1], _application(), config, began):
        status.show("waiting until the old model serves alone")
        time.sleep(POLL_S)


def _is_done(is_alone: bool, application: Any, config: RolloutConfig, began: float) -> bool:
    """Whether every replica is of the newest deployment and runs; a service of no replicas has none of another.

    Args:
        is_alone: Whether those that answer are of the newest deployment.
        application: What Serve says of the service.
        config: How long it may take.
        began: Since when it takes.

    Raises:
        ClusterError: The replicas do not start, or take longer than they may.
    """
    state = refuse_failed(application)
    if state == "RUNNING" and (is_alone or not _count(application)):
        return True
    if time.monotonic() - began > config.timeout_s:
        raise ClusterError(
            f"the new replicas did not serve alone within {config.timeout_s:g} s; the service is {state.lower()}",
            expected="room for a new replica beside the old ones",
            fix="free CPUs, GPUs or memory, or raise timeout_s",
        )
    return False


def _application() -> Any:
    """What Serve says of the service; None where it is gone."""
    from ray import serve

    from eagleray.flows.deployment import APP

    return _asked(serve.status).applications.get(APP)


def _count(application: Any) -> int:
    """Its replicas, those that start or stop among them."""
    return sum(sum(one.replica_states.values()) for one in application.deployments.values())


def _figures(generation: str, handle: Any, *, since_s: float) -> tuple[Figures, bool]:
    """The figures of the replicas of a deployment, and whether only such replicas serve.

    A replica that ends meanwhile does not answer, and is not asked again.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        said = handle.broadcast("figures", since_s).results(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):
        return together([]), False
    names = Figures.__dataclass_fields__
    ours = [one for one in said if isinstance(one, dict) and one["generation"] == generation]
    return together([Figures(**{name: one[name] for name in names}) for one in ours]), 0 < len(ours) == len(said)
