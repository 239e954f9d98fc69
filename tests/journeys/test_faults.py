"""What may go wrong does, on a real Ray of several nodes: nothing is lost, nothing doubled, every answer the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from eagleray.core import commits

from tests.journeys.conftest import Ray, assert_accounted, committed, run, scores, start, wait_for

SCORE_WORKER = "RayWorker"


def words(archive: Path, model: Path, out: Path, ray: Ray, *more: str) -> list[str]:
    fixed = ["--runtime", "onnx", "--address", ray.address, "--set", "has_report=false", "--set", "in_process_below=0"]
    return ["score", str(archive), "--model", str(model), "--out", str(out), *fixed, *more]


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: Ray, archive: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run(ray_cluster.env, *words(archive, tiny_model, out, ray_cluster))
    assert done.returncode == 0, done.stderr
    return scores(out)


def scoring_actors() -> list[psutil.Process]:
    """The cluster's scoring workers: Ray names an actor's process after its class."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith("ray::") and SCORE_WORKER in line:
            found.append(process)
    return found


def kill_every(seconds: float, driver: subprocess.Popen[bytes]) -> int:
    """Kills a scoring worker every few seconds until the driver ends."""
    kills, at = 0, time.monotonic() + seconds
    while driver.poll() is None:
        if time.monotonic() >= at:
            actors = scoring_actors()
            if actors:
                actors[kills % len(actors)].send_signal(signal.SIGKILL)
                kills += 1
            at = time.monotonic() + seconds
        time.sleep(0.1)
    return kills


@pytest.mark.parametrize(
    "at_least", [1, pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(5400)])]
)  # fmt: skip
def test_killing_a_scoring_worker_every_five_seconds(
    ray: Ray, archive: Path, tiny_model: Path, undisturbed: pa.Table, tmp_path: Path, at_least: int
) -> None:
    """In the long form run after run: at a run's end the one worker left dies every 5 s, and a unit must be shorter."""
    ray.go_wrong(slow_ms=20)
    kills = runs = 0
    while kills < at_least:
        out, log = tmp_path / f"killed-{runs}", tmp_path / f"log-{runs}"
        driver = start(ray.env, *words(archive, tiny_model, out, ray), log=log)
        seen = kill_every(5.0, driver)
        assert driver.returncode == 0, log.read_text()[-2000:]
        assert seen >= 1
        assert_accounted(out, undisturbed)
        kills, runs = kills + seen, runs + 1
    print(f"kills: {kills} in {runs} runs")


def test_killing_the_driver_three_times(
    ray: Ray, archive: Path, tiny_model: Path, undisturbed: pa.Table, tmp_path: Path
) -> None:
    ray.go_wrong(slow_ms=8)
    out, redone = tmp_path / "driver", []
    for number in range(3):
        before = committed(out)
        driver = start(ray.env, *words(archive, tiny_model, out, ray), log=tmp_path / f"log{number}")
        wait_for(lambda: committed(out) >= before + 3 or driver.poll() is not None)  # noqa: B023
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        wait_for(lambda: not scoring_actors())
    kept = committed(out)
    done = run(ray.env, *words(archive, tiny_model, out, ray))
    assert done.returncode == 0, done.stderr
    counts = commits.Ledger(out, _key(out)).attempts()
    redone = [unit for unit, attempts in counts.items() if attempts > 1]
    print(f"units kept over the kills: {kept}, done again: {len(redone)}")
    assert 9 <= kept < len(counts)
    assert sum(counts.values()) - len(counts) <= 3 * 4 * 2  # kills x workers x (at work + in flight)
    assert_accounted(out, undisturbed)


def _key(out: Path) -> str:
    (home,) = (path for path in (out / commits.LEDGER).iterdir() if path.is_dir())
    return home.name


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """The pid of the worker that stopped itself before its commit; it is always let go in the end."""
    marker = tmp_path / "zombie"

    def pid() -> int:
        return int(marker.read_text().split()[0]) if marker.exists() and marker.read_text() else 0

    yield pid
    if pid() and psutil.pid_exists(pid()):
        os.kill(pid(), signal.SIGCONT)


