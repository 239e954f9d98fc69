"""The canary: a well engine passes under any load; one that hangs, drifts or fails is found and said."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.core.errors import ArtifactError
from eagleray.infer.classifier import Classifier, Inference
from eagleray.infer.probes import make_probes
from eagleray.serving.canary import Unhealthy
from eagleray.serving.models import ModelShelf
from eagleray.serving.service import Ask
from eagleray.serving.settings import ServingConfig
from eagleray.serving.telemetry import CANARY, CANARY_DRIFT, MemoryMeter
from eagleray.vision.bundle import load_bundle, save_bundle

from tests.tiny_model import make_bundle

PIXELS = np.zeros((32, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a probe set."""
    folder = tmp_path_factory.mktemp("canary")
    plain = load_bundle(make_bundle(folder / "plain"))
    save_bundle(folder / "probed", plain, {"model.onnx": plain.path / "model.onnx"}, probes=make_probes)
    return folder / "probed"


def watched(
    bundle: Path,
    body: Callable[[ModelShelf, MemoryMeter], Awaitable[None]],
    *,
    timeout_s: float = 10.0,
    engines: int = 1,
) -> None:
    config = ServingConfig.model_validate(
        {
            "models": [{"name": "a", "bundle": str(bundle), "runtime": "onnx", "engines": engines}],
            "access": {"auth": "none"},
            "canary": {"timeout_s": timeout_s},
        }
    )

    async def run() -> None:
        async with asyncio.timeout(60):
            meter = MemoryMeter()
            shelf = ModelShelf(config, meter=meter)
            await shelf.start()
            try:
                await body(shelf, meter)
            finally:
                await shelf.drain(0.1)

    asyncio.run(run())


@pytest.mark.parametrize("engines", [1, 2])
def test_a_well_engine_passes_with_each_probe(probed: Path, engines: int) -> None:
    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        for _ in range(20):
            await shelf.check_health()
        assert meter.number(CANARY, model="a", outcome="ok") == 20
        assert meter.number(CANARY_DRIFT, model="a") < 0.1
        assert shelf.is_ready()

    watched(probed, body, engines=engines)


def test_a_bundle_without_probes_is_held_to_what_it_answered_at_first(tiny_model: Path) -> None:
    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        for _ in range(3):
            await shelf.check_health()

    watched(tiny_model, body)


def test_a_queue_of_others_does_not_make_a_replica_ill(probed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary runs in the next batch, however many wait: counted in batches, as wall time is the machine's."""
    sizes, gate, real = list[int](), threading.Semaphore(0), Classifier.infer

    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        def infer(self: Classifier, batch: Any) -> Inference:
            sizes.append(len(batch))
            gate.acquire()
            return real(self, batch)

        monkeypatch.setattr(Classifier, "infer", infer)
        model, ask = await shelf.get("a"), Ask(model="a", deadline=1e12)
        others = [asyncio.create_task(model.infer(PIXELS, ask)) for _ in range(5)]
        while not sizes:
            await asyncio.sleep(0.001)
        check = asyncio.create_task(shelf.check_health())
        await asyncio.sleep(0.01)
        gate.release(2)
        await check
        assert len(sizes) <= 3
        gate.release(1000)
        await asyncio.gather(*others)

    watched(probed, body)


def test_an_engine_that_hangs_is_ill_within_the_bound(probed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), Classifier.infer

    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        monkeypatch.setattr(Classifier, "infer", lambda self, batch: (gate.wait(30), real(self, batch))[1])
        with pytest.raises(Unhealthy, match=r"no answer within 0\.1 s"):
            await shelf.check_health()
        assert not shelf.is_ready()
        assert meter.number(CANARY, outcome="timeout") == 1
        gate.set()

    watched(probed, body, timeout_s=0.1)


def test_one_of_two_engines_that_hangs_is_found_though_the_other_answers(
    probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real, hung = threading.Event(), Classifier.infer, list[Classifier]()

    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        def infer(self: Classifier, batch: Any) -> Inference:
            if not hung:
                hung.append(self)
                gate.wait(30)
            return real(self, batch)

        monkeypatch.setattr(Classifier, "infer", infer)
        model = await shelf.get("a")
        stuck = asyncio.create_task(model.infer(PIXELS[:1], Ask(model="a", deadline=1e12)))
        while not hung or model.longest_s() < 0.2:
            await asyncio.sleep(0.01)
        with pytest.raises(Unhealthy):
            await shelf.check_health()
        gate.set()
        await stuck

    watched(probed, body, timeout_s=0.2, engines=2)


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_an_engine_that_drifts_is_ill(probed: Path, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    real = Classifier.infer

    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        def infer(self: Classifier, batch: Any) -> Inference:
            found = real(self, batch)
            return replace(found, probabilities=found.probabilities + np.float32(wrong))

        monkeypatch.setattr(Classifier, "infer", infer)
        with pytest.raises(Unhealthy, match="is off by"):
            await shelf.check_health()
        assert meter.number(CANARY, outcome="drift") == 1
        assert not shelf.is_ready()
        monkeypatch.undo()
        await shelf.check_health()
        assert shelf.is_ready()

    watched(probed, body)


def test_an_engine_that_fails_is_ill(probed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Classifier, batch: Any) -> Inference:
        raise RuntimeError("CUDA error: an illegal memory access")

    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        monkeypatch.setattr(Classifier, "infer", broken)
        with pytest.raises(Unhealthy, match="illegal memory access"):
            await shelf.check_health()
        assert meter.number(CANARY, outcome="error") == 1

    watched(probed, body)


def test_a_codec_that_hangs_makes_the_replica_ill(probed: Path) -> None:
    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        shelf._decoder.longest_s = lambda: 99.0  # type: ignore[method-assign]
        with pytest.raises(Unhealthy, match="in its decoder for 99 s"):
            await shelf.check_health()

    watched(probed, body)


def test_an_engine_that_answers_the_probes_otherwise_never_starts(
    probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it passed before on this machine, and that is remembered."""
    Classifier(probed, "onnx")
    real = Classifier.infer

    def infer(self: Classifier, batch: Any) -> Inference:
        found = real(self, batch)
        return replace(found, probabilities=found.probabilities[:, ::-1])

    monkeypatch.setattr(Classifier, "infer", infer)

    async def body(shelf: ModelShelf, meter: MemoryMeter) -> None:
        raise AssertionError("it started")

    with pytest.raises(ArtifactError, match="answers its probe set otherwise"):
        watched(probed, body)
