"""What a rollout refuses before it begins, and by which figures it takes a model back; Serve's scaling question."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eagleray.core.config import load
from eagleray.core.errors import ArtifactError, ClusterError, ConfigError, KpiNotMet
from eagleray.flows import rollout, rollout_checks, scale_policy
from eagleray.flows.rollout import RolloutConfig
from eagleray.flows.scale_policy import ScalePolicy
from eagleray.flows.serve import ServeConfig, to_serving
from eagleray.serving.models import pinned
from eagleray.serving.settings import AutoscaleConfig, ServingConfig, SloConfig
from eagleray.serving.window import Figures
from eagleray.vision.bundle import load_bundle

from tests.tiny_model import make_bundle

SLO = SloConfig(latency_p99_ms=100, availability=0.99)


def config(**given: Any) -> RolloutConfig:
    return load(RolloutConfig, overrides={"model": "a=b", **given})


def test_a_model_without_a_name_or_a_bundle_is_refused() -> None:
    for text in ("bundles/lite0", "=b", "a="):
        with pytest.raises(ConfigError, match="model"):
            config(model=text)


@pytest.mark.parametrize(
    ("figures", "is_fine"),
    [
        (Figures(100, 1, 50, 99.0), True),  # 1 % is what the SLO leaves; an overload is not the model's
        (Figures(100, 2, 0, 99.0), False),
        (Figures(100, 0, 0, 101.0), False),
        (Figures(19, 19, 0, 999.0), True),  # too few to say anything
        (Figures(100, 0, 0, None), True),
    ],
)
def test_the_slo_decides(figures: Figures, is_fine: bool) -> None:
    if is_fine:
        rollout_checks.refuse_figures(figures, SLO, config())
    else:
        with pytest.raises(KpiNotMet, match=f"of {figures.requests} requests"):
            rollout_checks.refuse_figures(figures, SLO, config())


def test_own_bounds_win_over_the_slo() -> None:
    rollout_checks.refuse_figures(Figures(100, 9, 0, 400.0), SLO, config(max_error_rate=0.1, max_p99_ms=500))
    with pytest.raises(KpiNotMet):
        rollout_checks.refuse_figures(Figures(100, 1, 0, 1.0), SLO, config(max_error_rate=0.0))


def test_other_labels_are_another_service(tiny_model: Path) -> None:
    old = load_bundle(tiny_model)
    turned = dataclasses.replace(old, labels=tuple(reversed(old.labels)))
    fewer = dataclasses.replace(old, labels=old.labels[1:])
    rollout_checks.refuse_labels(old, old, is_allowed=False)
    rollout_checks.refuse_labels(fewer, old, is_allowed=True)
    rollout_checks.refuse_labels(fewer, None, is_allowed=False)
    for other, said in ((turned, "in another order"), (fewer, f"without {old.labels[0].id}")):
        with pytest.raises(ConfigError, match=said):
            rollout_checks.refuse_labels(other, old, is_allowed=False)


def test_where_no_service_runs_it_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="no `eagleray serve` on port 8000"):
        rollout._address(config())
    assert rollout._address(config(address="10.0.0.1:6379")) == "10.0.0.1:6379"
    assert os.environ.get("RAY_ADDRESS") is None


def roll_out(service: ServingConfig, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """What a rollout of ``tiny`` says, and the change that it would make."""
    said = SimpleNamespace(result=lambda timeout_s: service.model_dump(mode="json"))
    changes: list[Any] = []
    monkeypatch.setattr(rollout, "cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(rollout, "_address", lambda _: "here")
    monkeypatch.setattr(rollout, "_asked", lambda ask: ask())
    handle = SimpleNamespace(settings=SimpleNamespace(remote=lambda: said))
    monkeypatch.setattr(rollout, "_handle", lambda _: handle)
    monkeypatch.setattr(rollout, "check_probes", lambda entry, _: {"entry": entry})
    monkeypatch.setattr(rollout, "_put_in", lambda change, *_: changes.append(change) or SimpleNamespace(to_json=dict))
    return rollout.run(config(model=f"tiny={bundle}"), is_quiet=True), changes


def serves(*bundles: Path) -> ServingConfig:
    """A service of ``tiny`` and others, as `eagleray serve` deploys it."""
    given = [f"{name}={bundle}" for name, bundle in zip(("tiny", "other"), bundles, strict=False)]
    return pinned(to_serving(load(ServeConfig, overrides={"model": given, "auth": "none"})))


def test_the_new_model_is_pinned_to_its_digest(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = serves(tiny_model, tiny_model), make_bundle(tmp_path / "new", seed=8)
    said, (change,) = roll_out(old, new, monkeypatch)
    digests = [load_bundle(new).model_digest, load_bundle(tiny_model).model_digest]
    assert (said["is_new"], said["digest"], said["previous"]) == (True, *digests)
    assert change.old == old
    assert [entry.digest for entry in change.new.models] == digests
    assert change.parity["entry"] == change.new.models[0]


@pytest.mark.parametrize("which", [0, 1])
def test_without_a_way_back_nothing_is_changed(
    which: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running model's folder was written over: what was put back would have been the new model again."""
    folders = [shutil.copytree(tiny_model, tmp_path / name) for name in ("tiny", "other")]
    service = serves(*folders)
    new = make_bundle(tmp_path / "new", seed=8)
    shutil.rmtree(folders[which])
    shutil.copytree(new, folders[which])
    for bundle in (new, folders[which]):  # in a folder of its own, and in the one that was written over
        with pytest.raises(ArtifactError, match="holds another model than the service"):
            roll_out(service, bundle, monkeypatch)
    shutil.rmtree(folders[which])
    with pytest.raises(ArtifactError):
        roll_out(service, new, monkeypatch)


