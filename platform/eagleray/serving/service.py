"""What the wire formats ask of the models: one small Protocol between the HTTP side and the model side.

The HTTP side (app.py, routes_*.py) knows no engine, no queue and no Ray; the model side (models.py) knows no HTTP. An
Answer carries what the model said and how long each step took; a Batch names the very model that made all of its
answers, so that no response can mix two.

Example:
    >>> batch = await service.predict([data], Ask(model="lite0", deadline=time.monotonic() + 1.0, top_k=5))
    >>> batch.card.version, batch.answers[0].prediction.label
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from eagleray.vision.prediction import Label, Prediction

Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]
DEFAULT_TOP_K = 5
VERSION_DIGITS = 12  # of the model digest, in hex: 48 bits tell any two models of one service apart


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model as a client sees it.

    Attributes:
        name: The name in the URL.
        digest: SHA-256, in hex, of what decides its probabilities (ModelBundle.model_digest).
        labels: One for each output, in order.
        height: Of the pixels that it takes, in px.
        width: Of the pixels that it takes, in px.
        runtime: A name of RUNTIMES, or "auto" before it has been loaded.
        precision: The engine's arithmetic.
        device: Where it runs.
        policy_digest: SHA-256, in hex, of its ThresholdPolicy; None when it decides nothing.
        embedding_dim: Width of its embedding; None when it has none.
        max_top_k: How many labels an answer can carry.
        is_loaded: Whether it is in memory; one that is not is loaded when it is asked for.
    """

    name: str
    digest: str
    labels: tuple[Label, ...]
    height: int
    width: int
    runtime: str
    precision: str = "fp32"
    device: str = "cpu"
    policy_digest: str | None = None
    embedding_dim: int | None = None
    max_top_k: int = DEFAULT_TOP_K
    is_loaded: bool = True

    @property
    def version(self) -> str:
        """The version in the URL and in every answer: the digest's first digits."""
        return self.digest[:VERSION_DIGITS]

    @cached_property
    def label_names(self) -> Mapping[str, str]:
        """Label id to the name that a person reads."""
        return {label.id: label.name for label in self.labels}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a request wants of a model, besides its images.

    Attributes:
        model: The model's name.
        deadline: When the answer is of no use any more: a time of ``time.monotonic``, in s.
        top_k: How many labels each answer carries, at most.
        wants_embedding: Whether answers carry the embedding.
        wants_probabilities: Whether answers carry the probability of every label.
        request_id: Names the request in logs.
        tenant: Who asks.
    """

    model: str
    deadline: float
    top_k: int = DEFAULT_TOP_K
    wants_embedding: bool = False
    wants_probabilities: bool = False
    request_id: str = ""
    tenant: str = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long one image took, in ms: waiting for the engine, decoding, and in the batch that the engine ran."""

    queue_ms: float
    decode_ms: float
    infer_ms: float
    batch_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said about one image.

    Attributes:
        prediction: As ``score`` writes it; quarantined, with its reason, where the image cannot be used. Its top-k may
            be longer than was asked.
        timing: How long it took.
        probabilities: float32, shape (C,), of a scored image when they were asked for.
    """

    prediction: Prediction
    timing: Timing
    probabilities: Float32 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The answers to one request, in the order of its images, all by one model.

    Attributes:
        card: The model that made every one of them.
        answers: One an image.
    """

    card: ModelCard
    answers: tuple[Answer, ...]


class Service(Protocol):
    """The models of one process. Every method may raise a Refusal, which goes to the client as it is."""

    def models(self) -> Sequence[ModelCard]:
        """Every model; the first is the one that answers where none is named. Cheap: asked for with each request."""
        ...

    def is_ready(self, model: str | None = None) -> bool:
        """Whether a model, or with None the service as a whole, answers now: loaded, warm, its canary alive."""
        ...

    async def predict(self, images: Sequence[bytes], ask: Ask) -> Batch:
        """Decodes and classifies encoded images; a bad one gives a quarantined answer and harms no other.

        Raises:
            Refusal: Unknown model, no embedding to give, overloaded, or the deadline has passed.
        """
        ...

    async def infer(self, batch_u8_nhwc: Uint8, ask: Ask) -> Batch:
        """Classifies pixels that the client has preprocessed: uint8, shape (N, height, width, 3), N >= 1.

        Raises:
            Refusal: As predict.
        """
        ...
