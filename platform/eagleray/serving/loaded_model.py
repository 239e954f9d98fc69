"""One model in memory: its engines, the queue before them, and the way from bytes to answers.

The answers are those of ``score``: the same decoder, the same Classifier, the same policy. All buckets are run once
before the first request, so that none pays for a compilation. A model never changes: another one is another object.

Example:
    >>> model = load_model(entry, load_bundle(entry.bundle), decoder, batching=BatchingConfig())
    >>> (answer,) = await model.predict([data], Ask(model="lite0", deadline=time.monotonic() + 1.0))
    >>> answer.prediction.label
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eagleray.infer.classifier import Classifier
from eagleray.infer.probabilities import top_k
from eagleray.serving.batcher import Batcher, Clock, DeadlinePassed, Done, Ticket
from eagleray.serving.decoding import Decoder
from eagleray.serving.run_times import BusyShare
from eagleray.serving.service import Answer, Ask, Float32, ModelCard, Timing, Uint8
from eagleray.serving.settings import BatchingConfig, ModelEntry
from eagleray.serving.telemetry import DECODE, MODEL, QUEUE_DELAY, QUEUED, UTILIZATION, Meter, NullMeter
from eagleray.vision.bundle import ModelBundle
from eagleray.vision.images import ImageRefused
from eagleray.vision.prediction import Prediction

MOST_TOP_K = 100  # labels of one answer
READY_TOP_K = 5  # what is made with every batch: a longer list is made for those who ask
CPU_RAMP = 8  # sizes up to this are warmed one by one on a CPU: OpenVINO compiles kernels for each shape it meets


@dataclass(frozen=True, slots=True)
class Row:
    """What the engine gave for one image."""

    prediction: Prediction
    probabilities: Float32
    embedding: Float32 | None


Place = Ticket[Uint8, Row]


def card_of(entry: ModelEntry, bundle: ModelBundle, classifier: Classifier | None = None) -> ModelCard:
    """A model as a client sees it.

    Args:
        entry: Its entry.
        bundle: Its bundle.
        classifier: Compiled from the bundle; None while it is not in memory.
    """
    spec = bundle.image_spec
    return ModelCard(
        name=entry.name,
        digest=bundle.model_digest,
        labels=bundle.labels,
        height=spec.height,
        width=spec.width,
        runtime=classifier.runtime_name if classifier else entry.runtime,
        precision=bundle.precision,
        device=entry.device,
        policy_digest=bundle.policy.digest if bundle.policy else None,
        embedding_dim=bundle.embedding_dim,
        max_top_k=min(MOST_TOP_K, len(bundle.labels)),
        is_loaded=classifier is not None,
    )


def load_model(
    entry: ModelEntry,
    bundle: ModelBundle,
    decoder: Decoder,
    *,
    batching: BatchingConfig,
    meter: Meter | None = None,
    clock: Clock = time.monotonic,
) -> LoadedModel:
    """Compiles a model's engines, holds them to the probe set, and runs every bucket once.

    Args:
        entry: Runtime, device, threads, engines.
        bundle: As it was loaded and checked.
        decoder: Shared by all models of a process.
        batching: Buckets.
        meter: Counts.
        clock: Gives seconds.

    Raises:
        ArtifactError: The bundle's files have changed, or an engine answers its probe set otherwise.
        CapabilityError: The engine or the device is not here.
    """
    classifiers: list[Classifier] = []
    for _ in range(entry.engines):
        classifiers.append(
            Classifier(
                bundle,
                classifiers[0].runtime_name if classifiers else entry.runtime,
                threads=entry.threads,
                device=entry.device,
                top_k=READY_TOP_K,
                wants_embedding=bundle.embedding_dim is not None,
            )
        )
    model = LoadedModel(entry, classifiers, decoder, batching=batching, meter=meter, clock=clock)
    model.warm()
    return model


class LoadedModel:
    """A model that answers.

    Args:
        entry: Its entry.
        classifiers: One an engine, all of one bundle and runtime.
        decoder: Shared by all models of a process.
        batching: Buckets.
        meter: Counts.
        clock: Gives seconds.

    Attributes:
        card: What a client sees.
        bundle: The bundle.
        batcher: The queue before the engines.
    """

    def __init__(
        self,
        entry: ModelEntry,
        classifiers: Sequence[Classifier],
        decoder: Decoder,
        *,
        batching: BatchingConfig,
        meter: Meter | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.name, self.bundle = entry.name, classifiers[0].bundle
        self.card = card_of(entry, self.bundle, classifiers[0])
        self._classifiers, self._decoder, self._clock = tuple(classifiers), decoder, clock
        self._buckets, self._meter = batching.sizes(entry.device), meter or NullMeter()
        self._is_padded = entry.device == "cuda"  # a shape that CUDA has not met costs a search for kernels
        self.batcher: Batcher[Uint8, Row] = Batcher(
            [_Engine(classifier, self._buckets, is_padded=self._is_padded) for classifier in classifiers],
            buckets=self._buckets,
            model=self.name,
            clock=clock,
            meter=self._meter,
        )
        self._busy = BusyShare(self.batcher, clock)

    def warm(self) -> None:
        """Runs every bucket once in every engine, and learns how long each takes; before the first request."""
        spec = self.bundle.image_spec
        sizes = {*self._buckets, *(() if self._is_padded else range(1, min(CPU_RAMP, self._buckets[-1]) + 1))}
        for classifier in self._classifiers:
            for size in sorted(sizes):
                blank = np.zeros((size, spec.height, spec.width, 3), np.uint8)
                classifier.infer(blank)
                started = self._clock()
                classifier.predictions(classifier.infer(blank).probabilities)
                self.batcher.times.learn(size, self._clock() - started)

    def tell(self, *, is_loaded: bool = True) -> None:
        """Sets the model's gauges; once it is put away to 0, until Ray drops a gauge that nobody tells."""
        card = self.card
        version, runtime, precision = card.version, card.runtime, card.precision
        self._meter.set(MODEL, float(is_loaded), model=self.name, version=version, runtime=runtime, precision=precision)
        self._meter.set(QUEUED, float(self.batcher.queued), model=self.name)
        self._meter.set(QUEUE_DELAY, self.queue_delay_s() if is_loaded else 0.0, model=self.name)
        self._meter.set(UTILIZATION, self.utilization() if is_loaded else 0.0, model=self.name)

    async def predict(self, images: Sequence[bytes], ask: Ask) -> tuple[Answer, ...]:
        """Decodes and classifies; one answer an image, in order, quarantined where it cannot be used.

        Raises:
            DeadlinePassed: They were not all answered in time.
            Closed: The model is being put away.
        """

        def put(data: bytes, ticket: Place) -> None:
            self._decoder.put(data, self.bundle.image_spec, ticket, self.batcher.enter)

        tickets: list[Place] = []
        try:
            for data in images:
                ticket = self.batcher.ticket(ask.deadline)
                tickets.append(ticket)
                put(data, ticket)
            return await self._answers(tickets, ask)
        finally:
            _leave(tickets)

    async def infer(self, batch_u8_nhwc: Uint8, ask: Ask, *, is_urgent: bool = False) -> tuple[Answer, ...]:
        """Classifies pixels.

        Args:
            batch_u8_nhwc: uint8, shape (N, height, width, 3), as the bundle's ImageSpec gives them.
            ask: What is wanted.
            is_urgent: They go before all that waits: a canary's.

        Raises:
            DeadlinePassed, Closed: As predict.
        """
        tickets: list[Place] = []
        try:
            for pixels in batch_u8_nhwc:
                ticket = self.batcher.ticket(ask.deadline)
                tickets.append(ticket)
                self.batcher.enter(ticket, pixels, is_urgent=is_urgent)
            return await self._answers(tickets, ask)
        finally:
            _leave(tickets)

    def baseline(self, batch_u8_nhwc: Uint8) -> Float32:
        """Probabilities (N, C) straight from the first engine: before the first request, or it is used by two threads.

        Args:
            batch_u8_nhwc: uint8, shape (N, height, width, 3).
        """
        return self._classifiers[0].infer(batch_u8_nhwc).probabilities

    def longest_s(self) -> float:
        """How long the batch that has been in an engine longest is there."""
        return self.batcher.longest_s()

    def queue_delay_s(self) -> float:
        """The wait that a new image would have, estimated: the longer of the two queues, as they drain side by side."""
        return max(self._decoder.delay_s(), self.batcher.queue_delay_s())

    def utilization(self) -> float:
        """Share of the time in which the engines ran lately, 0..1."""
        return self._busy.share()

    async def drain(self, timeout_s: float) -> bool:
        """Answers what it was given, takes no more, and lets the engines go.

        Returns:
            Whether all was answered in time; what was not is refused.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self.batcher.drain()
        except TimeoutError:
            self.batcher.close()
            return False
        return True

    def close(self) -> None:
        """Ends it now; what waits is refused."""
        self.batcher.close()

    async def _answers(self, tickets: Sequence[Place], ask: Ask) -> tuple[Answer, ...]:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, ask.deadline - self._clock()), _expire, tickets)
        try:
            return tuple([await self._answer(ticket, ask) for ticket in tickets])
        finally:
            timer.cancel()

    async def _answer(self, ticket: Place, ask: Ask) -> Answer:
        try:
            done = await ticket.future
        except ImageRefused as refused:
            refused.__traceback__ = None  # it, this frame and the ticket would keep one another until collected
            return Answer(prediction=self._classifiers[0].refuse(refused), timing=self._timing(ticket, None))
        row = done.value
        return Answer(
            prediction=self._asked(row, ask),
            timing=self._timing(ticket, done),
            probabilities=row.probabilities if ask.wants_probabilities else None,
        )

    def _timing(self, ticket: Place, done: Done[Row] | None) -> Timing:
        """How long an image waited, was decoded and ran; one that was refused did not run."""
        if ticket.prepared_s:
            self._meter.observe(DECODE, ticket.prepared_s, model=self.name)
        if done is None:
            return Timing(queue_ms=0.0, decode_ms=1000 * ticket.prepared_s, infer_ms=0.0, batch_size=0)
        return Timing(
            queue_ms=1000 * max(0.0, done.started - ticket.made - ticket.prepared_s),
            decode_ms=1000 * ticket.prepared_s,
            infer_ms=1000 * done.run_s,
            batch_size=done.batch_size,
        )

    def _asked(self, row: Row, ask: Ask) -> Prediction:
        """The prediction with what was asked beyond the ready one."""
        prediction = row.prediction
        if ask.top_k > len(prediction.topk) and len(prediction.topk) < self.card.max_top_k:
            order, scores = top_k(row.probabilities[None], min(ask.top_k, self.card.max_top_k))
            ids = self.bundle.label_ids
            pairs = zip(order[0].tolist(), scores[0].tolist(), strict=True)
            prediction = replace(prediction, topk=tuple((ids[index], score) for index, score in pairs))
        if ask.wants_embedding and row.embedding is not None:
            prediction = replace(prediction, embedding=row.embedding.astype(np.float16))
        return prediction


class _Engine:
    """What the batcher calls: pixels of some images to what the model says of each."""

    def __init__(self, classifier: Classifier, buckets: Sequence[int], *, is_padded: bool) -> None:
        self._classifier, self._buckets, self._is_padded = classifier, buckets, is_padded

    def __call__(self, items: Sequence[Uint8]) -> list[Row]:
        count = len(items)
        batch = items[0][None] if count == 1 else np.stack(items)
        if self._is_padded:
            bucket = self._buckets[bisect_left(self._buckets, count)]
            batch = np.concatenate([batch, np.zeros((bucket - count, *batch.shape[1:]), np.uint8)])
        inference = self._classifier.infer(batch)
        probabilities = inference.probabilities[:count]
        predictions = self._classifier.predictions(probabilities)
        embedding = inference.embedding
        return [
            Row(prediction, probabilities[place], None if embedding is None else embedding[place])
            for place, prediction in enumerate(predictions)
        ]


def _expire(tickets: Sequence[Place]) -> None:
    for ticket in tickets:
        ticket.fail_here(DeadlinePassed())


def _leave(tickets: Sequence[Place]) -> None:
    """What is not answered is not wanted any more."""
    for ticket in tickets:
        ticket.future.cancel()
