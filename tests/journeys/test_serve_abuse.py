"""Real Serve, by its own proxy and by HAProxy, put to what people do to services (tests/serving_abuse.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.journeys.conftest import run, wait_for
from tests.journeys.serving import Served, served
from tests.serving_abuse import (
    MIB,
    Target,
    hostile_files,
    put_to_a_gigabyte,
    put_to_hostile_images,
    put_to_probes,
    put_to_slow_clients,
)
from tests.serving_server import make_key
from tests.tiny_model import make_bundle

CAP = 16 * MIB
PROBES = 500
PROXY = "ProxyActor"  # in the title that Ray gives the process
RATES = {"images_per_s": 1e6, "burst": 1_000_000}


@dataclass(frozen=True)
class Tried:
    """A service with two models, and keys of everything, of "mine" and of "theirs"."""

    service: Served
    keys_file: Path
    every: Target
    mine: Target
    theirs_key: str
    proxy: str


@pytest.fixture(scope="module", params=["python", "haproxy"])
def tried(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tried]:
    home = tmp_path_factory.mktemp("abuse")
    keys_file = home / "keys.json"
    every, mine, theirs = (
        make_key(keys_file, tenant=name, models=models, **RATES)
        for name, models in [("acme", ("*",)), ("mine", ("mine",)), ("theirs", ("theirs",))]
    )
    other = make_bundle(home / "theirs", seed=8)
    limits = ["head_timeout_s=2", "body_timeout_s=2", f"max_body_bytes={CAP}", "max_queue_s=10"]
    words = [word for limit in limits for word in ("--set", f"limits.{limit}")]
    fast = ["--fast"] if request.param == "haproxy" else []
    models = [f"mine={tiny_model}", f"theirs={other}"]
    with served(home / "serve", models, "--keys", str(keys_file), *words, *fast) as service:
        targets = [Target(service.host, service.port, key) for key in (every, mine)]
        yield Tried(service, keys_file, *targets, theirs, request.param)


def measured(tried: Tried, measure: Callable[[psutil.Process], float]) -> dict[int, float]:
    """Of everything that a body passes: proxy, HAProxy, replicas."""
    found = {}
    for process in tried.service.processes():
        try:
            title = " ".join(process.cmdline()) + process.name()
            if any(word in title for word in (PROXY, "haproxy", "ServeReplica")):
                found[process.pid] = measure(process) / MIB
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def grown_mib(tried: Tried, before: dict[int, float], measure: Callable[[psutil.Process], float]) -> float:
    """The most that one of them has grown by."""
    return max(now - before[pid] for pid, now in measured(tried, measure).items() if pid in before)


def memory(process: psutil.Process) -> float:
    return float(process.memory_info().rss)


def bytes_read(process: psutil.Process) -> float:
    """What the process took by read(2): uvloop reads sockets so, HAProxy does not (it uses recv)."""
    return float(process.io_counters().read_chars)


def test_hostile_images_are_told_what_they_are_and_move_nothing(
    tried: Tried, shared_data: Path, make_photo: Callable[..., bytes]
) -> None:
    before = {process.pid for process in tried.service.replicas()}
    seen = put_to_hostile_images(tried.every, hostile_files(shared_data), make_photo(1))
    assert sum(seen.values()) == 110
    assert set(seen) == {200, 400, 422}
    assert {process.pid for process in tried.service.replicas()} == before


def test_no_probe_reaches_another_tenants_model(tried: Tried, make_photo: Callable[..., bytes]) -> None:
    theirs = Target(tried.every.host, tried.every.port, tried.theirs_key)
    status, body = theirs.ask("POST /v1/predict?model=theirs HTTP/1.1", body=make_photo(2))
    assert status == 200, body
    model = json.loads(body)["model"]
    seen = put_to_probes(
        tried.mine,
        theirs="theirs",
        theirs_key=tried.theirs_key,
        secrets=(model["version"].encode(), model["digest"].encode()),
        image=make_photo(2),
        number=PROBES,
        seed=6,
    )
    assert sum(seen.values()) == PROBES
    assert {401, 403, 404} <= set(seen)
    assert 500 not in seen


def test_slow_clients_are_given_up_while_others_are_answered(tried: Tried, make_photo: Callable[..., bytes]) -> None:
    image = make_photo(3)
    seen, asked = put_to_slow_clients(
        tried.every, heads=50, bodies=50, is_well=lambda: tried.every.predict(image)[0] == 200, limit_s=90
    )
    assert set(seen) <= {0, 400, 408}, seen
    assert seen[408] >= 80, seen
    assert asked >= 2


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_gigabyte_is_cut_before_serve_holds_it(
    tried: Tried, is_chunked: bool, make_photo: Callable[..., bytes]
) -> None:
    # The measure holds: what Serve is to take is seen
    read = measured(tried, bytes_read)
    assert tried.every.predict(b"x" * (8 * MIB))[0] == 422
    assert grown_mib(tried, read, bytes_read) >= 8

    read, held = measured(tried, bytes_read), measured(tried, memory)
    status, sent = put_to_a_gigabyte(tried.every, is_chunked=is_chunked)
    assert status == 413
    # beyond the limit: what the kernel holds between processes, twice in fast mode (net.ipv4.tcp_rmem, tcp_wmem)
    assert sent <= (16 if is_chunked else 0) * MIB + 80 * MIB
    assert grown_mib(tried, read, bytes_read) <= (CAP / MIB if is_chunked else 0) + 0.5
    assert grown_mib(tried, held, memory) < 96
    assert tried.every.predict(make_photo(4))[0] == 200


def test_without_a_key_a_gigabyte_is_not_read_at_all(tried: Tried) -> None:
    status, sent = put_to_a_gigabyte(tried.every, is_chunked=True, key="")
    assert status == 401
    assert sent <= 80 * MIB


def test_a_client_cannot_switch_the_timeout_off_or_pick_a_replica(
    tried: Tried, make_photo: Callable[..., bytes]
) -> None:
    for header in ("X-Request-Timeout-Seconds: 0.000001", "X-Request-Disconnect-Disabled: ?1", "X-Session-Id: x"):
        assert tried.every.ask("POST /v1/predict HTTP/1.1", header, body=make_photo(5))[0] == 200


def test_what_serve_says_itself_is_told_in_our_form(tried: Tried) -> None:
    for line, status in [("GET /-/routes HTTP/1.1", 404), ("GET /nowhere HTTP/1.1", 404)]:
        found, body = tried.every.ask(line)
        if tried.proxy == "haproxy" and "routes" in line:
            continue  # HAProxy answers this one itself, with the application's name; docs/serving.md says so
        assert found == status
        assert json.loads(body)["code"] == "unknown_path"


def test_a_revoked_key_ends_while_the_service_runs(tried: Tried, make_photo: Callable[..., bytes]) -> None:
    key = make_key(tried.keys_file, tenant="leaving", **RATES)
    leaving = Target(tried.every.host, tried.every.port, key)
    image = make_photo(6)
    wait_for(lambda: leaving.predict(image)[0] == 200, 20)
    done = run(tried.service.env, "apikeys", "revoke", key.split("_")[1], "--keys", str(tried.keys_file))
    assert done.returncode == 0, done.stderr
    wait_for(lambda: leaving.predict(image)[0] == 401, 20)
    assert tried.every.predict(image)[0] == 200


def test_a_tenant_over_its_rate_waits_and_others_do_not(tried: Tried, make_photo: Callable[..., bytes]) -> None:
    key = make_key(tried.keys_file, tenant="slow", images_per_s=0.01, burst=3)
    slow, image = Target(tried.every.host, tried.every.port, key), make_photo(7)
    wait_for(lambda: slow.predict(image)[0] in (200, 429), 20)
    seen = [slow.predict(image)[0] for _ in range(6)]
    assert seen.count(200) <= 2
    assert seen[-1] == 429
    assert tried.every.predict(image)[0] == 200


def test_the_request_log_and_ray_s_logs_hold_no_key_and_no_image(tried: Tried) -> None:
    secrets = [key.rsplit("_", 1)[1].encode() for key in (tried.every.key, tried.mine.key, tried.theirs_key)]
    folders = {Path(process.environ()["EAGLERAY_SERVING_SETTINGS"]).parent for process in tried.service.replicas()}
    assert folders
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    lines = [path for path in files if path.name.startswith("requests-")]
    assert lines
    said = [json.loads(line) for path in lines for line in path.read_text().splitlines()]
    assert {"acme", "none"} <= {line.get("tenant") for line in said}
    assert any(image.get("hash") for line in said for image in line.get("images", ()))
    for path in files:
        if path.stat().st_size < 64 * MIB and not path.is_socket():
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
