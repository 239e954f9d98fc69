"""The models of a service: answers equal score's, a model is loaded once, the one asked longest ago makes room."""

from __future__ import annotations

import asyncio
import gc
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.infer.classifier import Classifier
from eagleray.infer.probes import make_probes
from eagleray.infer.runtimes.cuda_driver import CudaDriver
from eagleray.serving import loaded_model, models
from eagleray.serving.gpu_memory import MIB, GpuMemory
from eagleray.serving.models import ModelShelf, pinned
from eagleray.serving.refusals import Refusal
from eagleray.serving.service import Ask, Batch, Service
from eagleray.serving.settings import ServingConfig
from eagleray.serving.telemetry import BATCH, DECODE, EVICTIONS, INFER, LOAD, LOADED, MODEL, QUEUE, QUEUED, MemoryMeter
from eagleray.vision.bundle import load_bundle, save_bundle
from eagleray.vision.images import decode
from eagleray.vision.prediction import ThresholdPolicy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cuda_recorder import CudaRecorder
from tests.tiny_model import make_bundle

Photo = Callable[..., bytes]
KINDS = ("good", "bad", "late", "unknown", "gone")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models that differ, the first with a policy and without an embedding."""
    folder = tmp_path_factory.mktemp("models")
    found = {name: make_bundle(folder / name, seed) for seed, name in enumerate(("b", "c"), 11)}
    plain = load_bundle(make_bundle(folder / "plain", 7))
    policy = ThresholdPolicy(dict.fromkeys(plain.label_ids, 0.3), otherwise="look")
    files = {"model.onnx": plain.path / "model.onnx"}
    save_bundle(folder / "a", replace(plain, policy=policy, embedding_dim=None), files, probes=make_probes)
    return {"a": folder / "a", **found}


def config_of(bundles: dict[str, Path], *names: str, **changes: Any) -> ServingConfig:
    entries = [{"name": name, "bundle": str(bundles[name]), "runtime": "onnx"} for name in names]
    return ServingConfig.model_validate({"models": entries, "access": {"auth": "none"}, **changes})


def ask(model: str = "a", *, left_s: float = 30.0, **wants: Any) -> Ask:
    return Ask(model=model, deadline=time.monotonic() + left_s, **wants)


def serving(config: ServingConfig, body: Callable[[ModelShelf], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            shelf = ModelShelf(config, **settings)
            await shelf.start()
            try:
                await body(shelf)
            finally:
                await shelf.drain(5.0)

    asyncio.run(run())


def test_the_shelf_is_a_service(bundles: dict[str, Path]) -> None:
    service: Service = ModelShelf(config_of(bundles, "a"))
    assert [card.name for card in service.models()] == ["a"]


def test_the_answers_are_those_of_the_classifier(bundles: dict[str, Path], make_photo: Photo) -> None:
    """The same request in one batch gives the same bits; whatever the batches, |dp| <= 1e-6 on one engine."""
    images = [make_photo(seed) for seed in range(12)] + [b"", make_photo(3)[:200]]
    expected = Classifier(bundles["a"], "onnx").predict(images)

    async def body(shelf: ModelShelf) -> None:
        whole = await shelf.predict(images, ask())
        apart = [await shelf.predict([data], ask()) for data in images]
        for predictions in (
            [answer.prediction for answer in whole.answers],
            [batch.answers[0].prediction for batch in apart],
        ):
            for found, wanted in zip(predictions, expected, strict=True):
                assert (found.status, found.reason, found.label, found.decision) == (
                    *(wanted.status, wanted.reason, wanted.label, wanted.decision),
                )
                assert [label for label, _ in found.topk] == [label for label, _ in wanted.topk]
                assert np.allclose([p for _, p in found.topk], [p for _, p in wanted.topk], rtol=0, atol=1e-6)
        assert {one.prediction.decision for one in whole.answers} <= {*whole.card.label_names, "look", None}

    serving(config_of(bundles, "a"), body)


def test_the_same_batch_gives_the_same_bits(bundles: dict[str, Path], make_photo: Photo) -> None:
    classifier = Classifier(bundles["a"], "onnx")
    pixels = np.stack([decode(make_photo(seed), classifier.bundle.image_spec) for seed in range(8)])
    expected = classifier.infer(pixels).probabilities

    async def body(shelf: ModelShelf) -> None:
        model = await shelf.get("a")
        engine = loaded_model._Engine(classifier, (1, 2, 4, 8), is_padded=False)
        assert np.array_equal([row.probabilities for row in engine(list(pixels))], expected)
        batch = await shelf.infer(pixels, ask(wants_probabilities=True))
        assert batch.card == model.card
        for answer, wanted in zip(batch.answers, expected, strict=True):
            assert answer.probabilities is not None
            assert np.allclose(answer.probabilities, wanted, rtol=0, atol=1e-6)
            assert answer.prediction.model_digest == batch.card.digest

    serving(config_of(bundles, "a"), body)


def test_a_padded_batch_answers_for_its_own_images_only(bundles: dict[str, Path], make_photo: Photo) -> None:
    classifier = Classifier(bundles["a"], "onnx")
    pixels = np.stack([decode(make_photo(seed), classifier.bundle.image_spec) for seed in range(3)])
    rows = loaded_model._Engine(classifier, (1, 4), is_padded=True)(list(pixels))
    assert len(rows) == 3
    assert np.allclose([row.probabilities for row in rows], classifier.infer(pixels).probabilities, rtol=0, atol=1e-6)


def test_a_longer_list_of_labels_and_probabilities_are_given_to_those_who_ask(
    bundles: dict[str, Path], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded_model, "READY_TOP_K", 2)

    async def body(shelf: ModelShelf) -> None:
        data = make_photo(1)
        (short,) = (await shelf.predict([data], ask(top_k=2))).answers
        (long,) = (await shelf.predict([data], ask(top_k=5, wants_probabilities=True))).answers
        assert (len(short.prediction.topk), len(long.prediction.topk)) == (2, 5)
        assert short.prediction.topk == long.prediction.topk[:2]
        assert short.probabilities is None
        assert long.probabilities is not None
        assert long.prediction.topk[0][1] == long.probabilities.max()

    serving(config_of(bundles, "a"), body)


def test_the_embedding_is_given_to_those_who_ask(bundles: dict[str, Path], make_photo: Photo) -> None:
    images = [make_photo(seed) for seed in range(3)]
    expected = Classifier(bundles["b"], "onnx", wants_embedding=True).predict(images)

    async def body(shelf: ModelShelf) -> None:
        asked, plain = [await shelf.predict(images, ask("b", wants_embedding=wants)) for wants in (True, False)]
        for answer, other, wanted in zip(asked.answers, plain.answers, expected, strict=True):
            embedding = answer.prediction.embedding
            assert embedding is not None
            assert wanted.embedding is not None
            assert embedding.dtype == np.float16
            assert np.allclose(embedding, wanted.embedding, rtol=0, atol=2e-3)  # one step of float16 at 1
            assert other.prediction.embedding is None

    serving(config_of(bundles, "b"), body)


def test_one_bad_image_fails_alone(bundles: dict[str, Path], make_photo: Photo) -> None:
    async def body(shelf: ModelShelf) -> None:
        found = await asyncio.gather(
            *(shelf.predict([make_photo(seed) if seed % 3 else b"<svg>"], ask()) for seed in range(12))
        )
        states = [batch.answers[0].prediction.status for batch in found]
        assert states == ["quarantined" if seed % 3 == 0 else "scored" for seed in range(12)]

    serving(config_of(bundles, "a"), body)


def test_an_image_that_the_engine_cannot_run_fails_alone(
    bundles: dict[str, Path], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(shelf: ModelShelf) -> None:
        spec = load_bundle(bundles["a"]).image_spec
        images = [make_photo(seed) for seed in range(6)]
        bad, real = decode(images[2], spec), Classifier.infer

        def infer(self: Classifier, batch: Any) -> Any:
            if any(np.array_equal(pixels, bad) for pixels in batch):
                raise ArtifactError("the model of a gives values that are not finite")
            return real(self, batch)

        monkeypatch.setattr(Classifier, "infer", infer)
        found = await asyncio.gather(*(shelf.predict([one], ask()) for one in images), return_exceptions=True)
        assert [isinstance(one, ArtifactError) for one in found] == [seed == 2 for seed in range(6)]

    serving(config_of(bundles, "a"), body)


def test_each_answer_names_the_model_that_made_it(bundles: dict[str, Path], make_photo: Photo) -> None:
    async def body(shelf: ModelShelf) -> None:
        names = ["a", "b", "c"] * 4
        found = await asyncio.gather(
            *(shelf.predict([make_photo(seed)] * 2, ask(name)) for seed, name in enumerate(names))
        )
        for name, batch in zip(names, found, strict=True):
            digest = load_bundle(bundles[name]).model_digest
            assert (batch.card.name, batch.card.digest) == (name, digest)
            assert {answer.prediction.model_digest for answer in batch.answers} == {digest}

    serving(config_of(bundles, "a", "b", "c"), body)


def test_a_model_is_loaded_once_however_many_ask(
    bundles: dict[str, Path], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    real = models.load_model

    def counted(entry: Any, *rest: Any, **more: Any) -> Any:
        loads.append(entry.name)
        return real(entry, *rest, **more)

    monkeypatch.setattr(models, "load_model", counted)

    async def body(shelf: ModelShelf) -> None:
        assert loads == ["a", "b"]
        assert [card.is_loaded for card in shelf.models()] == [True, True, False]
        assert (shelf.is_ready("b"), shelf.is_ready("c"), shelf.is_ready("nobody")) == (True, True, False)
        await asyncio.gather(*(shelf.predict([make_photo(1)], ask("c")) for _ in range(8)))
        assert loads == ["a", "b", "c"]
        assert shelf.loaded() == ("a", "c")

    serving(config_of(bundles, "a", "b", "c", memory={"max_loaded_models": 2}), body)


def test_the_model_asked_longest_ago_makes_room_and_the_first_stays(bundles: dict[str, Path]) -> None:
    meter = MemoryMeter()

    async def body(shelf: ModelShelf) -> None:
        await shelf.get("c")
        assert shelf.loaded() == ("a", "c")
        assert meter.number(MODEL, model="b") == 0
        assert meter.number(MODEL, model="c") == 1
        await shelf.get("b")
        assert shelf.loaded() == ("a", "b")
        assert (meter.number(EVICTIONS), meter.number(LOADED)) == (2, 2)
        assert meter.distributions[LOAD.name, ("b",)].count == 2

    serving(config_of(bundles, "a", "b", "c", memory={"max_loaded_models": 2}), body, meter=meter)


def test_a_model_that_was_put_away_is_freed(bundles: dict[str, Path], make_photo: Photo) -> None:
    async def body(shelf: ModelShelf) -> None:
        await shelf.predict([make_photo(1), b""], ask("b"))
        freed = weakref.ref(await shelf.get("b"))
        await shelf.check_health()
        await shelf.get("c")
        await asyncio.sleep(0)
        for _ in range(20):  # its engine's thread lets go when it ends
            gc.collect()
            if freed() is None:
                break
            await asyncio.sleep(0.1)
        assert freed() is None

    serving(config_of(bundles, "a", "b", "c", memory={"max_loaded_models": 2}), body)


@pytest.mark.parametrize("is_good", [True, False])
def test_an_image_is_let_go_with_its_answer(bundles: dict[str, Path], make_photo: Photo, is_good: bool) -> None:
    """Without the collector: a flood of bad images would else keep every one of them until it runs."""

    async def body(shelf: ModelShelf) -> None:
        data = make_photo(1) if is_good else make_photo(1)[:300]
        before = sys.getrefcount(data)
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                await shelf.predict([data], ask())
            for _ in range(100):
                if sys.getrefcount(data) == before:
                    break
                await asyncio.sleep(0.01)  # its thread lets go a moment after its answer
            assert sys.getrefcount(data) == before
        finally:
            gc.enable()

    serving(config_of(bundles, "a"), body)


def test_with_room_for_one_model_they_take_turns(bundles: dict[str, Path], make_photo: Photo) -> None:
    async def body(shelf: ModelShelf) -> None:
        for name in ("b", "a", "b"):
            assert (await shelf.predict([make_photo(1)], ask(name))).card.name == name
            assert shelf.loaded() == (name,)

    serving(config_of(bundles, "a", "b", memory={"max_loaded_models": 1}), body)


def test_a_model_that_makes_room_first_answers_what_it_holds(
    bundles: dict[str, Path], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), Classifier.infer
    digest = load_bundle(bundles["b"]).model_digest

    async def body(shelf: ModelShelf) -> None:
        def infer(self: Classifier, batch: Any) -> Any:
            if self.bundle.model_digest == digest:
                gate.wait(20)
            return real(self, batch)

        monkeypatch.setattr(Classifier, "infer", infer)
        held = asyncio.create_task(shelf.predict([make_photo(1)], ask("b")))
        await asyncio.sleep(0.05)
        loading = asyncio.create_task(shelf.get("c"))
        await asyncio.sleep(0.05)
        assert not loading.done()
        gate.set()
        assert (await held).card.name == "b"
        await loading
        assert shelf.loaded() == ("a", "c")

    serving(config_of(bundles, "a", "b", "c", memory={"max_loaded_models": 2}), body)


def refused(code: str, answering: Awaitable[Any]) -> Awaitable[None]:
    async def check() -> None:
        with pytest.raises(Refusal) as refusal:
            await answering
        assert refusal.value.code == code

    return check()


def test_what_cannot_be_answered_is_refused_by_name(bundles: dict[str, Path], make_photo: Photo) -> None:
    async def body(shelf: ModelShelf) -> None:
        data, pixels = make_photo(1), np.zeros((1, 32, 32, 3), np.uint8)
        await refused("unknown_model", shelf.predict([data], ask("nobody")))
        await refused("bad_request", shelf.predict([data], ask(wants_embedding=True)))
        await refused("overloaded", shelf.predict([data], ask(left_s=-1.0)))
        await refused("too_many_images", shelf.predict([data] * 33, ask()))
        await refused("too_many_images", shelf.infer(np.zeros((33, 32, 32, 3), np.uint8), ask()))
        await refused("bad_tensor", shelf.infer(pixels[:, 1:], ask()))
        await refused("bad_tensor", shelf.infer(pixels.astype(np.int8), ask()))  # type: ignore[arg-type]
        await refused("bad_tensor", shelf.infer(pixels[0], ask()))
        await shelf.drain(1.0)
        assert not shelf.is_ready()
        await refused("not_ready", shelf.predict([data], ask()))

    serving(config_of(bundles, "a"), body)


def test_a_request_past_its_deadline_is_refused_and_leaves_the_queue(
    bundles: dict[str, Path], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), Classifier.infer

    async def body(shelf: ModelShelf) -> None:
        model = await shelf.get("a")
        with monkeypatch.context() as patched:
            patched.setattr(Classifier, "infer", lambda self, batch: (gate.wait(20), real(self, batch))[1])
            first = asyncio.create_task(shelf.predict([make_photo(1)], ask()))
            await asyncio.sleep(0.05)
            pixels = np.zeros((3, 32, 32, 3), np.uint8)
            await refused("deadline_passed", shelf.infer(pixels, ask(left_s=0.05)))
            await asyncio.sleep(0)
            assert (model.batcher.queued, model.batcher.open) == (0, 1)
            gate.set()
            await first

    serving(config_of(bundles, "a"), body)


def test_a_cancelled_request_leaves_the_queue(
    bundles: dict[str, Path], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real, sizes = threading.Event(), Classifier.infer, list[int]()

    async def body(shelf: ModelShelf) -> None:
        def infer(self: Classifier, batch: Any) -> Any:
            sizes.append(len(batch))
            gate.wait(20)
            return real(self, batch)

        monkeypatch.setattr(Classifier, "infer", infer)
        model, pixels = await shelf.get("a"), np.zeros((4, 32, 32, 3), np.uint8)
        first = asyncio.create_task(shelf.infer(pixels[:1], ask()))
        while not sizes:
            await asyncio.sleep(0.001)
        gone, stays = (asyncio.create_task(shelf.infer(pixels[:count], ask())) for count in (4, 2))
        await asyncio.sleep(0)
        assert model.batcher.queued == 6
        gone.cancel()
        await asyncio.sleep(0.01)
        assert model.batcher.queued == 2
        gate.set()
        await asyncio.gather(first, stays)
        assert sizes == [1, 2]

    serving(config_of(bundles, "a"), body)


def test_more_than_can_be_answered_in_time_is_refused_at_once(
    bundles: dict[str, Path], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), Classifier.infer

    async def body(shelf: ModelShelf) -> None:
        model, pixels = await shelf.get("a"), np.zeros((32, 32, 32, 3), np.uint8)
        monkeypatch.setattr(Classifier, "infer", lambda self, batch: (gate.wait(20), real(self, batch))[1])
        for size in (1, 2, 4, 8, 16, 32):
            for _ in range(60):
                model.batcher.times.learn(size, 0.010 * size)  # as a heavy model: 100 images/s
        held = [asyncio.create_task(shelf.infer(pixels[:1], ask()))]
        await asyncio.sleep(0.02)
        held.append(asyncio.create_task(shelf.infer(pixels, ask())))
        await asyncio.sleep(0)
        assert shelf.queue_delay_s() == shelf.queue_delay_s("a") > 0.3
        await refused("overloaded", shelf.infer(pixels[:1], ask()))
        await refused("overloaded", shelf.predict([make_photo(1)], ask()))
        gate.set()
        await asyncio.gather(*held)
        await shelf.infer(pixels[:1], ask())

    serving(config_of(bundles, "a", slo={"latency_p99_ms": 200.0}), body)


def test_a_bundle_that_changes_under_the_service_is_refused(tmp_path: Path, make_photo: Photo) -> None:
    found = {name: make_bundle(tmp_path / name, seed) for seed, name in enumerate(("a", "b"), 7)}

    async def body(shelf: ModelShelf) -> None:
        (tmp_path / "b" / "model.onnx").write_bytes((tmp_path / "a" / "model.onnx").read_bytes())
        with pytest.raises(ArtifactError, match="has changed"):
            await shelf.get("b")
        await refused("not_ready", shelf.predict([make_photo(1)], ask("b")))
        assert (await shelf.predict([make_photo(1)], ask("a"))).card.name == "a"  # it did not make room for nothing
        assert shelf.is_ready()

    serving(config_of(found, "a", "b", memory={"max_loaded_models": 1}), body)


def test_a_model_that_cannot_be_loaded_is_not_tried_again_with_each_request(
    bundles: dict[str, Path], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, real, now = list[str](), models.load_model, [0.0]

    def failing(entry: Any, *rest: Any, **more: Any) -> Any:
        if entry.name == "b" and now[0] < models.RETRY_S:
            tries.append(entry.name)
            raise CapabilityError("no room")
        return real(entry, *rest, **more)

    monkeypatch.setattr(models, "load_model", failing)

    async def body(shelf: ModelShelf) -> None:
        await asyncio.gather(*(refused("not_ready", shelf.predict([make_photo(1)], later("b"))) for _ in range(3)))
        await refused("not_ready", shelf.predict([make_photo(1)], later("b")))
        assert tries == ["b"]
        assert (shelf.is_ready(), shelf.is_ready("b")) == (True, False)
        now[0] = models.RETRY_S
        assert shelf.is_ready("b")
        assert (await shelf.predict([make_photo(1)], later("b"))).card.name == "b"

    def later(name: str) -> Ask:
        return Ask(model=name, deadline=now[0] + 30.0)

    serving(config_of(bundles, "a", "b", memory={"max_loaded_models": 1}), body, clock=lambda: now[0])


def test_what_is_measured_is_told(bundles: dict[str, Path], make_photo: Photo) -> None:
    meter = MemoryMeter()

    async def body(shelf: ModelShelf) -> None:
        await shelf.predict([make_photo(1), b""], ask())
        shelf.tell()
        for metric, count in ((QUEUE, 1), (INFER, 1), (BATCH, 1)):
            assert meter.distributions[metric.name, ("a",)].count == count
        assert meter.distributions[DECODE.name, ("a",)].count >= 1
        assert meter.number(QUEUED, model="a") == 0

    serving(config_of(bundles, "a"), body, meter=meter)


def test_two_engines_give_the_same_answers(bundles: dict[str, Path], make_photo: Photo) -> None:
    images = [make_photo(seed) for seed in range(16)]
    expected = Classifier(bundles["a"], "onnx").predict(images)
    base = config_of(bundles, "a")
    config = base.model_copy(update={"models": (base.models[0].model_copy(update={"engines": 2}),)})

    async def body(shelf: ModelShelf) -> None:
        assert (await shelf.get("a")).batcher.num_engines == 2
        found = await asyncio.gather(*(shelf.predict([data], ask()) for data in images))
        for batch, wanted in zip(found, expected, strict=True):
            (answer,) = batch.answers
            assert answer.prediction.label == wanted.label
            assert answer.prediction.score == pytest.approx(wanted.score, abs=1e-6)

    serving(config, body)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(KINDS)), min_size=1, max_size=30), st.integers(1, 3))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_request_has_one_typed_end_and_the_shelf_stands(
    bundles: dict[str, Path], make_photo: Photo, asked: list[tuple[str, str]], room: int
) -> None:
    """Whatever comes at once: good and bad images, wrong models, late and cancelled requests, models that make room."""
    data = {
        "good": make_photo(1),
        "bad": b"<svg>",
        "late": make_photo(2),
        "unknown": make_photo(3),
        "gone": make_photo(4),
    }

    async def body(shelf: ModelShelf) -> None:
        tasks = []
        for name, kind in asked:
            wanted = ask("nobody" if kind == "unknown" else name, left_s=-1.0 if kind == "late" else 30.0)
            tasks.append(asyncio.create_task(shelf.predict([data[kind], data["good"]], wanted)))
            await asyncio.sleep(0)
            if kind == "gone":
                tasks[-1].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for (name, kind), one in zip(asked, found, strict=True):
            if isinstance(one, Refusal):
                assert one.code in {"late": {"overloaded", "not_ready"}, "unknown": {"unknown_model"}}[kind]
            elif isinstance(one, Batch):
                assert kind in ("good", "bad")
                assert one.card.name == name
                assert {answer.prediction.model_digest for answer in one.answers} == {one.card.digest}
                states = [answer.prediction.status for answer in one.answers]
                assert states == ["quarantined" if kind == "bad" else "scored", "scored"]
            else:
                assert isinstance(one, asyncio.CancelledError)
                assert kind == "gone"
        await asyncio.gather(*(shelf.get(name) for name in "abc"))
        await shelf.check_health()
        assert len(shelf.loaded()) == room
        assert [(await shelf.get(name)).batcher.open for name in shelf.loaded()] == [0] * room

    generous = {"max_queue_s": 30.0, "deadline_s": 60.0}
    serving(config_of(bundles, "a", "b", "c", memory={"max_loaded_models": room}, limits=generous), body)


class Card:
    """A GPU of which each load takes what the test says."""

    def __init__(self, free_mib: int, takes_mib: Sequence[int]) -> None:
        self.free, self.takes = free_mib * MIB, list(takes_mib)
        self.reads = 0

    def __call__(self) -> int:
        self.reads += 1
        if self.reads > 1 and self.reads % 2:  # check_free, then begin and end of each load
            self.free -= self.takes.pop(0) * MIB
        return self.free


def test_gpu_memory_is_counted_by_what_was_free_before_and_after() -> None:
    memory = GpuMemory(1000, read_free=Card(4000, [600, 300, 500]))
    memory.check_free()
    for name, total, is_within in (("a", 600, True), ("b", 900, True), ("c", 1400, False)):
        memory.begin()
        memory.end(name)
        assert (memory.taken_mib, memory.is_within()) == (total, is_within)
    assert "c takes 500 MiB of GPU memory, beside 900 MiB" in str(memory.refusal("c"))
    assert memory.is_within(without=["a"])
    memory.forget("b")
    assert memory.taken_mib == 1100


def test_a_gpu_without_the_memory_that_is_promised_is_refused() -> None:
    with pytest.raises(CapabilityError, match="999 MiB free"):
        GpuMemory(1000, read_free=lambda: 999 * MIB).check_free()


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that say they run on CUDA and run on the CPU."""
    real = models.load_model

    def load(entry: Any, *rest: Any, **more: Any) -> Any:
        model = real(entry.model_copy(update={"device": "cpu"}), *rest, **more)
        model.card = replace(model.card, device="cuda")
        return model

    monkeypatch.setattr(models, "load_model", load)


