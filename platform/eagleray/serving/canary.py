"""The canary: a picture whose answer is known goes the way of every request, and must come back in time and unchanged.

When a model is loaded its engine answers the bundle's whole probe set, which is held to the FP32 model's answers as
infer/parity.py says; what it answered then is what each canary must be now. So a wrong engine never starts, one that
drifts (a card with bad memory, weights written over) is found by its own words, and one that hangs does not answer. A
canary goes before all that waits: load alone never makes a replica look ill.

Example:
    >>> canary = Canary(model, CanaryConfig(period_s=2.0, timeout_s=3.0))
    >>> await canary.check()
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

from eagleray.core.errors import ArtifactError
from eagleray.infer.parity import TIE, TOLERANCES, Tolerance, tolerance_of
from eagleray.infer.probabilities import to_probabilities
from eagleray.infer.probes import Probes, generated_images, read_probes
from eagleray.serving.batcher import Clock, Closed, DeadlinePassed
from eagleray.serving.loaded_model import LoadedModel
from eagleray.serving.service import Ask, Float32
from eagleray.serving.settings import CanaryConfig
from eagleray.serving.telemetry import CANARY, CANARY_DRIFT, CANARY_TIME, Meter, NullMeter

# An engine against its own earlier answer: FP32 as two FP32 engines may differ; a quantised one rounds otherwise in
# another batch, by less than it may be off the FP32 model
STEADY = {"fp32": TOLERANCES["fp32"].max_abs_dp, "fp16": 0.01, "int8": 0.02}


class Unhealthy(Exception):
    """The replica must be replaced; the text says why."""


class Canary:
    """Checks one model. Made when the model is loaded, before its first request.

    Args:
        model: What is checked.
        config: How long it may take.
        meter: Counts.
        clock: Gives seconds, the model's.

    Raises:
        ArtifactError: The engine answers the probe set otherwise than the FP32 model.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: CanaryConfig,
        *,
        meter: Meter | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._model, self._config, self._clock = model, config, clock
        self._meter, self._next = meter or NullMeter(), 0
        probes = read_probes(model.bundle)  # None: the bundle is older than probe sets
        self._images = probes.images_u8_nhwc if probes else generated_images(model.bundle.image_spec)
        self._expected = model.baseline(self._images)
        if probes is not None:
            _refuse_foreign(model, self._expected, probes)
        self._allowed = STEADY[model.bundle.precision]

    async def check(self) -> float:
        """Sends the next probe.

        Returns:
            The largest difference of a probability, over what is allowed: at most 1.

        Raises:
            Unhealthy: It did not come back in time, came back changed, or the engine failed.
            Closed: The model is being put away.
        """
        started, place = self._clock(), self._next
        self._next = (place + 1) % len(self._images)
        ask = Ask(model=self._model.name, deadline=started + self._config.timeout_s, top_k=1, wants_probabilities=True)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                (answer,) = await self._model.infer(self._images[place : place + 1], ask, is_urgent=True)
        except (TimeoutError, DeadlinePassed):
            raise self._ill("timeout", f"no answer within {self._config.timeout_s:g} s") from None
        except Closed:
            raise
        except Exception as error:
            raise self._ill("error", f"{type(error).__name__}: {error}") from error
        self._meter.observe(CANARY_TIME, self._clock() - started, model=self._model.name)
        assert answer.probabilities is not None
        drift = float(np.abs(answer.probabilities - self._expected[place]).max()) / self._allowed
        self._meter.set(CANARY_DRIFT, drift, model=self._model.name)
        if not drift <= 1:  # NaN is ill too
            raise self._ill("drift", f"a probability is off by {drift:.3g} times what is allowed")
        if self._model.longest_s() > self._config.timeout_s:  # of several engines one hangs, another answered
            raise self._ill("timeout", f"an engine has run one batch for over {self._config.timeout_s:g} s")
        self._meter.add(CANARY, model=self._model.name, outcome="ok")
        return drift

    def _ill(self, outcome: str, seen: str) -> Unhealthy:
        self._meter.add(CANARY, model=self._model.name, outcome=outcome)
        return Unhealthy(f"the canary of {self._model.name} failed: {seen}")


def _refuse_foreign(model: LoadedModel, found: Float32, probes: Probes) -> None:
    """Refuses an engine whose answers to the probe set are not the FP32 model's."""
    allowed: Tolerance = tolerance_of(model.bundle, model.card.precision)
    wanted = to_probabilities(probes.logits, model.bundle.output)
    lead = wanted.max(axis=1) - wanted[np.arange(len(wanted)), found.argmax(axis=1)]
    max_abs_dp, agreement = float(np.abs(found - wanted).max()), float((lead <= TIE).mean())
    if not max_abs_dp <= allowed.max_abs_dp or agreement < allowed.min_top1_agreement:
        raise ArtifactError(
            f"{model.name} answers its probe set otherwise on {model.card.runtime}: max |dp| {max_abs_dp:.3g}, top-1 "
            f"agrees on {agreement:.1%} of {len(probes)} images",
            expected=f"max |dp| <= {allowed.max_abs_dp:g}, top-1 on >= {allowed.min_top1_agreement:.0%}",
            fix="ask for another runtime, or another version of this engine; if all fail, make the bundle again",
        )
