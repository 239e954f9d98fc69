"""One law over every runtime and precision: the bundle's probe set is answered, or nothing starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eagleray.core.errors import ArtifactError, CapabilityError, EagleError
from eagleray.core.tables import installed, resolve
from eagleray.infer.classifier import Classifier
from eagleray.infer.parity import TOLERANCES, check_parity, prove
from eagleray.infer.probes import generated_images
from eagleray.infer.quantization import QuantizationSettings, quantize, to_fp16
from eagleray.infer.runtimes import RUNTIMES
from eagleray.infer.runtimes.measure import candidates
from eagleray.infer.runtimes.memory import graphics
from eagleray.vision.bundle import ONNX, PROBES, SAFETENSORS, ModelBundle, load_bundle, save_bundle
from safetensors.numpy import load, save


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, ModelBundle]:
    """By precision: a model for each engine to answer for; torch has one of its own, the others take the ONNX."""
    import torch
    from eagleray.vision import backbones
    from eagleray.vision.images import ImageSpec
    from eagleray.vision.prediction import Label
    from eagleray.vision.state_dicts import to_safetensors

    root = tmp_path_factory.mktemp("subjects")
    bare = load_bundle(tiny_model)
    torch.manual_seed(3)
    model = backbones.create(backbones.Backbone(name="test_resnet", num_classes=4, model_args={}))
    draft = ModelBundle(
        architecture="test_resnet", labels=tuple(Label(one, one) for one in "abcd"), image_spec=ImageSpec(32, 32)
    )
    return {
        "onnx": save_bundle(root / "onnx", replace(bare, files={}), {ONNX: bare.path / ONNX}, probes=prove),
        "torch": save_bundle(root / "torch", draft, {SAFETENSORS: to_safetensors(model, "model")}, probes=prove),
    }


def _subject(subjects: dict[str, ModelBundle], runtime: str) -> ModelBundle:
    return subjects["torch" if runtime == "torch" else "onnx"]


@pytest.mark.parametrize("form", ["fp16", "int8", "uint8"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_answers_each_precision_that_it_claims_and_refuses_the_others(
    runtime: str, form: str, subjects: dict[str, ModelBundle], tmp_path: Path
) -> None:
    """The probes stay the FP32 model's: what less precision may change is bounded by TOLERANCES, in any batch."""
    parent = subjects["onnx"]
    if form == "fp16":
        data, precision = to_fp16(parent), "fp16"
    else:
        settings = QuantizationSettings(activations=form, reduce_range=True)
        data, precision = (
            quantize(parent, [generated_images(parent.image_spec, 48, seed=1)], settings=settings).data,
            "int8",
        )
    draft = replace(parent, files={}, precision=precision)
    bundle = save_bundle(tmp_path / "b", draft, {ONNX: data}, probes=parent.path / PROBES)
    if runtime == "tensorrt":
        _refuses(bundle, runtime)
        return
    if runtime not in candidates(bundle):
        assert runtime == "torch"  # eager torch runs fp32 weights alone
        with pytest.raises(EagleError):
            Classifier(bundle, runtime)
        return
    parity = check_parity(bundle, runtime)
    assert (parity.engine, parity.precision, parity.num_probes) == (runtime, precision, 16)
    assert parity.is_passed, parity
    engine = resolve(RUNTIMES, runtime, what="runtime")(bundle, threads=1)
    pixels = generated_images(bundle.image_spec, 11, seed=2)
    alone = np.concatenate([engine.run(pixels[at : at + 1]).logits for at in range(len(pixels))])
    # another batch takes other kernels; a value at the edge between two steps may then fall to either side
    assert np.abs(engine.run(pixels).logits - alone).max() <= 0.05 * np.abs(alone).max()
    assert (engine.run(pixels).logits.argmax(1) == alone.argmax(1)).mean() >= 0.9


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_answers_the_probe_set_or_says_that_it_cannot_run_here(
    runtime: str, subjects: dict[str, ModelBundle]
) -> None:
    bundle = _subject(subjects, runtime)
    if runtime == "tensorrt":
        _refuses(bundle, runtime)
        return
    parity = check_parity(bundle, runtime)
    assert (parity.engine, parity.precision, parity.num_probes) == (runtime, "fp32", 16)
    assert parity.is_passed, parity
    assert parity.tolerance == TOLERANCES[parity.precision]


def _refuses(bundle: ModelBundle, runtime: str) -> None:
    """On the CPU, and on CUDA where there is none: what is lacking is said, never another engine in its place."""
    with pytest.raises(CapabilityError) as caught:
        check_parity(bundle, runtime)
    assert caught.value.fix
    if graphics():
        parity = check_parity(bundle, runtime, device="cuda")
        assert parity.is_passed, parity
    else:
        with pytest.raises(CapabilityError, match="no CUDA driver"):
            check_parity(bundle, runtime, device="cuda")


@pytest.mark.parametrize("runtime", [name for name in installed(RUNTIMES) if name != "tensorrt"])
def test_a_flipped_probe_stops_every_runtime(runtime: str, subjects: dict[str, ModelBundle], tmp_path: Path) -> None:
    bundle = _subject(subjects, runtime)
    data = bundle.read_verified(PROBES)
    tensors = {name: value.copy() for name, value in load(data).items()}
    tensors["logits"][7] = np.roll(tensors["logits"][7], 1)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    probes = save(tensors, metadata=header["__metadata__"])
    weights = {name: bundle.path / name for name in bundle.files if name != PROBES}
    wrong = save_bundle(tmp_path / "wrong", replace(bundle, files={}), weights, probes=probes)
    with pytest.raises(ArtifactError, match=f"wrong fails its probe set on {runtime}"):
        Classifier(wrong, runtime)