def test_the_same_model_is_nothing_to_do(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = shutil.copytree(tiny_model, tmp_path / "copy")
    said, changes = roll_out(serves(tiny_model), elsewhere, monkeypatch)
    assert (said["is_new"], changes) == (False, [])


def test_a_service_that_does_not_say_what_it_runs_takes_the_model(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder may have been written over since: the same digest there proves nothing."""
    service = serves(tiny_model)
    entry = service.models[0].model_copy(update={"digest": None})
    said, changes = roll_out(service.model_copy(update={"models": (entry,)}), tiny_model, monkeypatch)
    assert (said["is_new"], len(changes)) == (True, 1)


class Clock:
    """Time that passes only while something sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Service:
    """Serve and its replicas as a rollout sees them: one look a second, and the last one for ever.

    Args:
        looks: Each a state, the replicas that there are, and whether those that answer are all new.
    """

    def __init__(self, *looks: tuple[str, int, bool], figures: Figures | None = None) -> None:
        self.looks, self.seen = list(looks), 0
        self.figures, self.clock = figures or Figures(0, 0, 0, None), Clock()

    def application(self) -> Any:
        state, count, _ = self._look()
        if state == "gone":
            return None
        replicas = SimpleNamespace(replica_states={"RUNNING": count} if count else {}, message="first\nNo room")
        return SimpleNamespace(status=SimpleNamespace(value=state), deployments={"models": replicas})

    def asked(self, generation: str, handle: Any, *, since_s: float) -> tuple[Figures, bool]:
        self.seen += 1
        return self.figures, self._look()[2]

    def _look(self) -> tuple[str, int, bool]:
        return self.looks[min(self.seen, len(self.looks)) - 1]


def watch(service: Service, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Figures:
    stand_in(service, monkeypatch)
    status = rollout.StatusLine("rollout", is_quiet=True)
    return rollout._watch("new", SLO, config(watch_s=2, timeout_s=10, **given), None, status)


def stand_in(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "time", service.clock)
    monkeypatch.setattr(rollout, "_figures", service.asked)
    monkeypatch.setattr(rollout, "_application", service.application)


def test_new_replicas_are_watched_from_when_they_serve_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(("DEPLOYING", 2, False), ("RUNNING", 2, False), ("RUNNING", 1, True))
    watch(service, monkeypatch)
    assert service.clock.now == 104.0  # 2 s until they were alone, and watch_s


@pytest.mark.parametrize("state", ["DEPLOYING", "RUNNING"])
def test_replicas_that_never_serve_alone_end_the_wait(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoscaled service is RUNNING all the while; seen as a command that did not end."""
    with pytest.raises(ClusterError, match=f"alone within 10 s; the service is {state.lower()}"):
        watch(Service((state, 2, False)), monkeypatch)
    service = Service((state, 2, False))
    stand_in(service, monkeypatch)
    with pytest.raises(ClusterError, match="alone within 10 s"):
        rollout._await("old", config(timeout_s=10), None, rollout.StatusLine("rollout", is_quiet=True))


@pytest.mark.parametrize(
    ("state", "error"), [("UNHEALTHY", KpiNotMet), ("DEPLOY_FAILED", ClusterError), ("gone", ClusterError)]
)
def test_a_replica_that_dies_while_it_is_watched_is_noticed(
    state: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures die with it: what is left to see is Serve's word, which was asked no more once they served alone."""
    with pytest.raises(error, match="No room" if state != "gone" else "no reason"):
        watch(Service(("RUNNING", 1, True), (state, 1, False), ("RUNNING", 1, True)), monkeypatch)


def test_an_old_model_that_is_ill_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way back Serve replaces its replicas; there is nothing else to go back to."""
    service = Service(("UNHEALTHY", 1, False), ("RUNNING", 1, True))
    stand_in(service, monkeypatch)
    rollout._await("old", config(), None, rollout.StatusLine("rollout", is_quiet=True))
    assert service.clock.now == 101.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_stopped_takes_the_model_back(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the new model serves, and nobody has judged it."""
    heard = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, heard)  # a shell's background job, or nohup, has them ignored
    try:
        deployed = put_in(lambda: os.kill(os.getpid(), number), KeyboardInterrupt, monkeypatch)
        assert deployed == ["new", "old"]
        assert signal.getsignal(number) is heard
    finally:
        signal.signal(number, before)


def test_what_nohup_keeps_from_a_command_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with rollout._ends_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_takes_the_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that cannot be written may come before the signal."""

    def gone() -> None:
        raise OSError(5, "Input/output error")

    assert put_in(gone, OSError, monkeypatch) == ["new", "old"]


def put_in(during: Callable[[], None], error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is deployed when something happens while the new replicas are watched."""
    service, deployed, status = Service(("RUNNING", 1, True)), [], rollout.StatusLine("rollout", is_quiet=True)
    stand_in(service, monkeypatch)
    monkeypatch.setattr(rollout, "_deploy", lambda what: deployed.append(what.name))
    monkeypatch.setattr(status, "show", lambda _: during())
    old, new = SimpleNamespace(name="old"), SimpleNamespace(name="new", slo=SLO)
    with pytest.raises(error):
        rollout._put_in(rollout.Change(old=old, new=new, parity={}), config(), None, status)  # type: ignore[arg-type]
    return deployed


def test_a_service_of_no_replicas_has_none_of_the_old_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled to zero it answers nobody's question, and is done."""
    service = Service(("RUNNING", 0, False))
    watch(service, monkeypatch)
    assert service.clock.now == 102.0
    rollout._await("old", config(), None, rollout.StatusLine("rollout", is_quiet=True))


def test_a_long_watch_is_no_long_start(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(("RUNNING", 1, True), ("RUNNING", 1, True), ("RUNNING", 1, False))
    stand_in(service, monkeypatch)
    status = rollout.StatusLine("rollout", is_quiet=True)
    rollout._watch("new", SLO, config(watch_s=30, timeout_s=10), None, status)
    assert service.clock.now == 130.0


def context(**given: Any) -> Any:
    """Serve's AutoscalingContext, as far as the policy looks at it."""
    values = {"queue_delay_s": [0.0], "utilization": [0.1], "latency_ms_p99": [-1.0], **given.pop("figures", {})}
    count = len(next(iter(values.values())))
    replicas = [f"r{number}" for number in range(count)]
    raw = {
        name: {
            replica: [SimpleNamespace(value=9e9), SimpleNamespace(value=value)]
            for replica, value in zip(replicas, row, strict=True)
        }
        for name, row in values.items()
    }
    raw = {name: {**row, "dead": [SimpleNamespace(value=9e9)]} for name, row in raw.items()}
    fixed = {
        "current_num_replicas": count,
        "target_num_replicas": count,
        "running_replicas": replicas,
        "total_num_requests": 1.0,
        "raw_metrics": raw,
    }
    return SimpleNamespace(**{**fixed, **given})


def policy(**given: Any) -> ScalePolicy:
    scale = AutoscaleConfig(**{"max_replicas": 4, "upscale_after_s": 0, "downscale_after_s": 0, **given})
    return ScalePolicy(scale.model_dump(mode="json"), SLO.model_dump(mode="json"))


def test_a_queue_brings_replicas_and_only_the_newest_of_the_living_counts() -> None:
    assert policy()(context())[0] == 1
    busy = {"queue_delay_s": [1.0], "utilization": [1.0], "latency_ms_p99": [500.0]}
    made = policy()
    assert max(made(context(figures=busy))[0] for _ in range(3)) >= 2


def test_what_is_on_its_way_is_waited_for() -> None:
    busy = {"queue_delay_s": [1.0], "utilization": [1.0], "latency_ms_p99": [500.0]}
    assert policy()(context(figures=busy, target_num_replicas=3))[0] == 3


@pytest.mark.parametrize(("running", "target"), [(3, 2), (0, 1)])
def test_what_goes_and_what_is_woken_is_waited_for(running: int, target: int) -> None:
    values = {name: [0.0] * running for name in ("queue_delay_s", "utilization", "latency_ms_p99")}
    asked = context(figures=values, current_num_replicas=running, target_num_replicas=target)
    assert policy()(asked)[0] == target


def test_replicas_that_never_come_do_not_keep_a_calm_service_from_shrinking(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full cluster a target of 4 with 2 that ran stood for ever; so it does in a crash loop."""
    clock = Clock()
    monkeypatch.setattr(scale_policy, "time", SimpleNamespace(time=clock.monotonic))
    made = policy(downscale_after_s=60)
    busy = {"queue_delay_s": [1.0] * 2, "utilization": [1.0] * 2, "latency_ms_p99": [500.0] * 2}
    fair = {"queue_delay_s": [0.0] * 2, "utilization": [0.6] * 2, "latency_ms_p99": [50.0] * 2}
    calm = {"queue_delay_s": [0.0] * 2, "utilization": [0.1] * 2, "latency_ms_p99": [50.0] * 2}

    def targets(figures: dict[str, list[float]], seconds: int, target: int) -> list[int]:
        found = []
        for _ in range(seconds):
            clock.sleep(1)
            target = made(context(figures=figures, target_num_replicas=target))[0]
            found.append(target)
        return found

    assert set(targets(busy, 300, 4)) == {4}  # they are needed, for as long as they may take; no more are asked for
    assert set(targets(fair, 60, 4)) == {4}
    assert targets(fair, 30, 4) == [2] * 30  # the two have done for a while: no others are waited for
    assert targets(calm, 100, 4)[-1] == 1
    assert set(targets(busy, 1, 4) + targets(fair, 60, 4)) == {4}  # a moment of load begins the wait anew


def test_a_replica_that_has_told_nothing_yet_does_no_harm() -> None:
    assert policy()(context(raw_metrics=None))[0] == 1
