"""The JSON of an answer: one shape for one image, one for several, the same words as ``score`` writes.

The shapes are TypedDicts: plain dicts on the hot path, and the source of the OpenAPI document (openapi.py). A key that
does not apply is null, never absent, so that a typed client needs no special case.

Example:
    >>> image_answer(batch, 0, top_k=5, request_id="7c1f0a2b")["label_name"]
    'tabby, tabby cat'
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from eagleray.serving.service import Answer, Batch, ModelCard, Timing
from eagleray.vision.prediction import Prediction

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class ModelName(TypedDict):
    """The model that made an answer: its digest is ``score``'s, its policy is None where it decides nothing."""

    name: str
    version: str
    digest: str
    policy: str | None


class TimingMs(TypedDict):
    """How long an image took, in ms, and how many images the engine ran with it."""

    queue: float
    decode: float
    infer: float
    batch_size: int


class Ranked(TypedDict):
    """One label of the top-k."""

    label: str
    label_name: str
    score: float


class ImageEntry(TypedDict):
    """What the model said about one image: scored, or quarantined with a reason."""

    status: str
    reason: str | None
    detail: str
    label: str | None
    label_name: str | None
    score: float | None
    topk: list[Ranked]
    decision: str | None
    timing_ms: TimingMs


class ImageAnswer(ImageEntry):
    """The answer to a request with one image."""

    model: ModelName
    request_id: str


class BatchAnswer(TypedDict):
    """The answer to a request with several images, in their order."""

    predictions: list[ImageEntry]
    model: ModelName
    request_id: str


class EmbeddingEntry(TypedDict):
    """The embedding of one image."""

    status: str
    reason: str | None
    detail: str
    embedding: list[float] | None
    timing_ms: TimingMs


class EmbeddingAnswer(EmbeddingEntry):
    """The embedding of a request's one image."""

    model: ModelName
    request_id: str


class EmbeddingBatchAnswer(TypedDict):
    """The embeddings of a request's images, in their order."""

    embeddings: list[EmbeddingEntry]
    model: ModelName
    request_id: str


class InputSize(TypedDict):
    """The pixels that a model takes."""

    height: int
    width: int


class ModelInfo(TypedDict):
    """A model of the service."""

    name: str
    version: str
    digest: str
    policy: str | None
    is_ready: bool
    is_default: bool
    labels: list[dict[str, str]]
    input: InputSize
    embedding_dim: int | None
    max_top_k: int
    runtime: str
    precision: str
    device: str


class ModelList(TypedDict):
    """The models that a key may ask."""

    models: list[ModelInfo]


def model_name(card: ModelCard) -> ModelName:
    """The model as an answer names it."""
    return {"name": card.name, "version": card.version, "digest": card.digest, "policy": card.policy_digest}


def model_info(card: ModelCard, *, is_ready: bool, is_default: bool) -> ModelInfo:
    """The model as the list of models shows it."""
    return {
        **model_name(card),
        "is_ready": is_ready,
        "is_default": is_default,
        "labels": [label.to_json() for label in card.labels],
        "input": {"height": card.height, "width": card.width},
        "embedding_dim": card.embedding_dim,
        "max_top_k": card.max_top_k,
        "runtime": card.runtime,
        "precision": card.precision,
        "device": card.device,
    }


def image_entry(answer: Answer, card: ModelCard, *, top_k: int) -> ImageEntry:
    """What the model said about one image.

    Args:
        answer: The model's answer.
        card: The model that made it.
        top_k: How many labels it carries, at most.
    """
    said, names = answer.prediction, card.label_names
    return {
        "status": said.status,
        "reason": said.reason,
        "detail": said.detail,
        "label": said.label,
        "label_name": said.label_name,
        "score": said.score,
        "topk": [{"label": label, "label_name": names[label], "score": score} for label, score in said.topk[:top_k]],
        "decision": said.decision,
        "timing_ms": _timing(answer.timing),
    }


def image_answer(batch: Batch, position: int, *, top_k: int, request_id: str) -> ImageAnswer:
    """The answer to a request with one image.

    Args:
        batch: The model's answers.
        position: Which of them.
        top_k: How many labels it carries, at most.
        request_id: Names the request.
    """
    entry = image_entry(batch.answers[position], batch.card, top_k=top_k)
    return {**entry, "model": model_name(batch.card), "request_id": request_id}


def batch_answer(batch: Batch, *, top_k: int, request_id: str) -> BatchAnswer:
    """The answer to a request with several images: one entry an image, scored or quarantined."""
    entries = [image_entry(answer, batch.card, top_k=top_k) for answer in batch.answers]
    return {"predictions": entries, "model": model_name(batch.card), "request_id": request_id}


def embedding_answer(batch: Batch, position: int, *, request_id: str) -> EmbeddingAnswer:
    """The embedding of a request's one image."""
    entry = _embedding_entry(batch.answers[position])
    return {**entry, "model": model_name(batch.card), "request_id": request_id}


def embedding_batch_answer(batch: Batch, *, request_id: str) -> EmbeddingBatchAnswer:
    """The embeddings of a request's images."""
    entries = [_embedding_entry(answer) for answer in batch.answers]
    return {"embeddings": entries, "model": model_name(batch.card), "request_id": request_id}


def quarantined(answers: Sequence[Answer]) -> list[Prediction]:
    """The predictions of the images that could not be used."""
    return [answer.prediction for answer in answers if answer.prediction.status == "quarantined"]


def encode(value: Any) -> bytes:
    """A value as JSON: UTF-8, no spaces, no NaN."""
    return _ENCODER.encode(value).encode()


def _embedding_entry(answer: Answer) -> EmbeddingEntry:
    said = answer.prediction
    return {
        "status": said.status,
        "reason": said.reason,
        "detail": said.detail,
        "embedding": None if said.embedding is None else said.embedding.tolist(),
        "timing_ms": _timing(answer.timing),
    }


def _timing(timing: Timing) -> TimingMs:
    return {
        "queue": round(timing.queue_ms, 3),
        "decode": round(timing.decode_ms, 3),
        "infer": round(timing.infer_ms, 3),
        "batch_size": timing.batch_size,
    }
