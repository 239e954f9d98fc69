"""One real local Ray cluster for the session, a tiny model, archives with a known truth, and the command to run."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from eagleray.core import commits

ROOT = Path(__file__).resolve().parent.parent.parent
LABELLED = 48
FAULTS_HOME = Path(__file__).resolve().parent / "faults"


@dataclass
class Ray:
    """The session's cluster.

    Attributes:
        address: For ``--address``.
        dashboard: For ``ray job submit``.
        env: Environment of every command that talks to it.
        faults: File that says what goes wrong; absent = nothing.
    process: Holds the cluster.
    """

    address: str
    dashboard: str
    env: dict[str, str]
    faults: Path
    process: subprocess.Popen[str]

    def add_node(self) -> None:
        """Adds a node in place of one that a journey took away."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("add\n")
        self.process.stdin.flush()
        while self.process.stdout.readline().strip() != "added":
            pass

    def go_wrong(self, **faults: Any) -> None:
        self.faults.write_text(json.dumps(faults))


def environment(home: Path) -> dict[str, str]:
    token = home / "ray_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(FAULTS_HOME), str(ROOT / "platform")]),
        "EAGLERAY_TEST_FAULTS": str(home / "faults.json"),
        "EAGLERAY_CACHE": str(home / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_health_check_period_ms": "2000",  # a node that stops is given up after some 15 s, not a minute
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "3",
    }


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    home = tmp_path_factory.mktemp("ray")
    env = environment(home)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "cluster_process.py")],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(home / "cluster.log").open("w"),
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    line = process.stdout.readline()
    while line and not line.startswith("{"):
        line = process.stdout.readline()
    assert line, (home / "cluster.log").read_text()[-3000:]
    yield Ray(**json.loads(line), env=env, faults=home / "faults.json", process=process)
    assert process.stdin
    process.stdin.close()
    try:
        process.wait(20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def ray(ray_cluster: Ray) -> Iterator[Ray]:
    """The cluster, with nothing going wrong before and after."""
    ray_cluster.faults.unlink(missing_ok=True)
    yield ray_cluster
    ray_cluster.faults.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory, make_photo: Callable[..., bytes]) -> Path:
    """2,400 little photos in four folders; 20 of them exact duplicates, one empty file, one that is text."""
    home = tmp_path_factory.mktemp("archive") / "photos"
    for number in range(2400):
        folder = home / f"site{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        seed = number if number >= 20 else 2399 - number
        (folder / f"{number:05d}.jpg").write_bytes(make_photo(seed, width=40, height=36))
    (home / "site0" / "empty.jpg").write_bytes(b"")
    (home / "site1" / "notes.jpg").write_text("these are not the pixels you are looking for")
    return home


@pytest.fixture(scope="session")
def corpus(ray_cluster: Ray, tmp_path_factory: pytest.TempPathFactory, make_photo: Callable[..., bytes]) -> Path:
    """48 little photos of three classes, ingested."""
    home = tmp_path_factory.mktemp("pictures")
    for number in range(LABELLED):
        folder = home / "photos" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(make_photo(number, width=40, height=36))
    done = run(ray_cluster.env, "ingest", str(home / "photos"), "--out", str(home / "corpus"))
    assert done.returncode == 0, done.stderr
    return home / "corpus"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "eagleray.cli.main", *words]


def start(env: dict[str, str], *words: str, log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*words), env=env, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True
    )


def run(env: dict[str, str], *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), env=env, capture_output=True, text=True, timeout=timeout_s, check=False)


def wait_for(condition: Callable[[], Any], timeout_s: float = 90.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.05)
    return found


def committed(out: Path) -> int:
    return len(list(out.glob("_ledger/*/parts/*.json")))


def scores(out: Path) -> pa.Table:
    return commits.open_scores(out).to_table().sort_by("uri")


def assert_accounted(out: Path, expected: pa.Table) -> dict[str, int]:
    """The one oracle: images in = scored + quarantined, none lost, none doubled, each as in the undisturbed run."""
    manifest = commits.read_manifest(out)
    table = scores(out)
    uris = table["uri"].to_pylist()
    counts = {
        "images_in": manifest["images_in"],
        "scored": manifest["scored"],
        "quarantined": manifest["quarantined"],
        "lost": len(set(expected["uri"].to_pylist()) - set(uris)),
        "doubled": len(uris) - len(set(uris)),
    }
    print(f"\n{out.name}: {counts}")
    assert counts["lost"] == counts["doubled"] == 0
    assert manifest["images_in"] == manifest["scored"] + manifest["quarantined"] == len(uris) == expected.num_rows
    for column in ("id", "status", "reason", "label", "decision"):
        assert table[column].to_pylist() == expected[column].to_pylist(), column
    far = [
        abs(a - b)
        for a, b in zip(table["score"].to_pylist(), expected["score"].to_pylist(), strict=True)
        if a is not None
    ]
    assert max(far) <= 1e-5
    return counts
