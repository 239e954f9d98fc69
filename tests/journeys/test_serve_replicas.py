"""Replicas die, hang, come and go: a client with one retry does not notice, and the service heals by itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.journeys.conftest import wait_for
from tests.journeys.serving import Served, load, served, wait_for_replicas

PERIOD_S = 5.0

Folders = pytest.TempPathFactory


@pytest.fixture
def images(make_photo: Callable[..., bytes]) -> list[bytes]:
    return [make_photo(seed) for seed in range(8)]


@pytest.fixture(scope="module", params=["python", pytest.param("haproxy", marks=pytest.mark.full)])
def three(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: Folders) -> Iterator[Served]:
    """A service of three replicas: one answers while one is killed and one starts, which takes longer than PERIOD_S."""
    number = ["--set", "autoscale.min_replicas=3", "--set", "autoscale.max_replicas=3"]
    canary = ["--set", "canary.period_s=1", "--set", "canary.timeout_s=2", "--set", "limits.deadline_s=5"]
    fast = ["--fast"] if request.param == "haproxy" else []
    with served(tmp_path_factory.mktemp("three"), [f"tiny={tiny_model}"], *number, *canary, *fast) as running:
        yield running


def kill_in_turn(service: Served, seconds: float) -> int:
    """Kills a replica every PERIOD_S, the one that has lived longest."""
    kills, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        oldest = min(service.replicas(), key=lambda process: process.create_time())
        oldest.send_signal(signal.SIGKILL)
        kills += 1
        time.sleep(PERIOD_S)
    return kills


@pytest.mark.parametrize("seconds", [15.0, pytest.param(150.0, marks=pytest.mark.full)])
def test_replicas_are_killed_under_load(three: Served, images: list[bytes], seconds: float) -> None:
    wait_for_replicas(three, 3)
    with load(three, images) as asked:
        time.sleep(2)
        kills = kill_in_turn(three, seconds)
    print(f"\n{three.facts['proxy']}: {kills} kills, {asked.report()}")
    assert kills >= 2
    assert asked.raw[200] > 100
    assert asked.failed == 0, asked.report()


def test_a_hung_replica_is_replaced(three: Served, images: list[bytes]) -> None:
    from eagleray.flows.deployment import replaced_within_s
    from eagleray.flows.serve import ServeConfig, to_serving

    canary = {"period_s": 1.0, "timeout_s": 2.0}
    bound_s = replaced_within_s(to_serving(ServeConfig(model=("x=y",), auth="none", canary=canary)))
    before = {process.pid for process in wait_for_replicas(three, 3)}
    marker = three.home / "hung"
    try:
        three.go_wrong(hang_engine=str(marker))
        wait_for(lambda: marker.exists() and marker.read_text(), 30)
        ill, began = int(marker.read_text()), time.monotonic()
        assert ill in before
        wait_for(lambda: not psutil.pid_exists(ill) or psutil.Process(ill).status() == "zombie", bound_s + 60)
        took = time.monotonic() - began
    finally:
        (three.home / "faults.json").unlink()
    print(f"\n{three.facts['proxy']}: hung replica gone after {took:.1f} s; bound {bound_s:.1f} s")
    wait_for(lambda: len({p.pid for p in three.replicas()} - {ill}) == 3, 60)
    for image in images:
        assert three.predict(image).status == 200


def test_replicas_grow_with_the_queue_and_go_when_it_is_quiet(
    tiny_model: Path, tmp_path: Path, images: list[bytes]
) -> None:
    scale = {
        "max_replicas": 2,
        "upscale_after_s": 1,
        "downscale_after_s": 3,
        "target_utilization": 0.1,
        "queue_share": 0.02,
    }
    words = [word for key, value in scale.items() for word in ("--set", f"autoscale.{key}={value}")]
    with served(tmp_path / "elastic", [f"tiny={tiny_model}"], *words) as service:
        wait_for_replicas(service, 1)
        service.go_wrong(slow_bundle=str(tiny_model.resolve()), slow_engine_ms=40)
        with load(service, images, threads=12) as asked:
            began = time.monotonic()
            wait_for_replicas(service, 2, 60)
            grown = time.monotonic() - began
            time.sleep(2)
        began = time.monotonic()
        wait_for_replicas(service, 1, 90)
        print(f"\ngrew after {grown:.1f} s of load, shrank {time.monotonic() - began:.1f} s after it; {asked.report()}")
        assert asked.final[200] > 0
        assert set(asked.final) <= {200, 503}  # what does not fit is refused, nothing fails
        assert service.predict(images[0]).status == 200
