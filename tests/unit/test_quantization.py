"""Quantisation: near an obvious oracle, the same bytes twice, inside its budget or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from eagleray.core import processor
from eagleray.core.errors import ConfigError, DataError, KpiNotMet
from eagleray.core.tables import resolve
from eagleray.infer.export import export_onnx
from eagleray.infer.quantization import QuantizationSettings, quantize, to_fp16
from eagleray.infer.quantization.calibration import Histogram
from eagleray.infer.quantization.correction import correct
from eagleray.infer.quantization.graph import layers, prepare
from eagleray.infer.quantization.search import search, sqnr_db
from eagleray.infer.runtimes import RUNTIMES
from eagleray.vision.bundle import ModelBundle, load_bundle, save_bundle
from eagleray.vision.images import ImageSpec, normalize
from eagleray.vision.prediction import Label
from onnx import TensorProto, helper, numpy_helper

SIZE = 32
NOISE_DB = 15.0  # 8 bits of random nets of a few layers keep 20 to 40 dB; a wrong scale or axis gives under 5


def _pixels(num: int, size: int = SIZE, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (num, 4, 4, 3), dtype=np.uint8)
    return small.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def _batches(pixels: np.ndarray, size: int = 8) -> Iterator[np.ndarray]:
    return (pixels[start : start + size] for start in range(0, len(pixels), size))


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelBundle]:
    """fp32 bundles of a residual, a depthwise and an attention network, seeded."""
    import torch
    from eagleray.vision.backbones import Backbone, create, size_args

    root, found = tmp_path_factory.mktemp("nets"), {}
    for name in ("test_resnet", "test_efficientnet", "test_vit"):
        torch.manual_seed(3)
        model = create(Backbone(name=name, num_classes=5, model_args=size_args(name, SIZE)))
        with torch.no_grad():
            for _ in range(3):
                model.train()(torch.randn(8, 3, SIZE, SIZE))
        draft = ModelBundle(
            architecture=name,
            labels=tuple(Label(one, one) for one in "abcde"),
            image_spec=ImageSpec(height=SIZE, width=SIZE),
            embedding_dim=int(model.num_features),
        )
        found[name] = save_bundle(root / name, draft, {"model.onnx": export_onnx(model.eval(), draft)})
    return found


def _answers(bundle: ModelBundle, data: bytes, precision: Any, runtime: str, path: Path) -> np.ndarray:
    made = save_bundle(path, replace(bundle, files={}, precision=precision), {"model.onnx": data})
    engine = resolve(RUNTIMES, runtime, what="runtime")(load_bundle(made.path), threads=1, wants_embedding=True)
    assert engine.precision == precision
    return engine.run(_pixels(11, seed=9)).logits


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
@pytest.mark.parametrize("form", ["int8", "uint8", "fp16"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_every_graph_engine_answers_as_fp32_does(
    nets: dict[str, ModelBundle], name: str, form: str, runtime: str, tmp_path: Path
) -> None:
    bundle = nets[name]
    if form == "fp16":
        data, least_db = to_fp16(bundle), 35.0  # 11 bits
    else:
        settings = QuantizationSettings(activations=form)
        data, least_db = quantize(bundle, _batches(_pixels(32)), settings=settings).data, NOISE_DB
    expected = _answers(bundle, bundle.read_verified("model.onnx"), "fp32", runtime, tmp_path / "parent")
    precision = "fp16" if form == "fp16" else "int8"
    found = _answers(bundle, data, precision, runtime, tmp_path / "child")
    assert sqnr_db(expected, found) >= least_db


def _convolution(path: Path, *, pad: int = 0) -> tuple[ModelBundle, np.ndarray, np.ndarray]:
    """A bundle of one convolution and a mean over places; its weights and biases."""
    generator = np.random.default_rng(1)
    weight = (
        generator.normal(0, 0.3, (6, 3, 2, 2)).astype(np.float32) * np.array([1, 9, 0.1, 1, 3, 1])[:, None, None, None]
    )
    bias = generator.normal(0, 0.1, 6).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"], name="conv", strides=[2, 2], pads=[pad] * 4),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["logits"], name="flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(weight.astype(np.float32), "w"), numpy_helper.from_array(bias, "b")],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    spec = ImageSpec(height=4, width=4)
    labels = tuple(Label(one, one) for one in "abcdef")
    bundle = save_bundle(path, ModelBundle(architecture="onnx", labels=labels, image_spec=spec), {"model.onnx": data})
    return bundle, weight, bias


def _some_pixels() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (16, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("form", ["int8", "uint8"])
@pytest.mark.parametrize("pad", [0, 1])
def test_rounded_weights_with_corrected_biases_have_no_mean_error(tmp_path: Path, pad: int, form: Any) -> None:
    bundle, _, bias = _convolution(tmp_path / "b", pad=pad)
    pixels = _some_pixels()
    made = quantize(bundle, [pixels], settings=QuantizationSettings(reduce_range=True, activations=form))
    known = {one.name: numpy_helper.to_array(one) for one in onnx.load_from_string(made.data).graph.initializer}
    rounded = known["w_quantized"].astype(np.float32) * known["w_scale"].reshape(-1, 1, 1, 1)

    def mean_error(biases: np.ndarray) -> np.ndarray:
        """Over images and places, with exact activations: in the float graph."""
        model = onnx.load_from_string(bundle.read_verified("model.onnx"))
        del model.graph.initializer[:]
        model.graph.initializer.extend([numpy_helper.from_array(rounded, "w"), numpy_helper.from_array(biases, "b")])
        child = save_bundle(
            tmp_path / f"{biases[0]}", replace(bundle, files={}), {"model.onnx": model.SerializeToString()}
        )
        return np.abs((_logits_of(child, pixels) - _logits_of(bundle, pixels)).mean(axis=0))

    assert mean_error(known["conv_corrected"]).max() <= 1e-5  # float32 sums of some dozens of values up to 10
    assert mean_error(bias).max() >= 1e-3


def test_a_matrix_product_s_bias_is_the_sum_behind_it() -> None:
    generator = np.random.default_rng(0)
    weight, x = (generator.normal(2, 1, shape).astype(np.float32) for shape in ((8, 4), (64, 8)))
    scale = np.abs(weight).max(axis=0) / 127
    rounded = np.round(weight / scale).astype(np.int8)
    product = helper.make_node("MatMul", ["x", "w"], ["m"], name="product")
    taken = helper.make_node("MatMul", ["x", "wide"], ["m"], name="product")
    wide = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["wide"], axis=1, name="wide")
    values = {"w": weight, "b": np.ones(4, np.float32), "q": rounded, "s": scale, "z": np.zeros(4, np.int8)}

    def model(*nodes: Any) -> Any:
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
        parts = [*nodes, helper.make_node("Add", ["m", "b"], ["y"], name="sum")]
        held = [numpy_helper.from_array(value, name) for name, value in values.items()]
        return helper.make_model(helper.make_graph(parts, "one", ends[:1], ends[1:], held))

    corrected = correct(model(wide, taken), model(product), {"x": x.mean(axis=0, keepdims=True)}).graph
    bias = {one.name: numpy_helper.to_array(one) for one in corrected.initializer}[corrected.node[-1].input[1]]
    error = x @ (rounded * scale) + bias - (x @ weight + values["b"])
    assert np.abs(error.mean(axis=0)).max() <= 1e-5  # float32 sums of some dozens of values up to 10
    assert np.abs((x @ (rounded * scale - weight)).mean(axis=0)).max() >= 1e-3


def _logits_of(bundle: ModelBundle, pixels: np.ndarray) -> np.ndarray:
    return resolve(RUNTIMES, "onnx", what="runtime")(bundle, threads=1).run(pixels).logits


def test_a_graph_computes_what_a_slow_fake_quantised_convolution_does(tmp_path: Path) -> None:
    bundle, weight, bias = _convolution(tmp_path / "b")
    pixels = _some_pixels()
    made = quantize(bundle, [pixels], settings=QuantizationSettings(reduce_range=False, correct_bias=False))
    x = normalize(pixels, bundle.image_spec)
    scale = np.abs(x).max() / 127
    x8 = np.clip(np.round(x / scale), -128, 127) * scale
    scales = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    w8 = np.clip(np.round(weight / scales), -127, 127) * scales
    expected = np.zeros((16, 6))
    for n in range(16):
        for k in range(6):
            taps = [(x8[n, :, i : i + 2, j : j + 2] * w8[k]).sum() + bias[k] for i in (0, 2) for j in (0, 2)]
            expected[n, k] = np.mean(taps)
    child = save_bundle(tmp_path / "c", replace(bundle, files={}, precision="int8"), {"model.onnx": made.data})
    found = _logits_of(child, pixels)
    # a tie of a rounding may fall to either side in float32: one step of one tap
    assert np.abs(found - expected).max() <= scale * scales.max() * 127


def test_the_same_calibration_gives_the_same_bytes_and_is_read_once(nets: dict[str, ModelBundle]) -> None:
    bundle = nets["test_efficientnet"]
    first = quantize(bundle, _batches(_pixels(24), 8))
    second = quantize(bundle, _batches(_pixels(24), 5))
    assert first.data == second.data
    assert first.table.calibration_digest == second.table.calibration_digest
    assert quantize(bundle, _batches(_pixels(24, seed=4))).data != first.data


def test_zero_points_are_zero_and_int8_weights_have_a_scale_a_channel(nets: dict[str, ModelBundle]) -> None:
    """What TensorRT builds."""
    model = onnx.load_from_string(quantize(nets["test_efficientnet"], _batches(_pixels(16))).data)
    known = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert known[node.input[2]].dtype == np.int8
            assert not known[node.input[2]].any()
            if node.input[0] in known:
                assert known[node.input[1]].shape == (known[node.input[0]].shape[0],)
    assert {one.key: one.value for one in model.metadata_props}["precision"] == "int8"


def test_the_order_of_images_does_not_change_a_histogram() -> None:
    parts = [np.random.default_rng(k).normal(0, 10.0**k, 500).astype(np.float32) for k in range(4)]
    forward, backward = Histogram(), Histogram()
    for part in parts:
        forward.add(part)
    for part in reversed(parts):
        backward.add(part)
    assert (forward.counts == backward.counts).all()
    assert forward.exponent == backward.exponent
    assert forward.counts.sum() == 2000


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_each_calibration_gives_an_answer(nets: dict[str, ModelBundle], method: Any, tmp_path: Path) -> None:
    bundle = nets["test_resnet"]
    made = quantize(bundle, _batches(_pixels(32)), settings=QuantizationSettings(calibration=method))
    expected = _answers(bundle, bundle.read_verified("model.onnx"), "fp32", "onnx", tmp_path / "p")
    assert sqnr_db(expected, _answers(bundle, made.data, "int8", "onnx", tmp_path / "c")) >= 5.0


def test_the_search_leaves_float_what_it_must_and_no_more(nets: dict[str, ModelBundle]) -> None:
    bundle = nets["test_resnet"]
    parent = bundle.read_verified("model.onnx")
    total = len(layers(prepare(parent, "x")))
    asked = []

    def accuracy(data: bytes) -> float:
        ops = [node.op_type for node in onnx.load_from_string(data).graph.node]
        asked.append(ops.count("QuantizeLinear"))
        return 0.9 if asked[-1] == 0 or asked[-1] < asked[1] - 2 else 0.8

    made = quantize(
        bundle, _batches(_pixels(16)), evaluate=accuracy, settings=QuantizationSettings(max_float_share=0.9)
    )
    assert made.table.drop_points == 0.0
    assert 0 < total - made.table.num_quantized < total
    assert all(one.sqnr_db is not None for one in made.table.layers)
    assert made.table.to_json()["accuracy"] == {"before": 0.9, "after": 0.9}


def test_a_search_that_cannot_meet_the_budget_says_so(nets: dict[str, ModelBundle]) -> None:
    answers = iter([0.9] + [0.5] * 50)
    settings = QuantizationSettings(max_evaluations=4)
    with pytest.raises(KpiNotMet, match=r"40\.00 points at best"):
        quantize(nets["test_resnet"], _batches(_pixels(8)), evaluate=lambda _: next(answers), settings=settings)
    assert sum(1 for _ in answers) == 51 - 4


def test_the_search_halves_back_to_the_fewest() -> None:
    from eagleray.infer.quantization.graph import Layer

    named = [Layer(f"l{k}", "Conv") for k in range(20)]
    found = search(
        named,
        build=lambda is_float: bytes([len(is_float)]),
        rank=lambda: {f"l{k}": float(k) for k in range(20)},
        evaluate=lambda data: 1.0 if data == b"parent" or data[0] >= 6 else 0.5,
        parent=b"parent",
        settings=QuantizationSettings(),
    )
    assert found.is_float == {f"l{k}" for k in range(6)}


@pytest.mark.parametrize("wrong", [{"scheme": "dynamic"}, {"per_channel": False}])
def test_one_scale_a_tensor_is_refused_for_depthwise_networks(nets: dict[str, ModelBundle], wrong: dict) -> None:
    with pytest.raises(ConfigError, match="depthwise convolutions"):
        quantize(nets["test_efficientnet"], _batches(_pixels(8)), settings=QuantizationSettings(**wrong))


def test_bad_calibration_and_unknown_layers_are_refused(nets: dict[str, ModelBundle]) -> None:
    bundle = nets["test_resnet"]
    with pytest.raises(DataError, match="no images"):
        quantize(bundle, [])
    with pytest.raises(DataError, match="of shape"):
        quantize(bundle, [np.zeros((1, 8, 8, 3), np.uint8)])
    with pytest.raises(ConfigError, match="keep_float names nowhere"):
        quantize(bundle, _batches(_pixels(8)), settings=QuantizationSettings(keep_float=("nowhere",)))


def test_half_precision_keeps_norms_softmax_and_reductions_float32(nets: dict[str, ModelBundle]) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(to_fp16(nets["test_vit"])))
    types = {one.name: one.type.tensor_type.elem_type for one in (*model.graph.value_info, *model.graph.output)}
    kinds = {node.op_type: types[node.output[0]] for node in model.graph.node}
    assert {kinds["Softmax"], kinds["LayerNormalization"]} == {TensorProto.FLOAT}
    assert kinds["MatMul"] == TensorProto.FLOAT16
    assert [one.type.tensor_type.elem_type for one in (*model.graph.input, *model.graph.output)] == [1, 1, 1]


def test_torch_refuses_and_auto_passes_over_what_is_not_fp32(nets: dict[str, ModelBundle], tmp_path: Path) -> None:
    from eagleray.infer.runtimes.measure import candidates

    bundle = save_bundle(
        tmp_path / "h", replace(nets["test_vit"], files={}, precision="fp16"), {"model.onnx": to_fp16(nets["test_vit"])}
    )
    assert "torch" not in candidates(bundle)
    with pytest.raises(ConfigError, match="is fp16"):
        resolve(RUNTIMES, "torch", what="runtime")(bundle, threads=1)
    with pytest.raises(ConfigError, match="fp16 already"):
        quantize(bundle, _batches(_pixels(8)))


def test_seven_bits_where_eight_would_overflow() -> None:
    assert processor.saturates_int8(processor.flags("flags : sse2 avx2\n"))
    assert not processor.saturates_int8(processor.flags("flags : sse2 avx2 avx_vnni\n"))
    assert not processor.saturates_int8(processor.flags("Features : fp asimd\n"))
    assert processor.saturates_int8(frozenset())
