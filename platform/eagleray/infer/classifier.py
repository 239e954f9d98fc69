"""Bytes in, typed predictions out: the one path that bulk, online and in-process answers share.

A bad image never raises: it becomes a quarantined Prediction with a reason code. A bundle with a probe set is held to
it when it is compiled on hardware that it was not seen on before (parity.py). Imports neither torch nor Ray.

Example:
    >>> classifier = Classifier("models/lite0", runtime="onnx")
    >>> classifier.predict([open("cat.jpg", "rb").read()])[0].label_name
    'tabby, tabby cat'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np

from eagleray.core.errors import ArtifactError, ConfigError
from eagleray.core.tables import resolve
from eagleray.infer.parity import require_parity
from eagleray.infer.probabilities import to_probabilities, top_k
from eagleray.infer.runtimes import RUNTIMES, Float32, Runtime, Uint8
from eagleray.vision.bundle import ModelBundle, load_bundle
from eagleray.vision.images import ImageRefused, decode
from eagleray.vision.prediction import Prediction, decide

PREDICT_BATCH = 32  # images decoded at a time by predict


@dataclass(frozen=True)
class Inference:
    """What the model gives for a batch of pixels.

    Attributes:
        probabilities: float32, shape (N, C).
        embedding: float32, shape (N, D), when it was asked for.
    """

    probabilities: Float32
    embedding: Float32 | None = None


class Classifier:
    """A bundle, compiled.

    Args:
        bundle: A loaded bundle or its folder.
        runtime: A name of RUNTIMES, or "auto": what choose_runtime measures to be fastest here.
        threads: Threads of the engine.
        device: "cpu" or "cuda".
        top_k: How many labels each prediction carries, at most.
        wants_embedding: Whether predictions carry the embedding.

    Raises:
        ConfigError: An unknown runtime or device, top_k or threads below 1, or an embedding that the bundle lacks.
        CapabilityError: The engine or the device is not here.
        ArtifactError: The bundle does not hold, or answers its probe set otherwise on this engine and machine.
    """

    def __init__(
        self,
        bundle: ModelBundle | str | Path,
        runtime: str = "auto",
        *,
        threads: int = 1,
        device: str = "cpu",
        top_k: int = 5,
        wants_embedding: bool = False,
    ) -> None:
        if min(threads, top_k) < 1:
            raise ConfigError(f"threads={threads}, top_k={top_k}", expected="1 or more of each", fix="raise them")
        self.bundle = bundle if isinstance(bundle, ModelBundle) else load_bundle(bundle)
        if runtime == "auto":
            from eagleray.infer.runtimes.measure import choose_runtime

            runtime = choose_runtime(self.bundle, threads=threads, device=device).name
        kind = resolve(RUNTIMES, runtime, what="runtime")
        self._runtime: Runtime = kind(self.bundle, threads=threads, device=device, wants_embedding=wants_embedding)
        require_parity(self.bundle, self._runtime, wants_embedding=wants_embedding)
        self._labels = [(label.id, label.name) for label in self.bundle.labels]
        self._top_k = min(top_k, len(self._labels))
        self._digest = self.bundle.model_digest

    @property
    def top_k(self) -> int:
        """How many labels each prediction carries."""
        return self._top_k

    @property
    def runtime_name(self) -> str:
        """The runtime's name in RUNTIMES."""
        return self._runtime.name

    @property
    def runtime_version(self) -> str:
        """The engine's version."""
        return self._runtime.version

    @property
    def precision(self) -> str:
        """The engine's arithmetic."""
        return self._runtime.precision

    @property
    def device(self) -> str:
        """Where it runs."""
        return self._runtime.device

    def predict(self, images: Sequence[bytes]) -> list[Prediction]:
        """Decodes and classifies; one prediction for each image, in order.

        Args:
            images: Encoded images (JPEG, PNG, ...).
        """
        predictions: list[Prediction] = []
        for start in range(0, len(images), PREDICT_BATCH):
            predictions += self._predict_batch(images[start : start + PREDICT_BATCH])
        return predictions

    def infer(self, batch_u8_nhwc: Uint8) -> Inference:
        """Runs the model on pixels.

        Args:
            batch_u8_nhwc: uint8, shape (N, H, W, 3), as images.decode gives for the bundle's ImageSpec.

        Raises:
            ArtifactError: The model's answers are not finite numbers.
        """
        if not len(batch_u8_nhwc):
            empty = np.zeros((0, len(self._labels)), np.float32)
            return Inference(empty, np.zeros((0, self.bundle.embedding_dim or 0), np.float32))
        outputs = self._runtime.run(batch_u8_nhwc)
        is_finite = np.isfinite(outputs.logits).all()
        if not is_finite:
            raise ArtifactError(
                f"the model of {self.bundle.name} gives values that are not finite",
                expected="finite outputs for every picture",
                fix="train or import the model again",
            )
        return Inference(to_probabilities(outputs.logits, self.bundle.output), outputs.embedding)

    def predictions(self, probabilities: Float32, embedding: Float32 | None = None) -> list[Prediction]:
        """Says probabilities as predictions: label, top-k, decision.

        Args:
            probabilities: float32, shape (N, C).
            embedding: float32, shape (N, D), or None.
        """
        order, scores = top_k(probabilities, self._top_k)
        decisions = decide(self.bundle.policy, self.bundle.label_ids, probabilities)
        half = repeat(None) if embedding is None else embedding.astype(np.float16)
        labels, digest = self._labels, self._digest
        return [
            Prediction(
                status="scored",
                label=labels[indices[0]][0],
                label_name=labels[indices[0]][1],
                score=values[0],
                topk=tuple((labels[index][0], value) for index, value in zip(indices, values, strict=True)),
                decision=decision,
                embedding=vector,
                model_digest=digest,
            )
            for indices, values, decision, vector in zip(order.tolist(), scores.tolist(), decisions, half, strict=False)
        ]

    def refuse(self, refusal: ImageRefused) -> Prediction:
        """The prediction of an image that cannot be decoded."""
        return Prediction(
            status="quarantined", reason=str(refusal.reason), detail=refusal.detail, model_digest=self._digest
        )

    def _predict_batch(self, images: Sequence[bytes]) -> list[Prediction]:
        spec = self.bundle.image_spec
        batch = np.empty((len(images), spec.height, spec.width, 3), np.uint8)
        refusals: dict[int, Prediction] = {}
        filled = 0
        for position, data in enumerate(images):
            try:
                decode(data, spec, out=batch[filled])
            except ImageRefused as refusal:
                refusals[position] = self.refuse(refusal)
            else:
                filled += 1
        inference = self.infer(batch[:filled])
        scored = iter(self.predictions(inference.probabilities, inference.embedding))
        return [refusals.get(position) or next(scored) for position in range(len(images))]