def test_a_zombie_that_writes_late_adds_nothing(
    ray: Ray, archive: Path, tiny_model: Path, undisturbed: pa.Table, tmp_path: Path, stopped: Callable[[], int]
) -> None:
    """A child of a small run stops between writing and committing, its driver dies, another commits, it wakes up."""
    marker, out = tmp_path / "zombie", tmp_path / "zombied"
    ray.go_wrong(stop_before_commit=str(marker))
    line = ["score", str(archive), "--model", str(tiny_model), "--out", str(out), "--runtime", "onnx"]
    line += ["--set", "has_report=false", "--set", "in_process_below=100000"]
    driver = start(ray.env, *line, log=tmp_path / "log")
    zombie = wait_for(stopped)
    _, unit, part = marker.read_text().split()
    wait_for(lambda: committed(out) >= 3)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert psutil.Process(zombie).status() == psutil.STATUS_STOPPED
    assert (out / part).exists()  # written aside, not committed: the worst moment
    ray.go_wrong()
    done = run(ray.env, *line)
    assert done.returncode == 0, done.stderr
    winner = commits.Ledger(out, _key(out)).committed()[unit]["path"]
    assert winner != part
    os.kill(zombie, signal.SIGCONT)  # it wakes up, goes on to commit, and loses
    wait_for(lambda: not psutil.pid_exists(zombie))
    assert commits.Ledger(out, _key(out)).committed()[unit]["path"] == winner
    assert_accounted(out, undisturbed)
    again = run(ray.env, *line)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert {path.name for path in (out / "scores").iterdir()} == {
        Path(listed["path"]).name for listed in commits.read_manifest(out)["parts"]
    }


def test_a_node_that_stops_and_comes_back(
    ray: Ray, archive: Path, tiny_model: Path, undisturbed: pa.Table, tmp_path: Path, stopped: Callable[[], int]
) -> None:
    """A worker stops before its commit, its node with it; Ray gives the unit out again; both wake up after the end."""
    marker, out = tmp_path / "zombie", tmp_path / "node"
    ray.go_wrong(stop_before_commit=str(marker), slow_ms=2)
    driver = start(ray.env, *words(archive, tiny_model, out, ray), log=tmp_path / "log")
    worker = psutil.Process(wait_for(stopped))
    raylet = worker.parent()
    assert raylet is not None
    _, unit, part = marker.read_text().split()
    raylet.suspend()
    try:
        driver.wait(240)
    finally:
        text = (tmp_path / "log").read_text()
        raylet.resume()
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()
        ray.add_node()
    assert driver.returncode == 0, text[-2000:]
    time.sleep(4)  # the time a worker has to write before it learns that its node is dead
    assert commits.Ledger(out, _key(out)).committed()[unit]["path"] != part
    assert_accounted(out, undisturbed)


@pytest.mark.parametrize("nth", [1, 6, 21, 40])
def test_no_space_at_the_nth_write(
    ray: Ray, archive: Path, tiny_model: Path, undisturbed: pa.Table, tmp_path: Path, nth: int
) -> None:
    counts = tmp_path / "counts"
    counts.mkdir()
    ray.go_wrong(no_space_at=nth, no_space_counts=str(counts))
    out = tmp_path / "full"
    failed = run(ray.env, *words(archive, tiny_model, out, ray))
    assert failed.returncode == 9, failed.stderr
    assert "No space left" in failed.stderr
    assert "do: free some space" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (out / commits.MANIFEST).exists()
    ray.go_wrong()
    done = run(ray.env, *words(archive, tiny_model, out, ray))
    assert done.returncode == 0, done.stderr
    assert_accounted(out, undisturbed)


def test_one_percent_of_poison_costs_itself_only(
    ray: Ray, archive: Path, tiny_model: Path, undisturbed: pa.Table, tmp_path: Path
) -> None:
    poisoned = tmp_path / "poisoned"
    poison = {}
    for path in sorted(archive.rglob("*.jpg")):
        target = poisoned / path.relative_to(archive)
        target.parent.mkdir(parents=True, exist_ok=True)
        data, number = path.read_bytes(), int(path.stem) if path.stem.isdigit() else -1
        if number >= 100 and number % 100 == 0:
            kind = ("POISON-ABORT", "POISON-ABORT", "POISON-MEMORY", "POISON-HANG")[number // 100 % 4]
            data = data[:2] + b"\xff\xfe\x00\x20" + kind.encode().ljust(30) + data[2:]  # a JPEG comment
            poison[f"file://{target}"] = kind
        target.write_bytes(data)
    out = tmp_path / "out"
    limits = ["--set", "hang_timeout_s=3", "--set", "memory_mib=512"]
    done = run(ray.env, *words(poisoned, tiny_model, out, ray, *limits), timeout_s=600)
    assert done.returncode == 0, done.stderr
    table = scores(out)
    rows = {row["uri"]: row for row in table.to_pylist()}
    found = {uri for uri, row in rows.items() if row["reason"] == "poison"}
    manifest = commits.read_manifest(out)
    print(
        f"poison: {len(poison)}, quarantined as poison: {len(found)}, totals {manifest['images_in']} = "
        f"{manifest['scored']} + {manifest['quarantined']}"
    )
    assert found == set(poison)
    assert max(commits.Ledger(out, _key(out)).attempts().values()) <= 4
    assert manifest["images_in"] == manifest["scored"] + manifest["quarantined"] == undisturbed.num_rows
    before = {row["uri"].removeprefix(f"file://{archive}"): row for row in undisturbed.to_pylist()}
    for uri, row in rows.items():
        if uri not in poison:
            assert row["label"] == before[uri.removeprefix(f"file://{poisoned}")]["label"]
