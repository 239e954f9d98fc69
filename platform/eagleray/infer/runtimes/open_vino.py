"""OpenVINO: the fastest engine on many CPUs. Pinning is off: two processes pinned to one core run at half speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.infer.runtimes import CHUNK, RUNTIMES, Outputs, Uint8, check_request, check_width, run_in_chunks
from eagleray.vision.bundle import ONNX, ModelBundle
from eagleray.vision.onnx_graph import parse


class OpenVino:
    """A bundle's model.onnx in OpenVINO, on the CPU.

    Whole chunks run in a graph of fixed batch, 9 to 14 % faster than a dynamic one (measured: MobileNetV3-small-0.5);
    what is left over runs in a dynamic one. Each is compiled when first needed.

    Args:
        bundle: A bundle that holds model.onnx.
        threads: Threads of the one stream.
        device: "cpu".
        wants_embedding: Whether run gives the embedding too.
        ir: Take the graph of this .xml, which write_ir made of the bundle, in place of model.onnx.

    Raises:
        ArtifactError: The graph cannot be compiled, or its width does not fit the labels.
        CapabilityError: Another device than the CPU is asked for.
        ConfigError: The bundle gives no embedding and it is wanted.
    """

    name = "openvino"
    device = "cpu"

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        threads: int,
        device: str = "cpu",
        wants_embedding: bool = False,
        ir: Path | None = None,
    ) -> None:
        import openvino

        check_request(bundle, runtime=self.name, device=device, wants_embedding=wants_embedding)
        if device != "cpu":
            raise CapabilityError(
                f"runtime 'openvino' does not run on {device}", expected="cpu", fix="ask for --runtime torch or onnx"
            )
        self.version = RUNTIMES[self.name].version
        self.precision: str = bundle.precision
        self._bundle = bundle
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._names = ["logits", "embedding"] if wants_embedding else ["logits"]
        self._core = openvino.Core()
        source: bytes | Path = ir or bundle.read_verified(ONNX)
        if isinstance(source, bytes):
            parse(source, f"{bundle.name}/{ONNX}")  # OpenVINO itself would read external data from anywhere (tried)
        self._model = _with_preprocessing(self._core, source, bundle)
        batch = self._model.input(0).partial_shape[0]
        self._fixed_batch = None if batch.is_dynamic else int(batch.get_length())
        self._requests: dict[int, Any] = {}
        width = self._model.output("logits").partial_shape[1]
        if width.is_static:
            check_width(bundle, int(width.get_length()))

    def run(self, batch_u8_nhwc: Uint8) -> Outputs:
        """Runs a batch.

        Args:
            batch_u8_nhwc: uint8, shape (N, H, W, 3).

        Returns:
            float32 logits (N, C) and, when wanted, embedding (N, D).
        """
        if self._fixed_batch is not None:
            return run_in_chunks(self._run, batch_u8_nhwc, self._fixed_batch, is_exact=True)
        return run_in_chunks(self._run, batch_u8_nhwc, CHUNK)

    def _run(self, batch: Uint8) -> Outputs:
        results = self._request(len(batch)).infer({0: batch}, share_inputs=True, share_outputs=True)
        flat = [np.array(results[name], np.float32).reshape(len(batch), -1) for name in self._names]
        return Outputs(logits=flat[0], embedding=flat[1] if len(flat) > 1 else None)

    def _request(self, num_images: int) -> Any:
        """The compiled graph for a batch of this size: its own for CHUNK, a dynamic one (key 0) for the rest."""
        key = num_images if num_images in (CHUNK, self._fixed_batch) else 0
        if key not in self._requests:
            model = self._model.clone()
            if self._fixed_batch is None:
                spec = self._bundle.image_spec
                model.reshape([key or -1, spec.height, spec.width, 3])
            try:
                compiled = self._core.compile_model(model, "CPU", self._settings)
            except RuntimeError as error:
                raise _cannot_compile(self._bundle, error) from None
            self._requests[key] = compiled.create_infer_request()
        return self._requests[key]


def write_ir(data: bytes, bundle: ModelBundle, path: Path) -> None:
    """Writes an ONNX file as OpenVINO IR: FP32 stays FP32, INT8 its Q/DQ pairs; the metadata stands in the .xml.

    Args:
        data: An ONNX file of ours.
        bundle: Whose it is, for messages.
        path: The .xml; its weights go beside it as .bin.

    Raises:
        ArtifactError: OpenVINO cannot read it.
    """
    import openvino

    metadata = {one.key: one.value for one in parse(data, f"{bundle.name}/{ONNX}").metadata_props}
    try:
        model = openvino.Core().read_model(data)
        for key, value in metadata.items():
            model.set_rt_info(value, ["eagleray", key])
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise _cannot_compile(bundle, error) from None


def _with_preprocessing(core: Any, data: bytes | Path, bundle: ModelBundle) -> Any:
    """The graph with images.normalize in front: uint8 NHWC in."""
    from openvino import Layout, Type
    from openvino.preprocess import PrePostProcessor

    scale, bias = bundle.image_spec.scale_and_bias
    try:
        model = core.read_model(data)
        if model.input(0).get_element_type() == Type.u8:  # an export with its own preprocessing
            return model
        steps = PrePostProcessor(model)
        steps.input().tensor().set_element_type(Type.u8).set_layout(Layout("NHWC"))
        steps.input().model().set_layout(Layout("NCHW"))
        steps.input().preprocess().convert_element_type(Type.f32).mean([float(one) for one in -bias / scale]).scale(
            [float(one) for one in 1.0 / scale]
        )
        return steps.build()
    except RuntimeError as error:
        raise _cannot_compile(bundle, error) from None


def _cannot_compile(bundle: ModelBundle, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{bundle.name}: OpenVINO cannot compile {ONNX}: {str(error).strip().splitlines()[-1][:200]}",
        expected="a graph of operators that OpenVINO knows",
        fix="score it with --runtime onnx",
    )