def cuda_config(bundles: dict[str, Path], *names: str) -> ServingConfig:
    base = config_of(bundles, *names, memory={"gpus": 0.5, "gpu_memory_mib": 1000})
    return base.model_copy(
        update={"models": tuple(entry.model_copy(update={"device": "cuda"}) for entry in base.models)}
    )


@pytest.mark.usefixtures("on_a_card")
def test_models_go_until_a_new_one_fits_the_gpu(bundles: dict[str, Path]) -> None:
    async def body(shelf: ModelShelf) -> None:
        assert shelf.loaded() == ("a", "c")  # b made room: 400 + 300 + 500 is above 1000

    memory = GpuMemory(1000, read_free=Card(4000, [400, 300, 500]))
    serving(cuda_config(bundles, "a", "b", "c"), body, gpu_memory=memory)


@pytest.mark.usefixtures("on_a_card")
def test_a_model_that_can_never_fit_is_refused_and_puts_nobody_out(bundles: dict[str, Path]) -> None:
    async def run() -> None:
        shelf = ModelShelf(
            cuda_config(bundles, "a", "b", "c"), gpu_memory=GpuMemory(1000, read_free=Card(4000, [400, 300, 700]))
        )
        with pytest.raises(CapabilityError, match="c takes 700 MiB"):
            await shelf.start()
        assert shelf.loaded() == ("a", "b")
        await shelf.drain(1.0)

    asyncio.run(run())


def test_a_gpu_is_not_looked_for_where_no_model_runs_on_one(bundles: dict[str, Path]) -> None:
    async def body(shelf: ModelShelf) -> None:
        assert shelf.is_ready()

    serving(config_of(bundles, "a", memory={"gpu_memory_mib": 2**20}), body)


def test_the_driver_tells_the_free_memory() -> None:
    driver = CudaDriver(CudaRecorder())
    free, total = driver.memory_info()
    driver.memory(4096)
    assert driver.memory_info() == (free - 4096, total)


def test_another_model_in_the_same_folder_is_refused_once_a_service_is_pinned(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bundles["b"], tmp_path / "b")
    config = pinned(config_of({"b": tmp_path / "b"}, "b"))
    assert config.models[0].digest == load_bundle(bundles["b"]).model_digest
    assert pinned(config) == config
    ModelShelf(config)
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(bundles["c"], tmp_path / "b")
    with pytest.raises(ArtifactError, match="another model than the service b was deployed with"):
        ModelShelf(config)
    with pytest.raises(ArtifactError, match="a folder of its own"):
        pinned(config)
    ModelShelf(config_of({"b": tmp_path / "b"}, "b"))  # not pinned: whatever lies there
