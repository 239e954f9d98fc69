"""The classifier: a bad image costs itself only, and a small run imports neither torch nor Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.core.errors import ArtifactError, CapabilityError, ConfigError
from eagleray.infer import runtimes
from eagleray.infer.classifier import PREDICT_BATCH, Classifier
from eagleray.infer.probabilities import sigmoid, softmax, top_k
from eagleray.infer.runtimes import Outputs, measure, run_in_chunks
from eagleray.vision.bundle import ModelBundle, load_bundle, save_bundle
from eagleray.vision.images import ImageSpec, Reason, decode
from eagleray.vision.prediction import ThresholdPolicy
from hypothesis import given
from hypothesis import strategies as st

Photo = Callable[..., bytes]


@pytest.fixture(scope="module")
def classifier(tiny_model: Path) -> Classifier:
    return Classifier(tiny_model, "onnx", wants_embedding=True)


def test_bad_images_become_reasons_in_their_place(classifier: Classifier, make_photo: Photo) -> None:
    good = [make_photo(seed) for seed in range(3)]
    mixed = [b"", good[0], b"<html>", good[1], good[2][:200], good[2]]
    found = classifier.predict(mixed)
    assert [one.status for one in found] == ["quarantined", "scored"] * 3
    assert [found[k].reason for k in (0, 2)] == ["empty", "not_image"]
    assert all(one.reason in set(Reason) and one.label is None for one in found[::2])
    assert [found[k] for k in (1, 3, 5)] == classifier.predict(good)


def test_predictions_say_the_model_the_label_and_the_ranking(classifier: Classifier, make_photo: Photo) -> None:
    (one,) = classifier.predict([make_photo(1)])
    scores = [score for _, score in one.topk]
    assert one.model_digest == classifier.bundle.model_digest
    assert (one.label, one.score) == one.topk[0]
    assert len(one.topk) == 5
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-6)
    assert one.embedding is not None
    assert (one.embedding.dtype, one.embedding.shape) == (np.float16, (classifier.bundle.embedding_dim,))
    assert one.decision is None


def test_no_image_and_only_bad_images_are_fine(classifier: Classifier) -> None:
    assert classifier.predict([]) == []
    assert [one.reason for one in classifier.predict([b""] * 3)] == ["empty"] * 3


def test_the_order_of_images_does_not_change_their_predictions(classifier: Classifier, make_photo: Photo) -> None:
    images = [make_photo(seed) for seed in range(PREDICT_BATCH + 3)]
    forward, backward = classifier.predict(images), classifier.predict(images[::-1])[::-1]
    assert [one.label for one in forward] == [one.label for one in backward]
    assert max(abs(a.score - b.score) for a, b in zip(forward, backward, strict=True)) <= 1e-5  # type: ignore[operator]


def test_the_policy_of_the_bundle_is_applied(tiny_model: Path, tmp_path: Path, make_photo: Photo) -> None:
    plain = load_bundle(tiny_model)
    strict = replace(plain, policy=ThresholdPolicy(dict.fromkeys(plain.label_ids, 1.0), otherwise="look"))
    bundle = save_bundle(tmp_path / "strict", strict, {"model.onnx": tiny_model / "model.onnx"})
    (one,) = Classifier(bundle, "onnx").predict([make_photo(1)])
    assert one.decision == "look"
    assert one.label is not None


def test_bgr_is_decoded_as_the_spec_says(tiny_model: Path, tmp_path: Path, make_photo: Photo) -> None:
    plain = load_bundle(tiny_model)
    bundle = save_bundle(
        tmp_path / "bgr",
        replace(plain, image_spec=replace(plain.image_spec, color="bgr")),
        {"model.onnx": tiny_model / "model.onnx"},
    )
    rgb, bgr = (decode(make_photo(2), one.image_spec) for one in (plain, bundle))
    assert np.array_equal(rgb[..., ::-1], bgr)
    first, second = (Classifier(one, "onnx").infer(rgb[None]).probabilities for one in (plain, bundle))
    assert np.array_equal(first, second)  # the runtime takes pixels as they come: the order is decode's business


def test_values_that_are_not_finite_are_a_fault_of_the_model(classifier: Classifier, monkeypatch: Any) -> None:
    broken = Outputs(np.full((1, 5), np.nan, np.float32))
    monkeypatch.setattr(classifier._runtime, "run", lambda batch: broken)
    with pytest.raises(ArtifactError, match="not finite"):
        classifier.infer(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(("settings", "match"), [({"threads": 0}, "threads=0"), ({"top_k": 0}, "top_k=0")])
def test_impossible_settings_are_refused(tiny_model: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Classifier(tiny_model, "onnx", **settings)


def test_unknown_runtimes_and_devices_are_refused_with_the_names(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="unknown runtime") as caught:
        Classifier(tiny_model, "tensorflow")
    assert all(name in caught.value.expected for name in runtimes.RUNTIMES)
    with pytest.raises(ConfigError, match="unknown device"):
        Classifier(tiny_model, "onnx", device="tpu")


def test_a_missing_engine_is_named_with_its_install_line(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(runtimes.RUNTIMES["onnx"], needs="no_such_engine")
    monkeypatch.setitem(runtimes.RUNTIMES, "onnx", gone)
    with pytest.raises(CapabilityError, match="no_such_engine") as caught:
        Classifier(tiny_model, "onnx")
    assert "eagleray[onnx]" in caught.value.fix


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_no_gpu_is_an_error_and_never_a_silent_fallback(tiny_model: Path, runtime: str) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(CapabilityError):
        Classifier(tiny_model, runtime, device="cuda")


def test_torch_refuses_a_bundle_without_safetensors(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        Classifier(tiny_model, "torch")


def test_labels_that_do_not_fit_the_outputs_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    plain = load_bundle(tiny_model)
    wrong = save_bundle(
        tmp_path / "wrong", replace(plain, labels=plain.labels[:4]), {"model.onnx": tiny_model / "model.onnx"}
    )
    for runtime in measure.candidates(wrong):
        with pytest.raises(ArtifactError, match="5 outputs for 4 labels"):
            Classifier(wrong, runtime)


@pytest.mark.parametrize("data", [b"", b"no graph", b"\x08\x08"])
def test_bytes_that_are_no_onnx_are_refused_by_every_engine(tiny_model: Path, tmp_path: Path, data: bytes) -> None:
    bundle = save_bundle(tmp_path / "bad", load_bundle(tiny_model), {"model.onnx": data})
    for runtime in measure.candidates(bundle):
        with pytest.raises(ArtifactError):
            Classifier(bundle, runtime)


def test_tensors_in_other_files_are_refused_by_every_engine(tiny_model: Path, tmp_path: Path) -> None:
    """OpenVINO alone would read them from any path; ONNX Runtime from beside the process."""
    import onnx

    model = onnx.load_model_from_string((tiny_model / "model.onnx").read_bytes())
    tensor = next(one for one in model.graph.initializer if one.name == "b3")
    (tmp_path / "b3.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(tmp_path / "b3.bin"))
    bundle = save_bundle(tmp_path / "bad", load_bundle(tiny_model), {"model.onnx": model.SerializeToString()})
    for runtime in measure.candidates(bundle):
        with pytest.raises(ArtifactError):
            Classifier(bundle, runtime)


@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), min_size=6, max_size=6), min_size=1, max_size=4),
    k=st.integers(1, 6),
)
def test_top_k_is_the_head_of_a_stable_sort(rows: list[list[float]], k: int) -> None:
    batch = np.array(rows, np.float32)
    indices, values = top_k(batch, k)
    for row, found, scores in zip(rows, indices.tolist(), values.tolist(), strict=True):
        expected = sorted(row, reverse=True)[:k]
        assert scores == pytest.approx(expected)
        assert found == sorted(range(6), key=lambda index: (-row[index], index))[:k]


def test_a_multi_label_bundle_gives_each_label_its_own_probability(
    classifier: Classifier, make_photo: Photo, tmp_path: Path
) -> None:
    bundle = classifier.bundle
    weights = {name: bundle.path / name for name in bundle.files if name.startswith("model.")}
    draft = replace(bundle, output="multi_label_logits", files={}, path=Path())
    several = Classifier(save_bundle(tmp_path / "several", draft, weights), "onnx")
    pixels = np.stack([decode(make_photo(seed), bundle.image_spec) for seed in range(3)])
    odds = several.infer(pixels).probabilities.astype(np.float64)
    logits = np.log(odds / (1 - odds))
    np.testing.assert_allclose(softmax(logits.astype(np.float32)), classifier.infer(pixels).probabilities, atol=1e-5)
    assert several.bundle.model_digest != bundle.model_digest


def test_sigmoid_of_huge_logits_is_finite_and_exact_in_the_middle() -> None:
    found = sigmoid(np.float32([-1e30, -80, 0, 2, 80, 1e30]))
    assert np.isfinite(found).all()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0, 1.8048514e-35, 0.5, 0.880797, 1, 1], rtol=1e-6)


def test_softmax_of_huge_logits_is_finite() -> None:
    found = softmax(np.float32([[1e30, 0, -1e30], [-1e30, -1e30, -1e30]]))
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 0, 0], [pytest.approx(1 / 3)] * 3]


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_chunks_give_what_the_whole_gives(count: int, is_exact: bool) -> None:
    sizes = []

    def run(batch: np.ndarray) -> Outputs:
        sizes.append(len(batch))
        total = batch.reshape(len(batch), -1).sum(1, dtype=np.float32)[:, None]
        return Outputs(total, total * 2)

    batch = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    found = run_in_chunks(run, batch, 4, is_exact=is_exact)
    expected = batch.reshape(count, -1).sum(1, dtype=np.float32)[:, None]
    assert np.array_equal(found.logits, expected)
    assert np.array_equal(found.embedding, expected * 2)  # type: ignore[arg-type]
    assert set(sizes) == {4} if is_exact else max(sizes) <= 4


# --- auto -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Takes the place of the measuring processes; lists what was asked of them."""
    asked: list[dict[str, Any]] = []

    def stand_in(
        bundle: ModelBundle, names: tuple[str, ...], **settings: Any
    ) -> tuple[dict[str, float], dict[str, str]]:
        asked.append({"names": names, **settings})
        return {name: 10.0 + len(name) for name in names}, {}

    monkeypatch.setattr(measure, "_measure", stand_in)
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "cache"))
    return asked


