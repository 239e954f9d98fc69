"""The models of one process: which are in memory, who gives way, and the Service that the HTTP side asks.

The bundles are opened and checked when the shelf is made; their digests do not change while it stands, so a file that
is replaced under it is refused and no two answers of one name differ in model. A model is loaded once however many ask
for it at a time; the one that was asked longest ago makes room, and answers what it holds before it goes. The first
model stays.

Example:
    >>> shelf = ModelShelf(config)
    >>> await shelf.start()
    >>> batch = await shelf.predict([data], Ask(model="lite0", deadline=time.monotonic() + 1.0))
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from dataclasses import replace

from eagleray.core.errors import ArtifactError, EagleError
from eagleray.serving import refusals
from eagleray.serving.admission import refuse_late
from eagleray.serving.batcher import Clock, Closed, DeadlinePassed
from eagleray.serving.canary import Canary, Unhealthy
from eagleray.serving.decoding import Decoder
from eagleray.serving.gpu_memory import GpuMemory
from eagleray.serving.loaded_model import LoadedModel, card_of, load_model
from eagleray.serving.service import Answer, Ask, Batch, ModelCard, Uint8
from eagleray.serving.settings import ModelEntry, ServingConfig
from eagleray.serving.telemetry import EVICTIONS, LOAD, LOADED, Meter, NullMeter
from eagleray.vision.bundle import ModelBundle, load_bundle

LOG = logging.getLogger(__name__)
RETRY_S = 10.0  # a model that cannot be loaded is tried again after this, not with every request that names it


def pinned(config: ServingConfig) -> ServingConfig:
    """A service with each model's digest in its entry: what is deployed stays what it was, whatever its folders hold.

    Raises:
        ArtifactError: A bundle does not hold, or is not the one that its entry names.
    """
    models = tuple(one.model_copy(update={"digest": bundle_of(one).model_digest}) for one in config.models)
    return config.model_copy(update={"models": models})


def bundle_of(entry: ModelEntry) -> ModelBundle:
    """The bundle of an entry.

    Raises:
        ArtifactError: It does not hold, or is another model than the one that was deployed.
    """
    bundle = load_bundle(entry.bundle)
    if entry.digest is not None and bundle.model_digest != entry.digest:
        raise ArtifactError(
            f"{entry.bundle} holds another model than the service {entry.name} was deployed with",
            expected=f"model_digest {entry.digest[:16]}..., and it is {bundle.model_digest[:16]}...",
            fix="put the model back, or give a new model a folder of its own and `eagleray rollout` it",
        )
    return bundle


class ModelShelf:
    """A Service over models that come and go.

    Args:
        config: Models, batches, limits, memory.
        meter: Counts.
        clock: Gives seconds.
        gpu_memory: Measures a GPU; by default as the config says.

    Raises:
        ArtifactError: A bundle does not hold.
    """

    def __init__(
        self,
        config: ServingConfig,
        *,
        meter: Meter | None = None,
        clock: Clock = time.monotonic,
        gpu_memory: GpuMemory | None = None,
    ) -> None:
        self._config, self._meter, self._clock = config, meter or NullMeter(), clock
        self._entries = {entry.name: entry for entry in config.models}
        self._bundles: dict[str, ModelBundle] = {name: bundle_of(one) for name, one in self._entries.items()}
        self._cards: dict[str, ModelCard] = {
            name: card_of(entry, self._bundles[name]) for name, entry in self._entries.items()
        }
        limits, cores = config.limits, len(os.sched_getaffinity(0))
        self._decoder = Decoder(
            threads=config.batching.decode_threads or cores,
            limits=limits.image_limits,
            large_pixels=limits.large_pixels,
            clock=clock,
        )
        budget, on_gpu = config.memory.gpu_memory_mib, any(entry.device == "cuda" for entry in config.models)
        self._gpu_memory = gpu_memory or (GpuMemory(budget) if on_gpu and budget is not None else None)
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()  # the one asked longest ago first
        self._canaries: dict[str, Canary] = {}
        self._loading: dict[str, asyncio.Task[LoadedModel]] = {}
        self._failed: dict[str, tuple[float, EagleError]] = {}  # when a load failed, and why
        self._one_load = asyncio.Lock()
        self._is_started = self._is_draining = False
        self._is_well = True

    @property
    def default(self) -> str:
        """The model that answers where none is named."""
        return self._config.models[0].name

    async def start(self) -> None:
        """Loads the first models, as many as may be in memory; from then on the service is ready.

        Raises:
            EagleError: One cannot be loaded, or the GPU has not the memory that the budget promises.
        """
        if self._gpu_memory is not None:
            await asyncio.to_thread(self._gpu_memory.check_free)
        for name in list(self._entries)[: self._config.memory.max_loaded_models]:
            await self.get(name)
        self._is_started = True

    def models(self) -> Sequence[ModelCard]:
        """Every model; the first is the default."""
        return tuple(self._cards.values())

    def loaded(self) -> tuple[str, ...]:
        """The models in memory, the one that was asked longest ago first."""
        return tuple(self._loaded)

    def is_ready(self, model: str | None = None) -> bool:
        """Whether a model, or the service as a whole, answers when it is asked; one not in memory is loaded then."""
        if not self._is_started or self._is_draining or not self._is_well:
            return False
        return model is None or (model in self._entries and self._failure(model) is None)

    async def get(self, name: str) -> LoadedModel:
        """A model, loaded if it is not in memory; the load goes on when this caller gives up.

        Raises:
            Refusal: There is no such model.
            EagleError: It cannot be loaded.
        """
        if name not in self._entries:
            raise refusals.unknown_model(())  # which there are is for the HTTP side to say, by the key
        if (model := self._loaded.get(name)) is not None:
            self._loaded.move_to_end(name)
            return model
        if (failure := self._failure(name)) is not None:
            raise failure
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda done: self._end_loading(name, done))
        return await asyncio.shield(task)

    async def predict(self, images: Sequence[bytes], ask: Ask) -> Batch:
        """Decodes and classifies encoded images.

        Raises:
            Refusal: Unknown model, too many images, no embedding to give, overloaded, or the deadline has passed.
        """
        model = await self._admit(ask, len(images))
        return await self._answer(model, model.predict(images, ask), ask)

    async def infer(self, batch_u8_nhwc: Uint8, ask: Ask) -> Batch:
        """Classifies pixels that are preprocessed: uint8, shape (N, height, width, 3).

        Raises:
            Refusal: As predict, and pixels of another shape or type.
        """
        model = await self._admit(ask, len(batch_u8_nhwc))
        shape = (model.card.height, model.card.width, 3)
        if batch_u8_nhwc.dtype != "uint8" or batch_u8_nhwc.ndim != 4 or batch_u8_nhwc.shape[1:] != shape:
            raise refusals.bad_tensor(f"expected uint8 pixels of shape (N, {shape[0]}, {shape[1]}, 3)")
        return await self._answer(model, model.infer(batch_u8_nhwc, ask), ask)

    def queue_delay_s(self, model: str | None = None) -> float:
        """The wait that a new image would have, estimated; with None the longest of all models in memory."""
        names = self._loaded if model is None else [model] if model in self._loaded else []
        return max((self._loaded[name].queue_delay_s() for name in names), default=0.0)

    def utilization(self, model: str | None = None) -> float:
        """Share of the time in which a model's engines ran lately, 0..1; with None that of the busiest."""
        names = self._loaded if model is None else [model] if model in self._loaded else []
        return max((self._loaded[name].utilization() for name in names), default=0.0)

    def tell(self) -> None:
        """Sets the gauges to what is now; again with each health check, as Ray drops a gauge that is not told anew."""
        self._meter.set(LOADED, float(len(self._loaded)))
        for model in self._loaded.values():
            model.tell()

    async def check_health(self) -> None:
        """Sends a canary through every model in memory, and looks whether a codec hangs.

        Raises:
            Unhealthy: One failed; until a check passes again nothing is ready.
        """
        self.tell()
        stuck_s = self._decoder.longest_s()
        found = [one for one in await asyncio.gather(*map(_check, self._canaries.values())) if one is not None]
        if stuck_s > self._config.limits.deadline_s:
            found.append(Unhealthy(f"an image has been in its decoder for {stuck_s:.0f} s"))
        self._is_well = not found
        if found:
            raise found[0]

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Answers what is held, takes no more, and puts every model away.

        Args:
            timeout_s: None: the config's.

        Returns:
            Whether all was answered in time.
        """
        self._is_draining = True
        left_s = self._config.drain_s if timeout_s is None else timeout_s
        answered = await asyncio.gather(*(model.drain(left_s) for model in self._loaded.values()))
        self._loaded.clear()
        self._canaries.clear()
        self._decoder.close()
        return all(answered)

    def _failure(self, name: str) -> EagleError | None:
        """Why a model could not be loaded a short while ago; None where it may be tried."""
        failed = self._failed.get(name)
        return failed[1] if failed is not None and self._clock() - failed[0] < RETRY_S else None

    async def _admit(self, ask: Ask, count: int) -> LoadedModel:
        """The model of a request of so many images that can be answered in time."""
        if self._is_draining:
            raise refusals.not_ready("the replica is being put away; ask again")
        if count > self._config.limits.max_images_per_request:
            raise refusals.too_many_images(self._config.limits.max_images_per_request)
        model = self._loaded.get(ask.model)
        if model is None:
            model = await self._awaited(ask)
        else:
            self._loaded.move_to_end(ask.model)
        if ask.wants_embedding and model.card.embedding_dim is None:
            raise refusals.bad_request(f"the model {model.name} gives no embedding")
        left_s = ask.deadline - self._clock()
        refuse_late(model.queue_delay_s(), left_s=left_s, max_queue_s=self._config.max_queue_s)
        return model

    async def _awaited(self, ask: Ask) -> LoadedModel:
        """A model that is being loaded, within the request's deadline."""
        try:
            async with asyncio.timeout(max(0.0, ask.deadline - self._clock())):
                return await self.get(ask.model)
        except TimeoutError:
            raise refusals.not_ready() from None
        except EagleError:  # told in _end_loading, once for all who wait
            raise refusals.not_ready("the model cannot be loaded; the service's log says why") from None

    async def _answer(self, model: LoadedModel, answering: Awaitable[tuple[Answer, ...]], ask: Ask) -> Batch:
        left_s = max(0.0, ask.deadline - self._clock())
        try:
            answers = await answering
        except DeadlinePassed:
            raise refusals.deadline_passed(left_s) from None
        except Closed:
            raise refusals.not_ready("the model is being put away; ask again") from None
        return Batch(card=model.card, answers=answers)

    async def _load(self, name: str) -> LoadedModel:
        async with self._one_load:
            await asyncio.to_thread(bundle_of, self._entries[name])  # nobody makes room for a broken one
            while len(self._loaded) >= self._config.memory.max_loaded_models:
                await self._evict(next(filter(self._may_go, self._loaded)))
            started = self._clock()
            model, canary = await asyncio.to_thread(self._compile, self._entries[name])
            await self._fit_gpu(model)
            if self._is_draining:
                model.close()
                raise refusals.not_ready("the replica is being put away; ask again")
            self._loaded[name], self._canaries[name] = model, canary
            self._cards[name] = model.card
            self._meter.observe(LOAD, self._clock() - started, model=name)
            self._meter.set(LOADED, float(len(self._loaded)))
            model.tell()
            return model

    async def _fit_gpu(self, new: LoadedModel) -> None:
        """Makes room for a model that has just been loaded, or closes it where others would have to go for nothing.

        Raises:
            CapabilityError: It does not fit beside the models that stay.
        """
        memory = self._gpu_memory
        if memory is None or new.card.device != "cuda":
            return
        may_go = [name for name in self._loaded if self._may_go(name) and self._cards[name].device == "cuda"]
        if not memory.is_within(without=may_go):
            new.close()
            refusal = memory.refusal(new.name)
            memory.forget(new.name)
            raise refusal
        while not memory.is_within():
            await self._evict(may_go.pop(0))

    def _compile(self, entry: ModelEntry) -> tuple[LoadedModel, Canary]:
        """In a thread: loading takes seconds."""
        is_measured = self._gpu_memory is not None and entry.device == "cuda"
        if self._gpu_memory is not None and is_measured:
            self._gpu_memory.begin()
        model = load_model(
            entry,
            self._bundles[entry.name],
            self._decoder,
            batching=self._config.batching,
            meter=self._meter,
            clock=self._clock,
        )
        try:
            canary = Canary(model, self._config.canary, meter=self._meter, clock=self._clock)
        except BaseException:
            model.close()
            raise
        if self._gpu_memory is not None and is_measured:
            self._gpu_memory.end(entry.name)
        return model, canary

    def _may_go(self, name: str) -> bool:
        """The first model stays, unless there is room for one only."""
        return name != self.default or self._config.memory.max_loaded_models == 1

    async def _evict(self, name: str) -> None:
        """Puts a model away, after it has answered what it holds."""
        model = self._loaded.pop(name)
        del self._canaries[name]
        self._cards[name] = replace(self._cards[name], is_loaded=False)
        await model.drain(self._config.limits.deadline_s)
        if self._gpu_memory is not None:
            self._gpu_memory.forget(name)
        model.tell(is_loaded=False)
        self._meter.add(EVICTIONS, model=name)
        self._meter.set(LOADED, float(len(self._loaded)))

    def _end_loading(self, name: str, done: asyncio.Task[LoadedModel]) -> None:
        self._loading.pop(name, None)
        error = None if done.cancelled() else done.exception()
        if error is not None:
            LOG.error("the model %s cannot be loaded: %s", name, error)
        if isinstance(error, EagleError):
            self._failed[name] = self._clock(), error


async def _check(canary: Canary) -> Unhealthy | None:
    """What is wrong with a model; None when nothing is, or when it was put away meanwhile."""
    try:
        await canary.check()
    except Unhealthy as ill:
        return ill
    except Closed:
        return None
    return None
