"""A service starts with one command, is reached from this machine alone, asks for a key, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from eagleray.flows.listeners import listeners, unexpected

from tests.journeys.conftest import ROOT, command, run, wait_for
from tests.journeys.serving import Served, served

Folders = pytest.TempPathFactory


@pytest.fixture(scope="module", params=["python", "haproxy"])
def service(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: Folders) -> Iterator[Served]:
    fast = ["--fast"] if request.param == "haproxy" else []
    with served(tmp_path_factory.mktemp("serve"), [f"tiny={tiny_model}"], *fast) as running:
        yield running


def test_it_answers_what_the_classifier_says(
    service: Served, tiny_model: Path, make_photo: Callable[..., bytes]
) -> None:
    from eagleray.infer.classifier import Classifier

    image = make_photo(3)
    said = service.predict(image)
    assert said.status == 200, said.body
    expected = Classifier(tiny_model, "onnx").predict([image])[0]
    assert said.json["label"] == expected.label
    assert abs(said.json["score"] - (expected.score or 0)) <= 1e-6
    assert said.json["model"]["digest"] == expected.model_digest
    assert service.facts["version"] == said.json["model"]["version"]
    assert said.headers["x-request-id"] == said.json["request_id"]


def test_without_a_key_nothing_is_said(service: Served, make_photo: Callable[..., bytes]) -> None:
    assert service.headers, "keys are on where nothing else was asked"
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer er_000000000000_" + "0" * 64}):
        refused = service.ask("/v1/predict", make_photo(1), {"Content-Type": "image/jpeg", **headers})
        assert refused.status == 401
        assert refused.headers["content-type"] == "application/problem+json"
    assert service.ask("/v1/models", headers={"Authorization": ""}).status == 401
    assert service.ask("/-/routes", headers={"Authorization": ""}).status in (401, 404)


def test_the_stock_tritonclient_infers_and_the_page_is_there(
    service: Served, tiny_model: Path, make_photo: Callable[..., bytes]
) -> None:
    import numpy as np
    from eagleray.infer.classifier import Classifier
    from tritonclient import http

    images = [make_photo(seed) for seed in range(3)]
    client = http.InferenceServerClient(f"{service.host}:{service.port}")
    try:
        assert client.is_server_ready()
        assert client.is_model_ready("tiny", headers=service.headers)
        sent = http.InferInput("image", [3], "BYTES")
        sent.set_data_from_numpy(np.array(images, object))
        result = client.infer("tiny", [sent], headers=dict(service.headers))
    finally:
        client.close()
    expected = Classifier(tiny_model, "onnx").predict(images)
    assert [str(label, "utf-8") for label in result.as_numpy("label")] == [one.label for one in expected]
    np.testing.assert_allclose(result.as_numpy("score"), [one.score for one in expected], atol=1e-6)
    page = service.ask("/", headers={"Authorization": ""})
    assert page.status == 200
    assert "sha256-" in page.headers["content-security-policy"]
    assert service.ask("/openapi.json", headers={"Authorization": ""}).json["info"]["title"] == "Eagleray"


def test_only_this_machine_reaches_it(service: Served) -> None:
    found = listeners(service.process.pid)
    assert service.port in {listener.port for listener in found}
    assert unexpected(found) == []


def test_its_files_are_private(service: Served) -> None:
    folder = Path(service.facts["key_file"]).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(service.facts["key_file"]).stat().st_mode) == 0o600
    for path in folder.rglob("admin.sock"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    secret = service.headers["Authorization"].split()[1]
    assert secret not in service.log()
    for process in service.processes():
        try:
            words, variables = " ".join(process.cmdline()), " ".join(process.environ().values())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        assert secret not in words + variables


def test_the_same_port_twice_is_said(service: Served, tiny_model: Path) -> None:
    again = run(service.env, "serve", "--model", str(tiny_model), "--port", str(service.port))
    assert again.returncode == 2
    assert f"eagleray serve already answers at {service.url}" in again.stderr
    assert "Traceback" not in again.stderr


def test_ctrl_c_ends_all_of_it(tiny_model: Path, tmp_path: Path) -> None:
    with served(tmp_path / "serve", [str(tiny_model)], "--auth", "none") as service:
        assert service.headers == {}
        assert service.ask("/v1/models").status == 200
        children = service.processes()
        before = set(Path("/tmp").glob("er-*"))
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 0
        wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 20)
        assert not list((service.home / "cache" / "serving").glob("*.json"))
        assert len(set(Path("/tmp").glob("er-*"))) < len(before)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--auth", "none", "--fast"], 2, "needs keys"),
        (["--auth", "none", "--host", "0.0.0.0"], 2, "127.0.0.1 only"),
        (["--keys", "absent.json"], 2, "no key file"),
        (["--tls-cert", "absent.pem"], 2, "go together"),
        (["--model", "nowhere"], 4, "no model bundle"),
        (["--set", "limits.max_ongoing_requests=3"], 2, "cannot fill batches"),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_starts(
    words: list[str], code: int, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        command("serve", "--model", f"tiny={tiny_model}", "--port", "0", *words),
        env={**os.environ, "EAGLERAY_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT / "platform")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
