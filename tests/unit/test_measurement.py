"""Laws of measuring: multiply-adds by hand, a quantised graph counts as its parent, engines take turns and may fail."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.flows.measurement import Measurement, decode_seconds, measure, work_of
from eagleray.infer.complexity import count
from eagleray.infer.runtimes.timing import Timing, TimingSettings, main, time_engines
from eagleray.vision.bundle import load_bundle
from onnx import TensorProto, helper, numpy_helper

from tests.tiny_model import make_onnx

QUICK = TimingSettings(batches=(1, 4), rounds=2, turn_s=0.01)


def test_the_tiny_model_by_hand() -> None:
    conv1, conv2 = 16 * 16 * 8 * (3 * 3 * 3), 8 * 8 * 16 * (8 * 3 * 3)
    found = count(make_onnx(), "tiny")
    assert found.macs == conv1 + conv2 + 16 * 5
    assert found.parameters == 8 * 27 + 16 * 72 + 16 * 5 + 5


def graph_of(nodes: list[onnx.NodeProto], shape: list[int | str], weights: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def test_a_depthwise_convolution_and_attention_s_product_by_hand() -> None:
    depthwise = graph_of(
        [helper.make_node("Conv", ["image", "w"], ["logits"], group=6, pads=[1, 1, 1, 1])],
        ["batch", 6, 10, 10],
        {"w": np.zeros((6, 1, 3, 3), np.float32)},
    )
    assert count(depthwise, "d").macs == 10 * 10 * 6 * 9
    product = graph_of(
        [
            helper.make_node("Transpose", ["image"], ["t"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["image", "t"], ["logits"]),
        ],
        ["batch", 3, 7, 5],
        {},
    )
    assert count(product, "p").macs == 3 * 7 * 7 * 5
    assert count(product, "p").parameters == 0


def test_quantizers_add_no_parameters_and_no_multiply_adds() -> None:
    scale, zero = np.float32(0.1), np.int8(0)
    weights = {"q": np.zeros((4, 3, 3, 3), np.int8), "s": np.full(4, scale), "z": np.full(4, zero), "b": np.zeros(4)}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
        helper.make_node("Conv", ["image", "w", "b"], ["logits"]),
    ]
    weights = {name: value.astype(np.float32) if name in "sb" else value for name, value in weights.items()}
    found = count(graph_of(nodes, ["batch", 3, 8, 8], weights), "q")
    assert (found.macs, found.parameters) == (6 * 6 * 4 * 27, 4 * 27 + 4)


def test_unknown_shapes_are_refused() -> None:
    nodes = [helper.make_node("Conv", ["image", "w"], ["logits"])]
    data = graph_of(nodes, ["batch", 3, "height", "width"], {"w": np.zeros((4, 3, 3, 3), np.float32)})
    with pytest.raises(ArtifactError, match="cannot be counted"):
        count(data, "x")


def test_engines_take_turns_and_one_that_cannot_run_says_why(tiny_model: Path) -> None:
    bundle = load_bundle(tiny_model)
    found = time_engines({"a": (bundle, "onnx"), "b": (bundle, "torch")}, QUICK)
    assert found["b"].failed
    assert "model.safetensors" in found["b"].failed
    good = found["a"]
    assert not good.failed
    assert set(good.rates or {}) == {1, 4}
    assert good.images_per_s == max((good.rates or {}).values()) == (good.rates or {})[good.best_batch]
    assert 0 < good.latency_ms_p50 <= good.latency_ms_p95


def test_a_measurement_never_tells_another_engines_figures(tiny_model: Path) -> None:
    bundle = load_bundle(tiny_model)
    found = measure({"tiny": bundle}, QUICK, engines={"tiny": ("onnx",)})["tiny"]
    assert found.model_bytes == (tiny_model / "model.onnx").stat().st_size
    assert found.macs == count(make_onnx(), "tiny").macs
    assert found.best == found.of(None) == found.of("onnx")
    with pytest.raises(CapabilityError, match="openvino gave no figures: it was not timed"):
        found.of("openvino")
    work = work_of(found.best, 0.002)
    assert work.core_s_per_image == pytest.approx(0.002 + 1 / found.best.images_per_s)
    with pytest.raises(CapabilityError, match="onnx: gone"):
        _ = Measurement(1, None, None, (Timing("onnx", failed="gone"),)).best


def test_a_probe_answers_line_by_line_and_says_its_fault(tiny_model: Path) -> None:
    out = io.StringIO()
    asked = "".join(json.dumps({"batch": size, "seconds": 0.001}) + "\n" for size in (1, 3))
    assert main([str(tiny_model), "onnx", "1", "cpu"], io.StringIO(asked), out) == 0
    first, second = map(json.loads, out.getvalue().splitlines())
    assert len(first["seconds"]) >= 3
    assert second["precision"] == "fp32"
    out = io.StringIO()
    main([str(tiny_model / "none"), "onnx", "1", "cpu"], io.StringIO(asked), out)
    assert "no model bundle" in json.loads(out.getvalue())["error"]


def test_decoding_is_timed_on_what_decodes(tiny_model: Path, make_photo: object) -> None:
    spec = load_bundle(tiny_model).image_spec
    assert callable(make_photo)
    assert decode_seconds([b"no image", make_photo(1)], spec) > 0
    assert decode_seconds([b"no image"], spec) == 0.0
