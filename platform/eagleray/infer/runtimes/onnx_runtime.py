"""ONNX Runtime: the default engine on a CPU, and on CUDA where its build has that provider."""

from __future__ import annotations

from typing import Any

import numpy as np

from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.infer.runtimes import CHUNK, RUNTIMES, Float32, Outputs, Uint8, check_request, check_width, run_in_chunks
from eagleray.vision.bundle import ONNX, ModelBundle
from eagleray.vision.images import normalize
from eagleray.vision.onnx_graph import IMAGE

NOWHERE = "/nonexistent/eagleray"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime:
    """A bundle's model.onnx in ONNX Runtime.

    Args:
        bundle: A bundle that holds model.onnx.
        threads: Threads of the one operator that runs at a time.
        device: "cpu" or "cuda".
        wants_embedding: Whether run gives the embedding too.

    Raises:
        ArtifactError: The graph cannot be compiled, or its width does not fit the labels.
        CapabilityError: CUDA is asked for and this build or machine has none.
        ConfigError: The bundle gives no embedding and it is wanted.
    """

    name = "onnx"

    def __init__(
        self, bundle: ModelBundle, *, threads: int, device: str = "cpu", wants_embedding: bool = False
    ) -> None:
        import onnxruntime

        check_request(bundle, runtime=self.name, device=device, wants_embedding=wants_embedding)
        self.version = RUNTIMES[self.name].version
        self.precision: str = bundle.precision
        self.device = device
        self._spec = bundle.image_spec
        self._names = ["logits", "embedding"] if wants_embedding else ["logits"]
        self._session = _open(onnxruntime, bundle, threads=threads, device=device)
        # One float32 buffer, used again: fresh memory for each batch costs page faults, 10 to 25 % of a light model.
        # Normalising into it is as fast as Cast, Mul and Add in the graph (714 and 653 img/s, MobileNetV3-small-0.5).
        self._buffer: Float32 | None = None
        self._takes_pixels = self._session.get_inputs()[0].type == "tensor(uint8)"  # it normalises them itself
        batch = self._session.get_inputs()[0].shape[0]
        self._fixed_batch = batch if isinstance(batch, int) else None
        width = self._session.get_outputs()[0].shape[-1]
        if isinstance(width, int):
            check_width(bundle, width)

    def run(self, batch_u8_nhwc: Uint8) -> Outputs:
        """Runs a batch.

        Args:
            batch_u8_nhwc: uint8, shape (N, H, W, 3).

        Returns:
            float32 logits (N, C) and, when wanted, embedding (N, D).
        """
        if self._fixed_batch is not None:
            return run_in_chunks(self._run, batch_u8_nhwc, self._fixed_batch, is_exact=True)
        if self.device != "cpu":
            return self._run(batch_u8_nhwc)
        return run_in_chunks(self._run, batch_u8_nhwc, CHUNK)

    def _run(self, batch: Uint8) -> Outputs:
        x = np.ascontiguousarray(batch) if self._takes_pixels else self._normalized(batch)
        flat = [
            np.asarray(one, np.float32).reshape(len(batch), -1) for one in self._session.run(self._names, {IMAGE: x})
        ]
        return Outputs(logits=flat[0], embedding=flat[1] if len(flat) > 1 else None)

    def _normalized(self, batch: Uint8) -> Float32:
        if self._buffer is None or len(self._buffer) < len(batch):
            spec = self._spec
            self._buffer = np.empty((len(batch), 3, spec.height, spec.width), np.float32)
        return normalize(batch, self._spec, self._buffer[: len(batch)])


def _open(onnxruntime: Any, bundle: ModelBundle, *, threads: int, device: str) -> Any:
    """The session, compiled from the very bytes whose digest was checked."""
    provider = PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise CapabilityError(
            f"this onnxruntime {onnxruntime.__version__} has no {provider}",
            expected=f"one of {', '.join(onnxruntime.get_available_providers())}",
            fix="pip install onnxruntime-gpu in place of onnxruntime, or ask for --runtime torch",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A model from memory has no folder: tensors in other files are refused, not looked for beside the process
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", NOWHERE)
    tf32_off = {"use_tf32": "0"} if device == "cuda" else {}
    state = onnxruntime.capi.onnxruntime_pybind11_state
    refusals = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented)
    try:
        session = onnxruntime.InferenceSession(
            bundle.read_verified(ONNX), options, providers=[provider], provider_options=[tf32_off]
        )
    except refusals as error:
        raise ArtifactError(
            f"{bundle.name}: ONNX Runtime cannot compile {ONNX}: {str(error).strip().splitlines()[0][:300]}",
            expected="a single-file graph of operators that ONNX Runtime knows",
            fix="export and import the model again",
        ) from None
    if session.get_providers()[0] != provider:
        raise CapabilityError(f"{provider} did not start on this machine", fix="look at the driver, or use device cpu")
    return session
