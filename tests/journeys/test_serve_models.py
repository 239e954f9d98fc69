"""Several models in one service, more than a replica holds; and the ways in: a key file, TLS."""

from __future__ import annotations

import re
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from eagleray.flows.serve_haproxy import free_ports
from eagleray.serving.access import KeyRequest, create_key
from eagleray.serving.telemetry import EVICTIONS
from eagleray.vision.bundle import load_bundle

from tests.journeys.conftest import wait_for
from tests.journeys.serving import JPEG, Served, served, wait_for_replicas
from tests.tiny_model import make_bundle

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {name: make_bundle(home / name, seed=seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def service(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three models, two fit; two replicas; keys of a file: one tenant opens all, one opens b alone."""
    home = tmp_path_factory.mktemp("several")
    keys = home / "keys.json"
    _, everything = create_key(keys, KeyRequest(tenant="all"))
    _, narrow = create_key(keys, KeyRequest(tenant="narrow", models=("b",)))
    words = {"memory.max_loaded_models": 2, "autoscale.min_replicas": 2, "autoscale.max_replicas": 2}
    (port,) = free_ports(1)
    settings = [word for key, value in words.items() for word in ("--set", f"{key}={value}")]
    models = [f"{name}={path}" for name, path in bundles.items()]
    more = ["--keys", str(keys), "--set", f"metrics_port={port}", "--request-log", str(home / "requests")]
    with served(home, models, *settings, *more) as running:
        running.headers["X-API-Key"] = everything
        running.facts |= {"metrics": port, "narrow": narrow}
        wait_for_replicas(running, 2)
        yield running


def evictions(service: Served) -> float:
    text = urllib.request.urlopen(f"http://127.0.0.1:{service.facts['metrics']}/metrics", timeout=10).read().decode()
    found = re.findall(rf"^{EVICTIONS.exported[0]}{{.*}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def test_each_model_answers_by_its_name(
    service: Served, bundles: dict[str, Path], make_photo: Callable[..., bytes]
) -> None:
    image = make_photo(4)
    for name, path in bundles.items():
        said = service.predict(image, f"?model={name}")
        assert said.status == 200, said.body
        assert said.json["model"]["digest"] == load_bundle(path).model_digest
    assert service.predict(image).json["model"]["name"] == "a"  # the first is the default
    assert service.predict(image, "?model=nobody").status == 404


def test_a_key_opens_its_models_only(service: Served, make_photo: Callable[..., bytes]) -> None:
    narrow = {**JPEG, "X-API-Key": service.facts["narrow"]}
    statuses = {name: service.ask(f"/v1/predict?model={name}", make_photo(5), narrow).status for name in NAMES}
    assert statuses["b"] == 200
    assert {statuses["a"], statuses["c"]} <= {403, 404}


def test_a_request_goes_where_its_model_is(service: Served, make_photo: Callable[..., bytes]) -> None:
    """Two replicas, each with room for the default and one more: b and c in turn must not be loaded in turn."""
    image = make_photo(6)
    for name in ("b", "c") * 4:
        assert service.predict(image, f"?model={name}").status == 200
    time.sleep(3)  # Serve's routers have heard who holds what
    before = evictions(service)
    for name in ("b", "c") * 15:
        assert service.predict(image, f"?model={name}").status == 200
    time.sleep(3)  # the metrics have been told
    made = evictions(service) - before
    print(f"\n{made:.0f} evictions in 30 requests for two models in turn")
    assert made <= 6


def test_the_request_log_outlives_the_request_and_says_nothing_of_it(
    service: Served, make_photo: Callable[..., bytes]
) -> None:
    asked = service.predict(make_photo(7))
    folder = service.home / "requests"

    def line() -> str:
        texts = [path.read_text() for path in folder.glob("*.jsonl*")]
        return "".join(row for text in texts for row in text.splitlines() if asked.json["request_id"] in row)

    wait_for(line, 20)
    assert '"tenant": "all"' in line() or '"tenant":"all"' in line()
    assert service.headers["X-API-Key"] not in "".join(path.read_text() for path in folder.iterdir())


@pytest.mark.parametrize("fast", [[], pytest.param(["--fast"], marks=pytest.mark.full)], ids=["python", "haproxy"])
def test_tls(tiny_model: Path, tmp_path: Path, fast: list[str], make_photo: Callable[..., bytes]) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-keyout",
            key,
            "-out",
            cert,
            *names,
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    words = ["--tls-cert", str(cert), "--tls-key", str(key), *fast]
    with served(tmp_path / "serve", [str(tiny_model)], *words) as service:
        assert service.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        request = urllib.request.Request(f"{service.url}/v1/predict", make_photo(1), {**service.headers, **JPEG})
        with urllib.request.urlopen(request, timeout=20, context=context) as answer:
            assert answer.status == 200
        with pytest.raises(OSError):  # plain HTTP is not spoken there
            urllib.request.urlopen(service.url.replace("https", "http"), timeout=10).read()
