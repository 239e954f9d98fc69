"""`eagleray export`: what is written answers as the bundle does, or nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, CapabilityError, ConfigError
from eagleray.infer import engine_check
from eagleray.infer.classifier import Classifier
from eagleray.infer.engine_check import EngineCheck, check_engine
from eagleray.infer.export import seal_onnx
from eagleray.infer.parity import prove
from eagleray.infer.runtimes import cuda_driver, engine_process
from eagleray.vision.bundle import ONNX, PROBES, ModelBundle, load_bundle, save_bundle
from eagleray.vision.images import normalize
from eagleray.vision.onnx_graph import adapt, parse
from eagleray.vision.prediction import ThresholdPolicy

from tests.tiny_model import make_onnx

FORMS = ("onnx", "openvino", "tensorrt")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tiny_model: Path, tmp_path: Path) -> ModelBundle:
    bare = load_bundle(tiny_model)
    draft = replace(bare, files={}, policy=ThresholdPolicy({"circle": 0.25}, otherwise="ask"))
    return save_bundle(tmp_path / "bundle", draft, {ONNX: bare.path / ONNX}, probes=prove)


def _export(bundle: ModelBundle, to: str, out: Path | str, **settings: Any) -> dict[str, Any]:
    from eagleray.flows.export import ExportConfig, run

    if to == "tensorrt":
        pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx")
        settings = {"compute_capability": "8.9", **settings}
    return run(ExportConfig(model=str(bundle.path), to=to, out=str(out), **settings))  # type: ignore[arg-type]


def _pixels(count: int = 5) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def _metadata(data: bytes) -> dict[str, str]:
    return {one.key: one.value for one in onnx.load_from_string(data).metadata_props}


# --- the sealed ONNX ------------------------------------------------------------------------------------------------


def test_the_file_says_what_a_reader_without_the_bundle_needs(bundle: ModelBundle) -> None:
    said = _metadata(seal_onnx(bundle.read_verified(ONNX), bundle))
    assert json.loads(said["labels"]) == [label.to_json() for label in bundle.labels]
    assert json.loads(said["image_spec"]) == bundle.image_spec.to_json()
    assert bundle.policy is not None
    assert json.loads(said["policy"]) == bundle.policy.to_json()
    assert said["lineage_sha256"] == digest_json(dict(bundle.lineage))
    assert (said["model_digest"], said["has_preprocessing"], said["precision"]) == (
        bundle.model_digest,
        "false",
        "fp32",
    )


def test_the_same_bundle_gives_the_same_bytes_and_another_policy_others(bundle: ModelBundle) -> None:
    data = bundle.read_verified(ONNX)
    assert seal_onnx(data, bundle) == seal_onnx(data, bundle)
    assert seal_onnx(data, replace(bundle, policy=None)) != seal_onnx(data, bundle)
    sealed = seal_onnx(data, bundle, has_preprocessing=True)
    assert seal_onnx(sealed, bundle, has_preprocessing=True) == sealed  # it is put in front once


def test_preprocessing_in_the_graph_is_that_of_the_bundle(bundle: ModelBundle) -> None:
    """Bit for bit: the oracle is images.normalize in front of the plain graph."""
    plain, whole = (seal_onnx(bundle.read_verified(ONNX), bundle, has_preprocessing=one) for one in (False, True))
    sessions = [onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]) for data in (plain, whole)]
    (image,) = sessions[1].get_inputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["batch", 32, 32, 3])
    pixels = _pixels()
    wanted = sessions[0].run(None, {"image": normalize(pixels, bundle.image_spec)})
    found = sessions[1].run(None, {"image": pixels})
    assert [one.name for one in sessions[1].get_outputs()] == ["logits", "embedding"]
    for one, other in zip(wanted, found, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_bundle_of_such_a_graph_is_not_normalised_twice(bundle: ModelBundle, tmp_path: Path, runtime: str) -> None:
    sealed = seal_onnx(bundle.read_verified(ONNX), bundle, has_preprocessing=True)
    weights: dict[str, bytes | Path] = {ONNX: sealed, PROBES: bundle.path / PROBES}
    inside = save_bundle(tmp_path / "inside", replace(bundle, files={}), weights)
    found, wanted = (Classifier(one, runtime).infer(_pixels(11)).probabilities for one in (inside, bundle))
    assert np.abs(found - wanted).max() < 1e-6


def test_names_of_the_graph_stay_apart(bundle: ModelBundle) -> None:
    model = onnx.load_from_string(bundle.read_verified(ONNX))
    for node in model.graph.node:
        node.input[:] = ["normalize_x" if name == "c1" else name for name in node.input]
        node.output[:] = ["normalize_x" if name == "c1" else name for name in node.output]
    onnx.checker.check_model(
        onnx.load_from_string(seal_onnx(model.SerializeToString(), bundle, has_preprocessing=True))
    )


# --- the flow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_preprocessing", [False, True])
def test_an_exported_onnx_answers_as_the_bundle(bundle: ModelBundle, tmp_path: Path, has_preprocessing: bool) -> None:
    said = _export(bundle, "onnx", tmp_path / "a" / "model.onnx", has_preprocessing=has_preprocessing)
    assert (said["is_new"], said["parity"]["is_passed"], said["files"].keys()) == (True, True, {"model.onnx"})
    session = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = _pixels()
    x = pixels if has_preprocessing else normalize(pixels, bundle.image_spec)
    wanted = Classifier(bundle, "onnx")._runtime.run(pixels).logits
    assert np.abs(session.run(["logits"], {"image": x})[0] - wanted).max() < 1e-5


def test_an_exported_openvino_model_answers_as_the_bundle(bundle: ModelBundle, tmp_path: Path) -> None:
    _export(bundle, "openvino", tmp_path / "ir")
    assert {path.name for path in (tmp_path / "ir").iterdir()} == {"model.xml", "model.bin", "export.json"}
    model = openvino.Core().read_model(tmp_path / "ir" / "model.xml")
    assert model.get_rt_info(["eagleray", "model_digest"]).astype(str) == bundle.model_digest
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = _pixels()
    found = compiled({"image": normalize(pixels, bundle.image_spec)})["logits"]
    assert np.abs(found - Classifier(bundle, "onnx")._runtime.run(pixels).logits).max() < 1e-4


def test_a_tensorrt_export_is_the_onnx_and_its_engine_is_in_the_cache(bundle: ModelBundle, tmp_path: Path) -> None:
    said = _export(bundle, "tensorrt", tmp_path / "trt")
    assert {path.name for path in (tmp_path / "trt").iterdir()} == {"model.onnx", "export.json"}
    engine = Path(said["engine"]["path"])
    assert engine.parent == tmp_path / "cache" / "engines"
    assert (said["engine"]["is_run"], said["engine"]["for"]) == (False, "compute capability 8.9")
    engine.unlink()  # a cache may be emptied: the same command fills it again
    again = _export(bundle, "tensorrt", tmp_path / "trt")
    assert (again["is_new"], engine.is_file()) == (False, True)


@pytest.mark.parametrize("to", FORMS)
def test_the_same_command_again_has_nothing_to_do(bundle: ModelBundle, tmp_path: Path, to: str) -> None:
    first = _export(bundle, to, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path / "out", *(tmp_path / "out").glob("*")]}
    second = _export(bundle, to, tmp_path / "out")
    assert (first["is_new"], second["is_new"]) == (True, False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {**first, "is_new": False} == second


@pytest.mark.parametrize("to", FORMS)
def test_another_export_never_replaces_one(bundle: ModelBundle, tmp_path: Path, to: str) -> None:
    _export(bundle, to, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not this very export"):
        _export(bundle, to, tmp_path / "out", has_preprocessing=True)
    path = tmp_path / "out" if to == "onnx" else next(iter(sorted((tmp_path / "out").glob("model.*"))))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ConfigError, match="exists and is not this very export"):
        _export(bundle, to, tmp_path / "out")


@pytest.mark.parametrize("to", FORMS)
def test_a_folder_or_file_of_another_is_left(bundle: ModelBundle, tmp_path: Path, to: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for name in ("folder", "file"):
        with pytest.raises(ConfigError, match="exists and is not"):
            _export(bundle, to, tmp_path / name)
    assert (tmp_path / "folder" / "diary.txt").read_text() + (tmp_path / "file").read_text() == "minemine too"
    with pytest.raises(ConfigError, match="remote URI"):
        _export(bundle, to, "s3://bucket/model")


@pytest.mark.parametrize("to", FORMS)
def test_what_answers_otherwise_is_not_published(bundle: ModelBundle, tmp_path: Path, to: str) -> None:
    other = adapt(parse(make_onnx(8), "other.onnx"), "other.onnx").data
    weights: dict[str, bytes | Path] = {ONNX: other, PROBES: bundle.path / PROBES}
    wrong = save_bundle(tmp_path / "wrong", replace(bundle, files={}), weights)
    with pytest.raises(ArtifactError, match="wrong fails its probe set on"):
        _export(wrong, to, tmp_path / "place" / "out")
    assert not (tmp_path / "place").exists() or not list((tmp_path / "place").iterdir())


def test_an_older_bundle_without_a_probe_set_is_held_to_its_own_weights(tiny_model: Path, tmp_path: Path) -> None:
    assert _export(load_bundle(tiny_model), "onnx", tmp_path / "out.onnx")["parity"]["num_probes"] == 16


def test_without_a_gpu_tensorrt_asks_for_one_to_be_declared(
    bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno_such_driver.so.1")
    with pytest.raises(CapabilityError, match="no GPU to build a TensorRT engine for") as caught:
        _export(bundle, "tensorrt", tmp_path / "out", compute_capability=None)
    assert "compute_capability=8.9" in caught.value.fix
    with pytest.raises(CapabilityError, match=r"does not list compute capability 9\.0"):
        _export(bundle, "tensorrt", tmp_path / "out", compute_capability="9.0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["8", "eight", "8.9.1"])
def test_a_compute_capability_is_two_numbers(value: str) -> None:
    from eagleray.flows.export import ExportConfig

    with pytest.raises(ValueError, match=r"a compute capability as 8\.9"):
        ExportConfig(model="m", to="tensorrt", out="o", compute_capability=value)


# --- the check ------------------------------------------------------------------------------------------------------


def test_check_asks_every_engine_that_is_installed(
    bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eagleray.cli.releasing import _exported
    from eagleray.flows import export as flow

    asked = []

    def stand_in(bundle: ModelBundle, name: str, *, threads: int, device: str) -> EngineCheck:
        asked.append((name, device))
        reason = "no CUDA driver on this machine" if name == "tensorrt" else ""
        return EngineCheck(engine=name, version="1", device=device, is_passed=None if reason else True, reason=reason)

    monkeypatch.setattr(flow, "check_engine", stand_in)
    said = _export(bundle, "onnx", tmp_path / "out.onnx", check=True)
    assert set(asked) >= {("onnx", "cpu"), ("openvino", "cpu")}
    assert ("torch", "cpu") not in asked  # the bundle has no weights for it
    sizes = {check["engine"]: check["size_bytes"] for check in said["checks"]}
    assert sizes["onnx"] == (tmp_path / "out.onnx").stat().st_size
    text = _exported(said)
    assert "top-1 agrees on 100% of 16 images" in text
    assert ("tensorrt: not run: no CUDA driver" in text) == ("tensorrt" in sizes)


def test_one_engine_is_measured_in_a_process_of_its_own(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_engine(bundle, "onnx")
    assert (found.reason, found.is_passed, found.top1_agreement, found.precision) == ("", True, 1.0, "fp32")
    assert found.latency_ms_p50 is not None
    assert found.latency_ms_p95 is not None
    assert 0 < found.latency_ms_p50 <= found.latency_ms_p95
    assert found.images_per_s is not None
    assert found.images_per_s > 0


def test_an_engine_that_cannot_run_says_why(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not run on cuda" in check_engine(bundle, "openvino", device="cuda").reason
    monkeypatch.setattr(engine_check, "TIMEOUT_S", 0.01)
    assert "no answer within" in check_engine(bundle, "onnx").reason
    monkeypatch.setattr(engine_process.sys, "executable", "/bin/false")
    monkeypatch.setattr(engine_check, "TIMEOUT_S", 10.0)
    assert "its process ended with code 1" in check_engine(bundle, "onnx").reason
