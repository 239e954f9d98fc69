"""The probe set and the gate: what answers otherwise than the model did does not start."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.core.errors import ArtifactError
from eagleray.infer import parity
from eagleray.infer.classifier import Classifier
from eagleray.infer.parity import (
    TOLERANCES,
    Parity,
    Tolerance,
    check_parity,
    prove,
    require_parity,
    stated,
    tolerance_of,
)
from eagleray.infer.probes import generated_images, make_probes, parse_probes, read_probes
from eagleray.infer.runtimes import Outputs
from eagleray.infer.runtimes.onnx_runtime import OnnxRuntime
from eagleray.vision.bundle import ONNX, PROBES, ModelBundle, load_bundle, save_bundle
from eagleray.vision.images import ImageSpec
from safetensors.numpy import load, save

from tests.tiny_model import make_onnx


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bare(tiny_model: Path) -> ModelBundle:
    """A bundle of before there were probe sets."""
    return load_bundle(tiny_model)


@pytest.fixture
def proved(bare: ModelBundle, tmp_path: Path) -> ModelBundle:
    return save_bundle(tmp_path / "proved", replace(bare, files={}), {ONNX: bare.path / ONNX}, probes=prove)


def _with_probes(bundle: ModelBundle, out: Path, probes: bytes, **changes: Any) -> ModelBundle:
    """The same model with another probe set, digests and all: what a person with write access could make."""
    return save_bundle(out, replace(bundle, files={}, **changes), {ONNX: bundle.path / ONNX}, probes=probes)


def _edited(bundle: ModelBundle, change: Callable[[dict[str, np.ndarray], dict[str, Any]], object]) -> bytes:
    data = bundle.read_verified(PROBES)
    tensors = {name: value.copy() for name, value in load(data).items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["eagleray"])
    change(tensors, about)
    return save(tensors, metadata={"eagleray": json.dumps(about)})


class Counting(OnnxRuntime):
    """ONNX Runtime that counts how often it is run."""

    runs = 0

    def run(self, batch_u8_nhwc: np.ndarray) -> Outputs:
        Counting.runs += 1
        return super().run(batch_u8_nhwc)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    from eagleray.core.tables import Entry
    from eagleray.infer import runtimes

    entry = Entry(f"{__name__}:Counting", extra="onnx", needs="onnxruntime")
    monkeypatch.setitem(runtimes.RUNTIMES, "onnx", entry)
    monkeypatch.setattr(Counting, "runs", 0)
    return Counting


# --- the probe set --------------------------------------------------------------------------------------------------


def test_the_set_travels_with_the_bundle_and_is_no_part_of_the_model(bare: ModelBundle, proved: ModelBundle) -> None:
    assert set(proved.files) == {ONNX, PROBES}
    assert proved.model_digest == bare.model_digest
    probes = read_probes(load_bundle(proved.path))
    assert probes is not None
    assert (probes.images_u8_nhwc.shape, probes.logits.shape) == ((16, 32, 32, 3), (16, 5))
    assert len(set(probes.digests)) == 16
    assert probes.reference["runtime"] == "onnx"
    assert np.array_equal(probes.logits, OnnxRuntime(bare, threads=1).run(probes.images_u8_nhwc).logits)


def test_the_same_model_again_is_the_bundle_that_is_there_with_its_set(proved: ModelBundle) -> None:
    def never(bundle: ModelBundle) -> bytes:
        raise AssertionError("there is nothing to do")

    assert save_bundle(proved.path, replace(proved, files={}), {ONNX: proved.path / ONNX}, probes=never) == proved


def test_an_older_bundle_without_a_set_loads_and_answers(bare: ModelBundle) -> None:
    assert PROBES not in bare.files
    assert read_probes(bare) is None
    assert require_parity(bare, OnnxRuntime(bare, threads=1)) is None
    assert Classifier(bare, "onnx").infer(generated_images(bare.image_spec)).probabilities.shape == (16, 5)


def test_given_images_are_the_set(bare: ModelBundle) -> None:
    images = np.random.default_rng(3).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    probes = parse_probes(bare, make_probes(bare, images))
    assert np.array_equal(probes.images_u8_nhwc, images)
    assert len(probes) == 3


def test_generated_images_differ_and_come_again() -> None:
    spec = ImageSpec(height=24, width=40)
    first = generated_images(spec)
    assert first.shape == (16, 24, 40, 3)
    assert np.array_equal(first, generated_images(spec))
    assert len({image.tobytes() for image in first}) == 16
    assert first.std(axis=(1, 2, 3)).min() > 10  # none is a blank
    assert not np.array_equal(first, generated_images(spec, seed=1))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda tensors, about: tensors["images"].__setitem__((0, 0, 0, 0), 255 - tensors["images"][0, 0, 0, 0]),
         "an image is not the one"),
        (lambda tensors, about: tensors.update(images=tensors["images"][:, :16]), "its images are uint8"),
        (lambda tensors, about: tensors.update(images=tensors["images"].astype(np.float32)), "its images are float32"),
        (lambda tensors, about: tensors.update({name: value[:0] for name, value in tensors.items()}), "its images"),
        (lambda tensors, about: tensors.update(logits=tensors["logits"][:, :3]), "its logits are float32"),
        (lambda tensors, about: tensors["logits"].fill(np.nan), "its logits"),
        (lambda tensors, about: tensors.pop("logits"), "cannot be read"),
        (lambda tensors, about: tensors.update(embedding=tensors["embedding"][:, :3]), "its embedding is float32"),
        (lambda tensors, about: tensors["embedding"].fill(np.inf), "its embedding"),
        (lambda tensors, about: about.update(schema=2), "newer"),
        (lambda tensors, about: about.pop("sha256"), "cannot be read"),
    ],
)  # fmt: skip
def test_a_set_that_does_not_fit_is_refused(
    proved: ModelBundle, tmp_path: Path, change: Callable[..., object], seen: str
) -> None:
    wrong = _with_probes(proved, tmp_path / "wrong", _edited(proved, change))
    with pytest.raises(ArtifactError, match=f"probe set of wrong cannot be used: .*{seen}"):
        Classifier(wrong, "onnx")


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x08\0\0\0\0\0\0\0[1, 2, 3"])
def test_a_set_that_is_none_is_refused(proved: ModelBundle, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ArtifactError, match="cannot be used"):
        Classifier(_with_probes(proved, tmp_path / "wrong", data), "onnx")


# --- the gate -------------------------------------------------------------------------------------------------------


def test_a_flipped_answer_is_refused_with_the_engine_and_the_figures(proved: ModelBundle, tmp_path: Path) -> None:
    def flip(tensors: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        tensors["logits"][3] = tensors["logits"][3][::-1] - 2 * np.arange(5)

    wrong = _with_probes(proved, tmp_path / "wrong", _edited(proved, flip))
    with pytest.raises(ArtifactError) as caught:
        Classifier(wrong, "onnx")
    assert caught.value.exit_code == 4
    assert "wrong fails its probe set on onnx 1." in caught.value.seen
    assert "max |dp|" in caught.value.seen
    assert "15" not in caught.value.expected
    assert "<= 0.0001" in caught.value.expected


def test_an_embedding_that_is_off_is_refused_where_it_is_wanted(proved: ModelBundle, tmp_path: Path) -> None:
    """Of a backbone without classes the logits say nothing, and the embedding is what it is for."""
    probes = _edited(proved, lambda tensors, about: tensors["embedding"].__iadd__(0.01))
    wrong = _with_probes(proved, tmp_path / "wrong", probes)
    Classifier(wrong, "onnx")  # gives none, and only that is remembered
    with pytest.raises(ArtifactError, match=r"the embedding is off by 0\.00"):
        Classifier(wrong, "onnx", wants_embedding=True)
    Classifier(proved, "onnx", wants_embedding=True)


def test_another_preprocessing_with_the_same_set_is_refused(proved: ModelBundle, tmp_path: Path) -> None:
    """ImageNet's mean for a model of 0.5: the mistake that costs seven points and stops no one."""
    spec = replace(proved.image_spec, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    weights: dict[str, bytes | Path] = {name: proved.path / name for name in proved.files}
    wrong = save_bundle(tmp_path / "wrong", replace(proved, files={}, image_spec=spec), weights)
    with pytest.raises(ArtifactError, match="fails its probe set"):
        Classifier(wrong, "onnx")


def test_other_weights_with_the_set_of_their_parent_are_refused(proved: ModelBundle, tmp_path: Path) -> None:
    weights: dict[str, bytes | Path] = {ONNX: make_onnx(8), PROBES: proved.path / PROBES}
    wrong = save_bundle(tmp_path / "wrong", replace(proved, files={}), weights)
    for runtime in ("onnx", "openvino"):
        with pytest.raises(ArtifactError, match=f"fails its probe set on {runtime}"):
            Classifier(wrong, runtime)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_answers_that_are_no_numbers_fail_closed(proved: ModelBundle, value: float) -> None:
    class Broken(OnnxRuntime):
        def run(self, batch_u8_nhwc: np.ndarray) -> Outputs:
            found = super().run(batch_u8_nhwc)
            found.logits[0, 0] = value
            return found

    with pytest.raises(ArtifactError, match="fails its probe set"):
        require_parity(proved, Broken(proved, threads=1))
    assert check_parity(proved, Broken(proved, threads=1)).to_json()["is_passed"] is False


def test_a_pass_is_remembered_for_this_bundle_engine_version_and_processor(
    proved: ModelBundle, tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(bundle: ModelBundle) -> bool:
        before = counting.runs
        Classifier(bundle, "onnx")
        return counting.runs > before

    assert asked(proved)
    assert not asked(proved)
    other = _with_probes(proved, tmp_path / "other", make_probes(proved, generated_images(proved.image_spec, seed=9)))
    assert [asked(other), asked(other)] == [True, False]
    with monkeypatch.context() as patch:
        patch.setattr(parity.processor, "identity", lambda: {"model": "another", "flags": ""})
        assert asked(proved)
    with monkeypatch.context() as patch:
        patch.setattr(parity, "__version__", "99")
        assert asked(proved)
    monkeypatch.setattr(type(parity.RUNTIMES["onnx"]), "version", "99.0")
    assert asked(proved)


def test_a_failure_is_not_remembered(proved: ModelBundle, tmp_path: Path, counting: type[Counting]) -> None:
    probes = _edited(proved, lambda tensors, about: tensors["logits"].__imul__(2))
    wrong = _with_probes(proved, tmp_path / "wrong", probes)
    for _ in range(2):
        before = counting.runs
        with pytest.raises(ArtifactError):
            Classifier(wrong, "onnx")
        assert counting.runs == before + 1


@pytest.mark.parametrize("text", ["", "[]", '{"is_passed": "yes"}', '{"is_passed": 1}'])
def test_a_broken_memory_asks_again(proved: ModelBundle, tmp_path: Path, counting: type[Counting], text: str) -> None:
    Classifier(proved, "onnx")
    (path,) = (tmp_path / "cache" / "parity").iterdir()
    path.write_text(text)
    Classifier(proved, "onnx")
    assert counting.runs == 2


def test_a_memory_that_cannot_be_kept_is_done_without(
    proved: ModelBundle, tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        Classifier(proved, "onnx")
    assert counting.runs == 2


def test_an_onnx_that_is_not_its_weights_is_never_published(tmp_path: Path) -> None:
    """The gate at export: the same architecture, other weights in the ONNX."""
    pytest.importorskip("onnxscript", reason="exports: the extra onnx")
    import torch
    from eagleray.infer.export import export_onnx
    from eagleray.vision import backbones
    from eagleray.vision.bundle import SAFETENSORS
    from eagleray.vision.prediction import Label
    from eagleray.vision.state_dicts import to_safetensors

    name = backbones.Backbone(name="test_resnet", num_classes=3, model_args={})
    torch.manual_seed(0)
    first, second = backbones.create(name), backbones.create(name)
    spec = ImageSpec(height=32, width=32)
    draft = ModelBundle(
        architecture="test_resnet", labels=tuple(Label(one, one) for one in "abc"), image_spec=spec, embedding_dim=96
    )
    with torch.no_grad():
        second.get_classifier().bias.copy_(torch.tensor([2.0, 0.0, -2.0]))
    of_first, of_second, data = to_safetensors(first, "1"), to_safetensors(second, "2"), export_onnx(second, draft)
    with pytest.raises(ArtifactError, match="wrong fails its probe set on onnx"):
        save_bundle(tmp_path / "wrong", draft, {SAFETENSORS: of_first, ONNX: data}, probes=prove)
    assert not list(tmp_path.iterdir())
    right = save_bundle(tmp_path / "right", draft, {SAFETENSORS: of_second, ONNX: data}, probes=prove)
    assert {check_parity(right, name).is_passed for name in ("torch", "onnx", "openvino")} == {True}


# --- the figures ----------------------------------------------------------------------------------------------------


def _compare(bundle: ModelBundle, logits: np.ndarray, wanted: np.ndarray, tolerance: Tolerance) -> Parity:
    class Given:
        name, version, precision, device = "given", "1", "int8", "cpu"

        def run(self, batch_u8_nhwc: np.ndarray) -> Outputs:
            return Outputs(logits.astype(np.float32))

    probes = parity.Probes(generated_images(bundle.image_spec, len(wanted)), wanted.astype(np.float32))
    return parity.compare(bundle, Given(), probes, tolerance)  # type: ignore[arg-type]


def test_the_figures_are_those_of_the_slow_way(bare: ModelBundle) -> None:
    generator = np.random.default_rng(1)
    wanted = generator.normal(size=(8, 5)) * 2
    found = wanted + generator.normal(size=(8, 5)) * 0.7
    made = _compare(bare, found, wanted, TOLERANCES["int8"])

    def p(row: np.ndarray) -> np.ndarray:
        return np.exp(row) / np.exp(row).sum()

    dp = max(abs(p(a) - p(b)).max() for a, b in zip(found, wanted, strict=True))
    same = sum(a.argmax() == b.argmax() for a, b in zip(found, wanted, strict=True))
    assert made.max_abs_dp == pytest.approx(dp, abs=1e-6)
    assert made.top1_agreement == same / 8
    assert 0 < same < 8


def test_labels_that_tie_in_the_reference_are_one(bare: ModelBundle) -> None:
    wanted = np.array([[1.0, 1.0 + 1e-5, -9, -9, -9]])
    assert _compare(bare, wanted[:, [1, 0, 2, 3, 4]], wanted, TOLERANCES["fp32"]).is_passed
    wanted = np.array([[1.0, 1.01, -9, -9, -9]])
    assert _compare(bare, wanted[:, [1, 0, 2, 3, 4]], wanted, TOLERANCES["int8"]).top1_agreement == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_bundle_may_state_a_stricter_tolerance_never_a_looser_one(bare: ModelBundle, precision: str) -> None:
    most = TOLERANCES[precision]
    loose = replace(
        bare, lineage={"tolerance": {"max_abs_dp": 1.0, "min_top1_agreement": 0.0, "max_embedding_drift": 9.0}}
    )
    assert tolerance_of(loose, precision) == tolerance_of(bare, precision) == most
    strict = replace(
        bare, lineage={"tolerance": {"max_abs_dp": 1e-5, "min_top1_agreement": 1.0, "max_embedding_drift": 1e-5}}
    )
    assert tolerance_of(strict, precision) == (most if precision == "fp32" else Tolerance(1e-5, 1.0, 1e-5))


def test_what_is_stated_lets_the_engine_that_it_was_measured_on_through(bare: ModelBundle) -> None:
    generator = np.random.default_rng(2)
    wanted = generator.normal(size=(16, 5)) * 2
    for noise in (0.0, 1e-6, 0.01, 0.2):
        made = _compare(bare, wanted + generator.normal(size=(16, 5)) * noise, wanted, TOLERANCES["int8"])
        own = tolerance_of(replace(bare, lineage={"tolerance": stated(made)}), "int8")
        assert made.max_abs_dp <= own.max_abs_dp <= TOLERANCES["int8"].max_abs_dp
        assert made.top1_agreement >= own.min_top1_agreement


@pytest.mark.parametrize("value", ["loose", {}, {"max_abs_dp": "x", "min_top1_agreement": 1}, [1, 2]])
def test_a_tolerance_that_is_none_is_refused(bare: ModelBundle, value: object) -> None:
    with pytest.raises(ArtifactError, match="states the tolerance"):
        tolerance_of(replace(bare, lineage={"tolerance": value}), "int8")
    with pytest.raises(ArtifactError, match="no tolerance for 'int4'"):
        tolerance_of(bare, "int4")
