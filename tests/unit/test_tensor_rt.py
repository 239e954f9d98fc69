"""TensorRT: engines are built for real, for a declared GPU; they are run on a recorder of the driver's calls."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from eagleray.core.errors import ArtifactError, CapabilityError, ConfigError
from eagleray.infer.classifier import Classifier
from eagleray.infer.export import with_preprocessing
from eagleray.infer.parity import check_parity
from eagleray.infer.runtimes import cuda_driver, engine_build, engine_cache, tensor_rt, tensor_rt_api
from eagleray.infer.runtimes.cuda_driver import CudaDriver
from eagleray.infer.runtimes.engine_build import BuildSettings, Target, build_engine, capabilities
from eagleray.infer.runtimes.measure import candidates
from eagleray.infer.runtimes.tensor_rt import pieces
from eagleray.infer.runtimes.tensor_rt_api import Library, load_library
from eagleray.vision.bundle import ModelBundle, load_bundle, save_bundle
from eagleray.vision.onnx_graph import parse

from tests.cuda_recorder import CudaRecorder, ModuleOnRecorder

trt = pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx")
LIBRARY = Library("tensorrt_rtx", trt)
SMALL = BuildSettings(buckets=(1, 4), memory_mib=64)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tiny_model: Path) -> ModelBundle:
    return load_bundle(tiny_model)


def _graph(bundle: ModelBundle) -> bytes:
    return with_preprocessing(bundle.read_verified("model.onnx"), bundle)


def _pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


# --- the build, for real --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", ["8.9", "12.0"])
def test_an_engine_is_built_for_a_declared_gpu_on_a_machine_without(bundle: ModelBundle, capability: str) -> None:
    engine, timings = build_engine(LIBRARY, _graph(bundle), Target(capability), SMALL)
    assert engine[:4] == b"vtrt"
    assert timings == b""


def test_a_gpu_that_the_library_does_not_list_is_refused_with_the_list(bundle: ModelBundle) -> None:
    listed = capabilities(LIBRARY)
    assert {"8.9", "12.0"} <= set(listed)
    assert "9.0" not in listed  # the H100: TensorRT-RTX leaves it to the classic one
    with pytest.raises(CapabilityError, match=r"does not list compute capability 9\.0 \(NVIDIA H100\)") as caught:
        build_engine(LIBRARY, _graph(bundle), Target("9.0", "NVIDIA H100", "580.1"), SMALL)
    assert all(one in caught.value.expected for one in listed)


def test_the_classic_library_needs_the_gpu_that_it_builds_for(bundle: ModelBundle) -> None:
    with pytest.raises(CapabilityError, match="builds for the GPU that it runs on"):
        build_engine(Library("tensorrt", trt), _graph(bundle), Target("8.9"), SMALL)


def _quantized(tmp_path: Path, data: bytes) -> bytes:
    """Static Q/DQ with symmetric activations and per-channel weights, the recipe that TensorRT takes."""
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"image": np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    (tmp_path / "float.onnx").write_bytes(data)
    q.quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QInt8, weight_type=q.QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False,
                       "AddQDQPairToWeight": True, "DedicatedQDQPair": True},
    )  # fmt: skip
    return (tmp_path / "int8.onnx").read_bytes()


def _halved(data: bytes) -> bytes:
    """Weights and arithmetic in FP16, FP32 at both ends, by types in the graph."""
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_from_string(data)
    graph = model.graph
    for tensor in graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    last = graph.node[-1]
    for node in graph.node:
        node.input[:] = ["image_half" if name == "image" else name for name in node.input]
    last.output[:] = ["logits_half"]
    graph.node.insert(0, helper.make_node("Cast", ["image"], ["image_half"], to=TensorProto.FLOAT16))
    graph.node.append(helper.make_node("Cast", ["logits_half"], ["logits"], to=TensorProto.FLOAT))
    return model.SerializeToString()


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_types_of_the_onnx_are_the_arithmetic_of_the_engine(tmp_path: Path, precision: str) -> None:
    from tests.tiny_model import make_onnx

    model, labels = make_onnx(), tmp_path / "five.txt"
    labels.write_text("a\nb\nc\nd\ne")
    data = _quantized(tmp_path, model) if precision == "int8" else _halved(model)
    spec = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    (tmp_path / "typed.onnx").write_bytes(data)
    from eagleray.vision.imports import ImportConfig, import_model

    typed = import_model(
        ImportConfig(model=str(tmp_path / "typed.onnx"), out=str(tmp_path / "b"), labels=str(labels), **spec)
    )
    engine, _ = build_engine(LIBRARY, _graph(typed), Target("8.9"), SMALL)
    assert engine[:4] == b"vtrt"


def test_a_graph_that_tensorrt_does_not_know_is_said(bundle: ModelBundle) -> None:
    model = onnx.load_from_string(_graph(bundle))
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "StringNormalizer"
    with pytest.raises(ArtifactError, match="cannot read the model"):
        build_engine(LIBRARY, model.SerializeToString(), Target("8.9"), SMALL)


def test_every_name_that_the_adapter_uses_is_in_the_library() -> None:
    """The protocols are not an opinion: the installed library has each of their members."""
    pairs = {
        tensor_rt_api.HostMemory: trt.IHostMemory,
        tensor_rt_api.Profile: trt.IOptimizationProfile,
        tensor_rt_api.BuilderConfig: trt.IBuilderConfig,
        tensor_rt_api.Tensor: trt.ITensor,
        tensor_rt_api.Network: trt.INetworkDefinition,
        tensor_rt_api.Parser: trt.OnnxParser,
        tensor_rt_api.Builder: trt.Builder,
        tensor_rt_api.Context: trt.IExecutionContext,
        tensor_rt_api.Engine: trt.ICudaEngine,
    }
    for protocol, real in pairs.items():
        wanted = [name for name in vars(protocol) if not name.startswith("_")]
        assert wanted
        assert [name for name in wanted if not hasattr(real, name)] == [], real
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
    assert hasattr(trt.IExecutionContext, "is_stream_capturable")
    assert {"create_runtime_cache", "set_runtime_cache", "dynamic_shapes_kernel_specialization_strategy"} <= set(
        dir(trt.IRuntimeConfig)
    )
    assert {"serialize", "deserialize"} <= set(dir(trt.IRuntimeCache))


# --- the run, on a recorder -----------------------------------------------------------------------------------------


@pytest.fixture
def on_recorder(monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle) -> Callable[..., tuple[Any, ...]]:
    """Makes the runtime of the tiny model with small buckets; gives it, the recorder and the module."""

    def make(subject: ModelBundle = bundle, **settings: Any) -> tuple[Any, ...]:
        cuda = CudaRecorder(**settings)
        module = ModuleOnRecorder(trt, cuda, _graph(subject))
        monkeypatch.setattr(cuda_driver, "open_driver", lambda: CudaDriver(cuda))
        monkeypatch.setattr(tensor_rt_api, "load_library", lambda: Library("tensorrt_rtx", module))
        monkeypatch.setattr(tensor_rt, "settings_of", lambda onnx: SMALL)
        return tensor_rt.TensorRt(subject, threads=1, device="cuda", wants_embedding=True), cuda, module

    return make


@pytest.mark.parametrize("can_capture", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 12, 19])
def test_answers_are_those_of_onnx_runtime_whatever_the_batch(
    on_recorder: Callable[..., tuple[Any, ...]], bundle: ModelBundle, count: int, can_capture: bool
) -> None:
    runtime, _, _ = on_recorder(can_capture=can_capture)
    pixels = _pixels(count)
    found = runtime.run(pixels)
    wanted = Classifier(bundle, "onnx", wants_embedding=True)._runtime.run(pixels)
    assert np.abs(found.logits - wanted.logits).max() < 1e-4
    assert np.abs(found.embedding - wanted.embedding).max() < 1e-4
    again = runtime.run(pixels[::-1])  # buffers are used again: nothing of the last batch is left in them
    assert np.array_equal(again.logits, runtime.run(pixels[::-1].copy()).logits)
    assert np.abs(again.logits[::-1] - wanted.logits).max() < 1e-4


def test_a_graph_is_captured_once_a_size_and_lane_and_launched_ever_after(
    on_recorder: Callable[..., tuple[Any, ...]],
) -> None:
    runtime, cuda, _ = on_recorder()
    runtime.run(_pixels(8))  # two chunks of 4: one on each lane
    assert cuda.count("cuStreamBeginCapture_v2") == 2
    before = cuda.calls.copy()
    for seed in range(5):
        runtime.run(_pixels(8, seed))
    calls = cuda.calls[len(before) :]
    assert set(calls) == {"cuCtxSetCurrent", "cuGraphLaunch", "cuStreamSynchronize"}
    assert calls.count("cuGraphLaunch") == 10


def test_the_next_chunk_is_queued_before_the_last_one_is_waited_for(
    on_recorder: Callable[..., tuple[Any, ...]],
) -> None:
    runtime, cuda, _ = on_recorder()
    runtime.run(_pixels(16))
    del cuda.calls[:]
    runtime.run(_pixels(16))
    first = [name for name in cuda.calls if name in ("cuGraphLaunch", "cuStreamSynchronize")]
    assert first[:3] == ["cuGraphLaunch", "cuGraphLaunch", "cuStreamSynchronize"]


def test_what_was_taken_from_the_driver_is_given_back(on_recorder: Callable[..., tuple[Any, ...]]) -> None:
    runtime, cuda, _ = on_recorder()
    runtime.run(_pixels(6))
    del runtime
    gc.collect()
    assert list(cuda.live.values()) == ["context"]  # the process's own


def test_the_gate_holds_it_to_the_probe_set_as_any_engine(
    on_recorder: Callable[..., tuple[Any, ...]], bundle: ModelBundle
) -> None:
    parity = check_parity(bundle, on_recorder()[0])
    assert (parity.engine, parity.device, parity.is_passed) == ("tensorrt", "cuda", True)


def test_an_engine_is_built_once_and_another_driver_builds_again(
    on_recorder: Callable[..., tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    real = engine_build.build_engine

    def count(*arguments: Any, **settings: Any) -> Any:
        built.append("once")
        return real(*arguments, **settings)

    monkeypatch.setattr(tensor_rt, "build_engine", count)
    first, second = on_recorder()[2], on_recorder()[2]
    assert first.loaded == second.loaded
    assert built == ["once"]
    monkeypatch.setattr(CudaDriver, "version", "999.1")
    on_recorder()
    assert built == ["once", "once"]


def test_a_call_that_fails_names_itself(on_recorder: Callable[..., tuple[Any, ...]]) -> None:
    runtime, cuda, _ = on_recorder()
    cuda.cuStreamSynchronize = lambda stream: 700
    with pytest.raises(CapabilityError, match="cuStreamSynchronize failed on the GPU: CUDA_ERROR_ILLEGAL_ADDRESS"):
        runtime.run(_pixels(1))


def test_a_copy_past_the_end_of_a_buffer_is_found_by_the_recorder() -> None:
    driver = CudaDriver(CudaRecorder())
    stream, pinned, memory = driver.stream(), driver.pinned(8), driver.memory(8)
    driver.copy_in(memory, pinned, 8, stream)
    with pytest.raises(CapabilityError, match="ILLEGAL_ADDRESS"):
        driver.copy_in(memory, pinned, 9, stream)


# --- where it does not run ------------------------------------------------------------------------------------------


def test_it_refuses_the_cpu_and_auto_leaves_it_out_there(bundle: ModelBundle) -> None:
    with pytest.raises(CapabilityError, match="does not run on cpu"):
        Classifier(bundle, "tensorrt")
    assert "tensorrt" not in candidates(bundle)
    assert candidates(bundle, "cuda") == ("onnx", "tensorrt")


def test_a_machine_without_a_driver_is_said(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno_such_driver.so.1")
    with pytest.raises(CapabilityError, match="no CUDA driver on this machine"):
        Classifier(bundle, "tensorrt", device="cuda")
    with pytest.raises(CapabilityError, match="finds no device here"):
        CudaDriver(CudaRecorder(init_code=100))


def test_embeddings_of_a_bundle_without_are_refused_before_anything_is_built(
    bundle: ModelBundle, tmp_path: Path
) -> None:
    bare = save_bundle(
        tmp_path / "bare", replace(bundle, embedding_dim=None), {"model.onnx": bundle.path / "model.onnx"}
    )
    with pytest.raises(ConfigError, match="no embedding"):
        Classifier(bare, "tensorrt", device="cuda", wants_embedding=True)


def test_without_a_build_of_the_library_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(tensor_rt_api.importlib, "import_module", missing)
    with pytest.raises(CapabilityError, match="no tensorrt; no tensorrt_rtx") as caught:
        load_library()
    assert "eagleray[tensorrt-rtx]" in caught.value.fix


# --- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [(1, 8, 32, 128), (4,), (1, 4), (8, 32)])
def test_chunks_cover_a_batch_once_in_order_and_fit_their_buckets(buckets: tuple[int, ...]) -> None:
    for count in range(300):
        found = list(pieces(count, buckets))
        at = 0
        for start, images, bucket in found:
            assert (start, bucket in buckets) == (at, True)
            assert 1 <= images <= bucket
            at += images
        assert at == count
        assert all(images == bucket for _, images, bucket in found[:-1])  # only the last is filled up
        if found:  # the last holds at least half of its bucket, unless it is the smallest there is
            _, images, bucket = found[-1]
            assert bucket <= 2 * images or bucket == min(buckets)


def test_the_cache_key_of_a_bundle_of_fixed_batch_has_that_bucket(bundle: ModelBundle) -> None:
    free = bundle.read_verified("model.onnx")
    model = parse(free, "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    fixed = model.SerializeToString()
    assert tensor_rt.settings_of(fixed).buckets == (4,)
    assert tensor_rt.settings_of(free).buckets == engine_build.BUCKETS
    keys = {tensor_rt.make_key(LIBRARY, b"", Target("8.9"), tensor_rt.settings_of(one)) for one in (fixed, free)}
    assert len({engine_cache.path_of(key) for key in keys}) == 2
