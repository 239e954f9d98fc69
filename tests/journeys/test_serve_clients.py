"""Clients that know nothing of us: the stock tritonclient, curl, and schemathesis over the OpenAPI document."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.infer.classifier import Classifier
from eagleray.vision.images import decode

from tests.serving_server import make_key, running, service_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[tuple[str, str]]:
    """The service's address and a key that opens it."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    key = make_key(keys, images_per_s=1e6, burst=1_000_000)
    with running(service_config(keys, tiny=tiny_model)) as address:
        yield address, key


@pytest.fixture(scope="module")
def photos(make_photo: Callable[..., bytes]) -> list[bytes]:
    return [make_photo(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def classifier(tiny_model: Path) -> Classifier:
    return Classifier(tiny_model, "onnx")


@pytest.fixture
def triton(place: tuple[str, str]) -> Iterator[Any]:
    """The stock client, and the header that opens the door."""
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(place[0].removeprefix("http://"))
    yield client
    client.close()


def opened(place: tuple[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer {place[1]}"}


def test_tritonclient_sees_a_server_and_a_model(triton: Any, place: tuple[str, str], classifier: Classifier) -> None:
    headers, version = opened(place), classifier.bundle.model_digest[:12]
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny", headers=headers)
    assert triton.is_model_ready("tiny", version, headers=headers)
    assert not triton.is_model_ready("other", headers=headers)
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    assert triton.get_model_metadata("tiny", headers=headers)["versions"] == [version]


@pytest.mark.parametrize("is_binary", [True, False])
def test_tritonclient_infers_what_score_says(
    triton: Any, place: tuple[str, str], classifier: Classifier, photos: list[bytes], is_binary: bool
) -> None:
    import base64

    from tritonclient import http

    images = photos if is_binary else [base64.b64encode(photo) for photo in photos]
    sent = http.InferInput("image", [3], "BYTES")
    sent.set_data_from_numpy(np.array(images, object), binary_data=is_binary)
    outputs = [http.InferRequestedOutput(name, binary_data=is_binary) for name in ("label", "score", "probabilities")]
    result = triton.infer("tiny", [sent], outputs=outputs, request_id="seven", headers=opened(place))
    expected = classifier.predict(photos)
    assert result.get_response()["id"] == "seven"
    assert [str(label, "utf-8") if is_binary else label for label in result.as_numpy("label")] == [
        prediction.label for prediction in expected
    ]
    # Batches of other sizes may differ in the last bits of a float32
    np.testing.assert_allclose(result.as_numpy("score"), [prediction.score for prediction in expected], atol=1e-6)
    assert result.as_numpy("probabilities").shape == (3, 5)


def test_tritonclient_infers_pixels_with_outputs_of_its_own_choice(
    triton: Any, place: tuple[str, str], classifier: Classifier, photos: list[bytes]
) -> None:
    from tritonclient import http

    pixels = np.stack([decode(photo, classifier.bundle.image_spec) for photo in photos])
    sent = http.InferInput("image", list(pixels.shape), "UINT8")
    sent.set_data_from_numpy(pixels)
    result = triton.infer("tiny", [sent], headers=opened(place))  # no outputs: all of them, binary
    expected = classifier.infer(pixels).probabilities
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected, atol=1e-6)
    assert result.as_numpy("reason").tolist() == [b""] * 3


def test_tritonclient_reads_our_refusals(triton: Any, place: tuple[str, str]) -> None:
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    sent = http.InferInput("image", [1], "BYTES")
    sent.set_data_from_numpy(np.array([b"not an image"], object))
    with pytest.raises(InferenceServerException) as refusal:
        triton.infer("tiny", [sent], headers=opened(place))
    assert refusal.value.status() == "422"
    assert "No image of the request can be classified" in refusal.value.message()
    with pytest.raises(InferenceServerException) as refusal:
        triton.infer("tiny", [sent])
    assert refusal.value.status() == "401"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: apt-get install curl")
def test_curl_sends_a_file_and_a_form(
    place: tuple[str, str], classifier: Classifier, photos: list[bytes], tmp_path: Path
) -> None:
    address, key = place
    files = [tmp_path / f"{index}.jpg" for index in range(3)]
    for file, photo in zip(files, photos, strict=True):
        file.write_bytes(photo)
    expected = [prediction.label for prediction in classifier.predict(photos)]
    one = curl(address, key, "-H", "Content-Type: image/jpeg", "--data-binary", f"@{files[0]}")
    assert one["label"] == expected[0]
    many = curl(address, key, *[word for file in files for word in ("-F", f"file=@{file}")])
    assert [entry["label"] for entry in many["predictions"]] == expected
    forgotten = curl(address, key, "--data-binary", f"@{files[0]}")  # curl then says it were a form
    assert (forgotten["status"], forgotten["code"]) == (415, "unsupported_media_type")


def curl(address: str, key: str, *words: str) -> dict[str, Any]:
    command = ["curl", "--silent", "--noproxy", "*", "-H", f"X-API-Key: {key}", *words, f"{address}/v1/predict"]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--phases=coverage,fuzzing", "--max-examples=5"), id="short"),
        pytest.param(("--max-examples=200",), id="long", marks=pytest.mark.full),
    ],
)
def test_schemathesis_finds_nothing_over_the_openapi_document(
    place: tuple[str, str], classifier: Classifier, tmp_path: Path, words: tuple[str, ...]
) -> None:
    pytest.importorskip("schemathesis")
    address, key = place
    (tmp_path / "schemathesis.toml").write_text(
        f"""
        headers = {{ Authorization = "Bearer {key}" }}
        [parameters]
        "path.model" = "tiny"
        "path.version" = "{classifier.bundle.model_digest[:12]}"
        """,
        "utf-8",
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "platform"), *filter(None, sys.path)])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(ROOT / "docs" / "openapi.json"), "--url", address),
            *("--seed", "1", "--continue-on-failure", "--warnings", "off", *words),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "16 selected / 16 total" in done.stdout
