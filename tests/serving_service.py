"""A Service around real classifiers, without queue or batcher: what the HTTP side is tested with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from eagleray.infer.classifier import Classifier
from eagleray.infer.runtimes import Uint8
from eagleray.serving.passport import Passport
from eagleray.serving.service import Answer, Ask, Batch, ModelCard, Timing
from eagleray.vision.images import ImageRefused, decode
from starlette.types import Scope

TIMING = Timing(queue_ms=0.25, decode_ms=0.5, infer_ms=1.0)


@dataclass
class DirectService:
    """Answers at once, in the caller's thread.

    Attributes:
        classifiers: Name to classifier; the first is the default.
        asked: Every Ask that came.
        wait: When set, predict waits for it.
        cancelled: How many calls were given up.
    """

    classifiers: dict[str, Classifier]
    asked: list[Ask] = field(default_factory=list)
    is_up: bool = True
    wait: asyncio.Event | None = None
    fault: BaseException | None = None
    cancelled: int = 0

    def models(self) -> Sequence[ModelCard]:
        return [card_of(name, classifier) for name, classifier in self.classifiers.items()]

    def is_ready(self, model: str | None = None) -> bool:
        return self.is_up

    async def predict(self, images: Sequence[bytes], ask: Ask) -> Batch:
        await self._enter(ask)
        classifier = self.classifiers[ask.model]
        spec = classifier.bundle.image_spec
        answers = []
        for data in images:
            try:
                pixels = decode(data, spec)
            except ImageRefused as refusal:
                answers.append(Answer(prediction=classifier.refuse(refusal), timing=TIMING))
            else:
                answers += self._infer(classifier, pixels[None], ask)
        return Batch(card=card_of(ask.model, classifier), answers=tuple(answers))

    async def infer(self, batch_u8_nhwc: Uint8, ask: Ask) -> Batch:
        await self._enter(ask)
        classifier = self.classifiers[ask.model]
        answers = self._infer(classifier, batch_u8_nhwc, ask)
        return Batch(card=card_of(ask.model, classifier), answers=tuple(answers))

    async def _enter(self, ask: Ask) -> None:
        self.asked.append(ask)
        if self.fault is not None:
            raise self.fault
        if self.wait is not None:
            try:
                await self.wait.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    def _infer(self, classifier: Classifier, batch: Uint8, ask: Ask) -> list[Answer]:
        inference = classifier.infer(batch)
        # The tiny model has no embedding: one is made of its probabilities, so that every path has something to carry
        embedding = np.asarray(inference.probabilities, np.float32) if ask.wants_embedding else None
        return [
            Answer(prediction=prediction, timing=TIMING, probabilities=row if ask.wants_probabilities else None)
            for prediction, row in zip(
                classifier.predictions(inference.probabilities, embedding), inference.probabilities, strict=True
            )
        ]


def card_of(name: str, classifier: Classifier) -> ModelCard:
    bundle = classifier.bundle
    return ModelCard(
        name=name,
        digest=bundle.model_digest,
        labels=bundle.labels,
        height=bundle.image_spec.height,
        width=bundle.image_spec.width,
        runtime=classifier.runtime_name,
        policy_digest=bundle.policy.digest if bundle.policy else None,
        embedding_dim=None if name == "plain" else len(bundle.labels),
        max_top_k=classifier.top_k,
    )


def direct_service(*bundles: Path, names: Sequence[str] = ("tiny", "other", "plain")) -> DirectService:
    """A service of bundles; the one named "plain" has no embedding."""
    return DirectService({name: Classifier(path, "onnx") for name, path in zip(names, bundles, strict=False)})


def local_passport(scope: Scope) -> Passport:
    """Anybody may do everything."""
    return Passport(tenant="local", request_id="request-1")