def test_auto_takes_the_fastest_and_remembers_it(tiny_model: Path, measured: list[dict[str, Any]]) -> None:
    bundle = load_bundle(tiny_model)
    first = measure.choose_runtime(bundle, threads=1)
    assert (first.name, first.is_remembered) == ("openvino", False)
    assert first.measured == {"onnx": 14.0, "openvino": 18.0}
    second = measure.choose_runtime(bundle, threads=1)
    assert (second.name, second.measured, second.is_remembered) == (first.name, first.measured, True)
    assert len(measured) == 1
    assert Classifier(bundle).runtime_name == "openvino"


def test_auto_measures_again_for_other_threads_engines_or_models(
    tiny_model: Path, tmp_path: Path, measured: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(tiny_model)
    measure.choose_runtime(bundle, threads=1)
    measure.choose_runtime(bundle, threads=2)
    other = save_bundle(
        tmp_path / "other", replace(bundle, labels=bundle.labels[::-1]), {"model.onnx": tiny_model / "model.onnx"}
    )
    measure.choose_runtime(other, threads=1)
    monkeypatch.setattr(measure.processor, "identity", lambda: {"model": "another", "flags": ""})
    measure.choose_runtime(bundle, threads=1)
    assert len(measured) == 4


def test_auto_remembers_an_architecture_whatever_its_weights(
    tiny_model: Path, tmp_path: Path, measured: list[dict[str, Any]]
) -> None:
    draft = replace(load_bundle(tiny_model), architecture="resnet10t")
    files = {"model.onnx": tiny_model / "model.onnx"}
    measure.choose_runtime(save_bundle(tmp_path / "one", draft, files), threads=1)
    other = save_bundle(tmp_path / "two", replace(draft, labels=draft.labels[::-1]), files)
    assert measure.choose_runtime(other, threads=1).is_remembered
    larger = save_bundle(tmp_path / "three", replace(draft, image_spec=ImageSpec(64, 64)), files)
    assert not measure.choose_runtime(larger, threads=1).is_remembered


@pytest.mark.parametrize("text", ["", "{", "[]", '{"measured": {"onnx": "fast"}}', '{"measured": {"onnx": 1}}'])
def test_a_broken_memory_is_measured_anew(tiny_model: Path, measured: list[dict[str, Any]], text: str) -> None:
    bundle = load_bundle(tiny_model)
    measure.choose_runtime(bundle, threads=1)
    (path,) = Path(os.environ["EAGLERAY_CACHE"]).rglob("*.json")
    path.write_text(text)
    assert not measure.choose_runtime(bundle, threads=1).is_remembered


def test_a_cache_that_cannot_be_written_is_done_without(
    tiny_model: Path, tmp_path: Path, measured: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "file"))
    assert measure.choose_runtime(load_bundle(tiny_model), threads=1).name == "openvino"


