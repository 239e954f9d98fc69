"""Another model is put in under load: no request fails, no answer mixes two, and what is worse is taken back."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from eagleray.vision.bundle import load_bundle

from tests.journeys.conftest import run, wait_for
from tests.journeys.serving import Load, Served, load, served
from tests.tiny_model import make_bundle

WATCH = ("--watch-s", "3")

Folders = pytest.TempPathFactory


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: Folders) -> Path:
    """Other weights, the same labels."""
    return make_bundle(tmp_path_factory.mktemp("other") / "other", seed=8)


@pytest.fixture(scope="module", params=["python", pytest.param("haproxy", marks=pytest.mark.full)])
def service(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: Folders) -> Iterator[Served]:
    fast = ["--fast"] if request.param == "haproxy" else []
    slo = ["--set", "slo.latency_p99_ms=1000", "--set", "limits.max_queue_s=5"]
    with served(tmp_path_factory.mktemp("rollout"), [f"tiny={tiny_model}"], *slo, *fast) as running:
        yield running


@pytest.fixture
def images(make_photo: Callable[..., bytes]) -> list[bytes]:
    return [make_photo(seed) for seed in range(8)]


def rollout(service: Served, model: str, *words: str):
    return run(service.env, "rollout", model, "--port", str(service.port), "--json", *WATCH, *words)


def version(bundle: Path) -> str:
    return load_bundle(bundle).model_digest[:12]


def changes(asked: Load) -> list[str]:
    """The versions in the order in which they answered, each once in a row."""
    seen: list[str] = []
    for _, name in asked.versions:
        if seen[-1:] != [name]:
            seen.append(name)
    return seen


def test_a_rollout_under_load(service: Served, tiny_model: Path, other_model: Path, images: list[bytes]) -> None:
    assert service.predict(images[0]).json["model"]["version"] == version(tiny_model)
    with load(service, images, threads=2) as asked:
        time.sleep(1)
        done = rollout(service, f"tiny={other_model}")
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    print(f"\n{service.facts['proxy']}: {asked.report()}, {said}")
    assert (said["is_new"], said["watched"]["failures"]) == (True, 0)
    assert asked.raw[200] == sum(asked.raw.values()), asked.report()  # not one, not even at the first try
    assert {name for _, name in asked.versions} == {version(tiny_model), version(other_model)}
    assert service.predict(images[0]).json["model"]["version"] == version(other_model)
    again = rollout(service, f"tiny={other_model}")
    assert (again.returncode, json.loads(again.stdout)["is_new"]) == (0, False)


def test_a_slow_model_is_taken_back(service: Served, tiny_model: Path, other_model: Path, images: list[bytes]) -> None:
    before = service.predict(images[0]).json["model"]["version"]
    new = tiny_model if before == version(other_model) else other_model
    service.go_wrong(slow_bundle=str(new.resolve()), slow_engine_ms=600)
    try:
        with load(service, images, threads=2) as asked:
            done = rollout(service, f"tiny={new}", "--set", "min_requests=3", "--set", "max_p99_ms=300")
    finally:
        (service.home / "faults.json").unlink()
    print(f"\n{service.facts['proxy']}: {asked.report()}, {done.stdout}")
    assert done.returncode == 6, done.stdout + done.stderr
    assert "the old model serves again" in done.stderr
    assert asked.failed == 0, asked.report()
    assert service.predict(images[0]).json["model"]["version"] == before


@pytest.mark.full
def test_a_model_that_hangs_once_it_serves_is_taken_back(
    service: Served, tiny_model: Path, other_model: Path, images: list[bytes]
) -> None:
    """It starts, passes its probe set and answers; then its engine stands still, and the old model must come back."""
    before = service.predict(images[0]).json["model"]["version"]
    new = tiny_model if before == version(other_model) else other_model
    try:
        with load(service, images, threads=2) as asked, ThreadPoolExecutor(1) as pool:
            rolled = pool.submit(rollout, service, f"tiny={new}", "--watch-s", "60")
            wait_for(lambda: asked.versions and asked.versions[-1][1] == version(new), 90)
            service.go_wrong(slow_bundle=str(new.resolve()), slow_engine_ms=30_000)
            done = rolled.result(150)
    finally:
        (service.home / "faults.json").unlink(missing_ok=True)
    print(f"\n{service.facts['proxy']}: {asked.report()}, {done.stdout}")
    assert done.returncode in (6, 10), done.stdout + done.stderr
    assert "the old model serves again" in done.stderr
    assert service.predict(images[0]).json["model"]["version"] == before


def test_a_bundle_that_fails_its_probe_set_changes_nothing(
    service: Served, tiny_model: Path, images: list[bytes], tmp_path: Path
) -> None:
    """Another model's probe set: each file holds, and the answers are another's."""
    from eagleray.infer.probes import make_probes
    from eagleray.vision.bundle import ONNX, save_bundle

    stranger, own = (
        load_bundle(make_bundle(tmp_path / "stranger", seed=5)),
        load_bundle(make_bundle(tmp_path / "own", 6)),
    )
    wrong = save_bundle(
        tmp_path / "wrong",
        dataclasses.replace(own, files={}),
        {ONNX: own.path / ONNX},
        probes=make_probes(stranger),
    )
    before = service.predict(images[0]).json["model"]
    done = rollout(service, f"tiny={wrong.path}")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "fails its probe set" in done.stderr
    assert service.predict(images[0]).json["model"] == before


def test_what_the_service_does_not_know_is_said(service: Served, tiny_model: Path, tmp_path: Path) -> None:
    unknown = rollout(service, f"nobody={tiny_model}")
    assert unknown.returncode == 2
    assert "one of tiny" in unknown.stderr
    nowhere = run(service.env, "rollout", f"tiny={tiny_model}", "--port", "1")
    assert nowhere.returncode == 2
    assert "no `eagleray serve` on port 1" in nowhere.stderr
