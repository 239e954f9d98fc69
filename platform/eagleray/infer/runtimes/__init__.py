"""RUNTIMES: what compiles, loads and runs a bundle. One law for all: same probabilities (|dp| <= 1e-4), same top-1.

A runtime takes uint8 pixels, NHWC, in the colour order of the bundle's ImageSpec, and normalises them itself: in the
engine's graph, where it costs less than a pass in numpy. Threads are explicit; nothing falls back in silence.

Example:
    >>> runtime = resolve(RUNTIMES, "onnx", what="runtime")(bundle, threads=1)
    >>> runtime.run(batch_u8_nhwc).logits.shape
    (8, 1000)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from eagleray.core.errors import ArtifactError, ConfigError
from eagleray.core.tables import Entry
from eagleray.vision.bundle import ModelBundle

Uint8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

RUNTIMES = {
    "torch": Entry("eagleray.infer.runtimes.torch_eager:TorchEager", needs="torch"),
    "onnx": Entry("eagleray.infer.runtimes.onnx_runtime:OnnxRuntime", extra="onnx", needs="onnxruntime"),
    "openvino": Entry("eagleray.infer.runtimes.open_vino:OpenVino", extra="openvino", needs="openvino"),
    "tensorrt": Entry(
        "eagleray.infer.runtimes.tensor_rt:TensorRt", extra="tensorrt-rtx", needs="tensorrt", instead="tensorrt_rtx"
    ),
}
DEVICES = ("cpu", "cuda")
CHUNK = 8  # images a CPU engine takes at a time: 4.8 MB of float32 at 224 px; 4 to 32 differ by under 7 % (measured)


@dataclass(frozen=True)
class Outputs:
    """What a runtime gives for a batch.

    Attributes:
        logits: float32, shape (N, C): the model's first output (probabilities when the bundle says so).
        embedding: float32, shape (N, D), when it was asked for.
    """

    logits: Float32
    embedding: Float32 | None = None


class Runtime(Protocol):
    """One way to run a bundle."""

    def __init__(
        self, bundle: ModelBundle, *, threads: int, device: str = "cpu", wants_embedding: bool = False
    ) -> None:
        """Compiles the bundle's weights."""

    @property
    def name(self) -> str:
        """The entry's name in RUNTIMES."""

    @property
    def version(self) -> str:
        """The engine's version."""

    @property
    def precision(self) -> str:
        """The arithmetic: the bundle's precision."""

    @property
    def device(self) -> str:
        """Where it runs: "cpu" or "cuda"."""

    def run(self, batch_u8_nhwc: Uint8) -> Outputs:
        """Runs a batch, uint8 (N, H, W, 3)."""


def check_request(bundle: ModelBundle, *, runtime: str, device: str, wants_embedding: bool) -> None:
    """Refuses what a bundle or a runtime cannot give.

    Raises:
        ConfigError: An unknown device, or embeddings of a bundle that has none.
    """
    if device not in DEVICES:
        raise ConfigError(f"unknown device {device!r}", expected=f"one of {', '.join(DEVICES)}", fix="name another")
    if wants_embedding and bundle.embedding_dim is None:
        raise ConfigError(
            f"the model {bundle.name} gives no embedding, so runtime {runtime!r} cannot",
            expected="a bundle whose embedding_dim is set",
            fix="leave --embeddings out, or import the model from timm",
        )


def check_width(bundle: ModelBundle, width: int) -> None:
    """Refuses a model whose output does not fit the bundle's labels.

    Raises:
        ArtifactError: With both numbers.
    """
    if width != len(bundle.labels):
        raise ArtifactError(
            f"the model of {bundle.name} gives {width} outputs for {len(bundle.labels)} labels",
            expected="one label for each output",
            fix="import the model again with the right --labels",
        )


def run_in_chunks(run: Callable[[Uint8], Outputs], batch: Uint8, size: int, *, is_exact: bool = False) -> Outputs:
    """Runs a batch in pieces that stay in the processor's cache.

    Args:
        run: Takes uint8 (n, H, W, 3), n <= size.
        batch: uint8 (N, H, W, 3), N >= 1.
        size: Images in a piece.
        is_exact: The engine takes exactly ``size`` images: the last piece is filled up with zeros.
    """
    if len(batch) == size or (len(batch) < size and not is_exact):
        return run(batch)
    parts = []
    for start in range(0, len(batch), size):
        chunk = batch[start : start + size]
        if is_exact and len(chunk) < size:
            chunk = np.concatenate([chunk, np.zeros((size - len(chunk), *chunk.shape[1:]), np.uint8)])
        parts.append(run(chunk))
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    return Outputs(
        logits=np.concatenate([part.logits for part in parts])[: len(batch)],
        embedding=np.concatenate(embeddings)[: len(batch)] if embeddings else None,
    )
