"""ONNX Runtime: the default engine on a CPU, and on CUDA where its build has that provider."""

from __future__ import annotations

from typing import Any

import numpy as np

from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.infer.runtimes import Outputs, Uint8, check_request, check_width, run_in_chunks
from eagleray.vision.bundle import ONNX, ModelBundle
from eagleray.vision.images import normalize

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
    precision = "fp32"

    def __init__(
        self, bundle: ModelBundle, *, threads: int, device: str = "cpu", wants_embedding: bool = False
    ) -> None:
        import onnxruntime

        check_request(bundle, runtime=self.name, device=device, wants_embedding=wants_embedding)
        self.version: str = onnxruntime.__version__
        self.device = device
        self._spec = bundle.image_spec
        self._names = ["logits", "embedding"] if wants_embedding else ["logits"]
        self._session = _open(onnxruntime, bundle, threads=threads, device=device)
        self._input = self._session.get_inputs()[0].name
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
        if self._fixed_batch is not None and len(batch_u8_nhwc) != self._fixed_batch:
            return run_in_chunks(self._run, batch_u8_nhwc, self._fixed_batch)
        return self._run(batch_u8_nhwc)

    def _run(self, batch: Uint8) -> Outputs:
        results = self._session.run(self._names, {self._input: normalize(batch, self._spec)})
        flat = [np.asarray(result, np.float32).reshape(len(batch), -1) for result in results]
        return Outputs(logits=flat[0], embedding=flat[1] if len(flat) > 1 else None)


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
    tf32_off = {"use_tf32": "0"} if device == "cuda" else {}
    try:
        session = onnxruntime.InferenceSession(
            bundle.read_verified(ONNX), options, providers=[provider], provider_options=[tf32_off]
        )
    except onnxruntime.capi.onnxruntime_pybind11_state.OrtException as error:  # noqa: F841  replaced below
        raise ArtifactError(f"{bundle.name}: ONNX Runtime cannot compile model.onnx: {error}") from None
    if session.get_providers()[0] != provider:
        raise CapabilityError(f"{provider} did not start on this machine", fix="look at the driver, or use device cpu")
    return session