def test_one_candidate_needs_no_measuring(
    tiny_model: Path, measured: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "installed", lambda table: ("torch", "onnx"))
    assert measure.choose_runtime(load_bundle(tiny_model), threads=1) == measure.Choice("onnx")
    assert not measured
    monkeypatch.setattr(measure, "installed", lambda table: ("torch",))
    with pytest.raises(CapabilityError, match="no installed runtime"):
        measure.choose_runtime(load_bundle(tiny_model), threads=1)


def test_an_engine_that_fails_is_left_out_and_said(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The real processes: OpenVINO cannot be imported there."""
    (tmp_path / "openvino.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "ROUND_S", 0.01)
    choice = measure.choose_runtime(load_bundle(tiny_model), threads=1)
    assert choice.name == "onnx"
    assert choice.measured["onnx"] > 0
    assert "code 3" in choice.failed["openvino"]
    assert not list((tmp_path / "cache").rglob("*.json"))  # a failure is no answer to remember


def test_predicting_imports_neither_torch_nor_ray(tiny_model: Path, tmp_path: Path, make_photo: Photo) -> None:
    (tmp_path / "photo.jpg").write_bytes(make_photo(3))
    program = (
        "import json, sys\n"
        "from eagleray.infer.classifier import Classifier\n"
        "light = {name.partition('.')[0] for name in sys.modules}\n"
        "image = open(sys.argv[2], 'rb').read()\n"
        "label = Classifier(sys.argv[1], 'onnx').predict([image])[0].label\n"
        "print(json.dumps([label, sorted(light), sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model), str(tmp_path / "photo.jpg")],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    label, at_import, after = json.loads(done.stdout)
    assert label
    assert not {"torch", "ray", "timm", "torchvision"} & set(after)
    assert not {"onnx", "onnxruntime", "openvino", "pandas", "scipy"} & set(at_import)
