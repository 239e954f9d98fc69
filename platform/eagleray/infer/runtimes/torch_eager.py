"""PyTorch, eager: the reference that the other runtimes are held to, and the engine on CUDA."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from eagleray.core.errors import ArtifactError, CapabilityError, ConfigError
from eagleray.infer.runtimes import CHUNK, RUNTIMES, Outputs, Uint8, check_request, check_width, run_in_chunks
from eagleray.vision.backbones import Backbone, WithEmbedding, create
from eagleray.vision.bundle import ONNX, SAFETENSORS, ModelBundle
from eagleray.vision.state_dicts import fill, read_state_dict


class TorchEager:
    """A bundle's model.safetensors in its timm architecture.

    Pixels cross to the device as uint8 from pinned memory and are normalised there.

    Args:
        bundle: A bundle of a timm architecture that holds model.safetensors.
        threads: Threads of the operators on the CPU; torch has one such setting for the process.
        device: "cpu" or "cuda".
        wants_embedding: Whether run gives the embedding too.

    Raises:
        ArtifactError: The weights do not fit the architecture, or its width does not fit the labels.
        CapabilityError: CUDA is asked for and this build or machine has none.
        ConfigError: The bundle is fp16 or int8, has no model.safetensors, or gives no embedding and it is wanted.
    """

    name = "torch"
    precision = "fp32"

    def __init__(
        self, bundle: ModelBundle, *, threads: int, device: str = "cpu", wants_embedding: bool = False
    ) -> None:
        check_request(bundle, runtime=self.name, device=device, wants_embedding=wants_embedding)
        if bundle.precision != self.precision:
            raise ConfigError(
                f"runtime 'torch' runs fp32 weights, and {bundle.name} is {bundle.precision}: its arithmetic stands in "
                f"the graph of {ONNX}, and the architecture in fp32 would give other answers",
                expected="an fp32 bundle of a timm model",
                fix="ask for --runtime onnx or openvino",
            )
        if SAFETENSORS not in bundle.files:
            raise ConfigError(
                f"runtime 'torch' needs {SAFETENSORS}, which the bundle {bundle.name} lacks",
                expected="a bundle of a timm model",
                fix="ask for --runtime onnx or openvino",
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise CapabilityError(
                f"this torch {torch.__version__} finds no CUDA device",
                expected="a CUDA build of torch and a working driver",
                fix="install torch for this machine's CUDA, or use the CPU",
            )
        self.version = RUNTIMES[self.name].version
        self.device = device
        self._wants_embedding = wants_embedding
        torch.set_num_threads(threads)
        with contextlib.suppress(RuntimeError):  # it can be set once in a process
            torch.set_num_interop_threads(1)
        if device == "cuda":  # fp32 means fp32: TF32 would break the parity law
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        scale, bias = bundle.image_spec.scale_and_bias
        self._scale = torch.from_numpy(scale).view(1, 3, 1, 1).to(device)
        self._bias = torch.from_numpy(bias).view(1, 3, 1, 1).to(device)
        self._model = load_model(bundle).to(device, memory_format=torch.channels_last)
        check_width(bundle, int(self._model.model.num_classes))

    def run(self, batch_u8_nhwc: Uint8) -> Outputs:
        """Runs a batch.

        Args:
            batch_u8_nhwc: uint8, shape (N, H, W, 3).

        Returns:
            float32 logits (N, C) and, when wanted, embedding (N, D).
        """
        if self.device == "cuda":
            return self._run(batch_u8_nhwc)
        return run_in_chunks(self._run, batch_u8_nhwc, CHUNK)

    def _run(self, batch: Uint8) -> Outputs:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.ascontiguousarray(batch))
            if self.device == "cuda":
                pixels = pixels.pin_memory().to(self.device, non_blocking=True)
            # NHWC bytes seen as NCHW are channels_last already: no copy
            x = pixels.permute(0, 3, 1, 2).to(torch.float32).mul_(self._scale).add_(self._bias)
            logits, embedding = self._model(x)
            return Outputs(
                logits=logits.float().cpu().numpy(),
                embedding=embedding.float().cpu().numpy() if self._wants_embedding else None,
            )


def load_model(bundle: ModelBundle) -> WithEmbedding:
    """The architecture with the bundle's weights, from the very bytes whose digest was checked; in eval mode."""
    try:
        model = create(Backbone(name=bundle.architecture, num_classes=len(bundle.labels), model_args=bundle.model_args))
    except ConfigError as error:
        raise ArtifactError(
            f"the bundle {bundle.name} cannot be made: {error.seen}",
            expected=error.expected,
            fix="import the model again",
        ) from error
    fill(model, read_state_dict(bundle.read_verified(SAFETENSORS), SAFETENSORS), SAFETENSORS)
    return WithEmbedding(model).eval()
