"""The gate: an engine must answer a bundle's probe set as the FP32 model did, or it does not start.

It is asked where a model changes hands: when a bundle is made or exported, when it is compiled on hardware, an engine
or a version that it was not seen on before (a pass is remembered), and so at the start of every deployment. It fails
closed: answers that are off, or not numbers, are an ArtifactError with the engine's name and the figures.

Example:
    >>> check_parity(bundle, "openvino", threads=1)
    Parity(engine='openvino', ..., max_abs_dp=2.1e-07, top1_agreement=1.0, ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eagleray import __version__
from eagleray.core import processor
from eagleray.core.errors import ArtifactError
from eagleray.core.tables import resolve
from eagleray.infer.probabilities import to_probabilities
from eagleray.infer.probes import Probes, ask, generated_images, make_probes, parse_probes, read_probes
from eagleray.infer.runtimes import RUNTIMES, Float32, Runtime, Uint8
from eagleray.infer.runtimes.memory import graphics, recall, remember
from eagleray.vision.bundle import ONNX, PROBES, ModelBundle

MEMORY = "parity"
SCHEMA = 1  # of the remembered pass: a new one forgets the old
STATED = "tolerance"  # key of lineage: what a quantised bundle was measured to need
# Two labels whose probabilities lie nearer than this are one to FP32 engines, which may differ by 1e-4 each
TIE = 2e-4


@dataclass(frozen=True)
class Tolerance:
    """How far an engine's answers may lie from the FP32 model's.

    Attributes:
        max_abs_dp: Largest difference of a probability.
        min_top1_agreement: Least share of probes whose most probable label is the same, 0..1.
        max_embedding_drift: Largest difference of an embedding's value, relative to the largest value (at least 1).
    """

    max_abs_dp: float
    min_top1_agreement: float
    max_embedding_drift: float


# FP32: rounding only, the law of issue 2. FP16 has 11 bits, and a softmax over logits of order 10 turns 2^-11 of them
# into 0.5 %; INT8 is a decision, not a rounding: these are the most that a bundle may state for itself, and what holds
# where it states nothing.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1.0, 1e-4),
    "fp16": Tolerance(0.05, 0.9, 0.05),
    "int8": Tolerance(0.5, 0.75, 0.5),
}
MARGIN = 2.0  # times what was measured: another processor rounds otherwise


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What an engine answered to the probe set.

    Attributes:
        engine: Name of the runtime.
        version: The engine's.
        device: "cpu" or "cuda".
        precision: The engine's arithmetic.
        num_probes: How many images.
        max_abs_dp: Largest difference of a probability; NaN when an answer is not a number.
        top1_agreement: Share of probes with the same most probable label; labels that tie in the reference are one.
        embedding_drift: As Tolerance says; None when no embedding was asked for.
        tolerance: What was allowed.
    """

    engine: str
    version: str
    device: str
    precision: str
    num_probes: int
    max_abs_dp: float
    top1_agreement: float
    embedding_drift: float | None
    tolerance: Tolerance

    @property
    def is_passed(self) -> bool:
        """Whether every figure is within the tolerance."""
        allowed = self.tolerance
        is_near = self.embedding_drift is None or self.embedding_drift <= allowed.max_embedding_drift
        return is_near and self.max_abs_dp <= allowed.max_abs_dp and self.top1_agreement >= allowed.min_top1_agreement

    def to_json(self) -> dict[str, Any]:
        """The figures; those that are not numbers as None."""
        drifts = {"max_abs_dp": self.max_abs_dp, "embedding_drift": self.embedding_drift}
        numbers = {key: value if value is not None and np.isfinite(value) else None for key, value in drifts.items()}
        return {**asdict(self), **numbers, "is_passed": self.is_passed}


def tolerance_of(bundle: ModelBundle, precision: str) -> Tolerance:
    """What a bundle may be off by: FP32's law, or what it states in its lineage, which can only be stricter.

    Raises:
        ArtifactError: It states something else than two numbers, or there is no such precision.
    """
    if precision not in TOLERANCES:
        raise ArtifactError(f"no tolerance for {precision!r}", expected=f"one of {', '.join(TOLERANCES)}")
    most, stated = TOLERANCES[precision], bundle.lineage.get(STATED)
    if precision == "fp32" or stated is None:
        return most
    try:
        own = Tolerance(
            float(stated["max_abs_dp"]), float(stated["min_top1_agreement"]), float(stated["max_embedding_drift"])
        )
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(
            f"{bundle.name} states the tolerance {stated!r}",
            expected="{max_abs_dp, min_top1_agreement, max_embedding_drift}",
        ) from None
    return Tolerance(
        min(own.max_abs_dp, most.max_abs_dp),
        max(own.min_top1_agreement, most.min_top1_agreement),
        min(own.max_embedding_drift, most.max_embedding_drift),
    )


def stated(parity: Parity) -> dict[str, float]:
    """The tolerance that a bundle should state (lineage["tolerance"]) after this was measured where it was made.

    Twice the differences that were found, and one probe in sixteen more; never more than the precision's own.
    """
    most, least = TOLERANCES[parity.precision], TOLERANCES["fp32"]
    dp, drift = MARGIN * parity.max_abs_dp, MARGIN * (parity.embedding_drift or 0.0)
    return {
        "max_abs_dp": round(min(most.max_abs_dp, max(dp, least.max_abs_dp)), 6),
        "min_top1_agreement": round(max(most.min_top1_agreement, parity.top1_agreement - 1 / 16), 6),
        "max_embedding_drift": round(min(most.max_embedding_drift, max(drift, least.max_embedding_drift)), 6),
    }


def prove(bundle: ModelBundle, images_u8_nhwc: Uint8 | None = None) -> bytes:
    """Makes the probe set of a new bundle, and holds its ONNX to it: the gate at export.

    Args:
        bundle: In FP32, as it lies aside.
        images_u8_nhwc: As in make_probes.

    Raises:
        ArtifactError: The ONNX answers otherwise than the weights that it was made of.
        CapabilityError: The reference runtime is not installed.
    """
    data = make_probes(bundle, images_u8_nhwc)
    probes = parse_probes(bundle, data)
    if ONNX in bundle.files and probes.reference["runtime"] != "onnx" and RUNTIMES["onnx"].is_installed:
        refuse(bundle, compare(bundle, _compile(bundle, "onnx", 1, "cpu"), probes, TOLERANCES["fp32"]))
    return data


def check_parity(
    bundle: ModelBundle,
    runtime: Runtime | str,
    *,
    threads: int = 1,
    device: str = "cpu",
    tolerance: Tolerance | None = None,
) -> Parity:
    """Asks an engine the probe set.

    Args:
        bundle: One without a probe set is held to its own weights in the reference runtime, on generated pictures.
        runtime: Compiled from the bundle, or a name of RUNTIMES to compile.
        threads: Of the engine; read when it is to be compiled.
        device: "cpu" or "cuda"; likewise.
        tolerance: What is allowed; None: by the runtime's precision and what the bundle states.

    Returns:
        The figures, whether they pass or not.

    Raises:
        ArtifactError: The bundle or its probe set does not hold.
        CapabilityError, ConfigError: The engine cannot be had.
    """
    if isinstance(runtime, str):
        runtime = _compile(bundle, runtime, threads, device)
    if PROBES not in bundle.files:
        _refuse_unproved(bundle)
    probes = read_probes(bundle) or ask(bundle, generated_images(bundle.image_spec))
    return compare(bundle, runtime, probes, tolerance or tolerance_of(bundle, runtime.precision))


def _refuse_unproved(bundle: ModelBundle) -> None:
    """FP32 bundles are older than probe sets, others are not; held to itself, a quantised graph would always pass."""
    if bundle.precision != "fp32":
        raise ArtifactError(
            f"{bundle.name} is {bundle.precision} and has no probe set",
            expected=f"the {PROBES} of its fp32 parent",
            fix="release it again",
        )


def _compile(bundle: ModelBundle, name: str, threads: int, device: str) -> Runtime:
    """An engine that gives all that the bundle has."""
    kind = resolve(RUNTIMES, name, what="runtime")
    made: Runtime = kind(bundle, threads=threads, device=device, wants_embedding=bundle.embedding_dim is not None)
    return made


def compare(bundle: ModelBundle, runtime: Runtime, probes: Probes, tolerance: Tolerance) -> Parity:
    """The figures of a compiled engine against a probe set."""
    with np.errstate(all="ignore"):  # what is not a number is an answer too: the figures say it
        outputs = runtime.run(probes.images_u8_nhwc)
        found = to_probabilities(outputs.logits, bundle.output)
    wanted = to_probabilities(probes.logits, bundle.output)
    rows = np.arange(len(wanted))
    lead = wanted.max(axis=1) - wanted[rows, found.argmax(axis=1)]
    return Parity(
        engine=runtime.name,
        version=runtime.version,
        device=runtime.device,
        precision=runtime.precision,
        num_probes=len(probes),
        max_abs_dp=float(np.abs(found - wanted).max()),
        top1_agreement=float((lead <= TIE).mean()),
        embedding_drift=_drift(outputs.embedding, probes.embedding),
        tolerance=tolerance,
    )


def _drift(found: Float32 | None, wanted: Float32 | None) -> float | None:
    if found is None or wanted is None:
        return None
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


def refuse(bundle: ModelBundle, parity: Parity) -> None:
    """Raises unless the figures pass.

    Raises:
        ArtifactError: With the engine and the figures.
    """
    if not parity.is_passed:
        allowed = parity.tolerance
        drift = "" if parity.embedding_drift is None else f", the embedding is off by {parity.embedding_drift:.3g}"
        raise ArtifactError(
            f"{bundle.name} fails its probe set on {parity.engine} {parity.version} ({parity.precision}, "
            f"{parity.device}): max |dp| {parity.max_abs_dp:.3g}, top-1 agrees on {parity.top1_agreement:.1%} of "
            f"{parity.num_probes} images{drift}",
            expected=f"max |dp| <= {allowed.max_abs_dp:g}, top-1 on >= {allowed.min_top1_agreement:.0%}, "
            f"the embedding within {allowed.max_embedding_drift:g}",
            fix="ask for another --runtime, or another version of this engine; if all fail, make the bundle again",
        )


def require_parity(bundle: ModelBundle, runtime: Runtime, *, wants_embedding: bool = False) -> Parity | None:
    """The gate at load: asks the probe set unless this bundle passed on this engine and machine before.

    Args:
        bundle: One without a probe set, made before there were any, is let through.
        runtime: Compiled from the bundle.
        wants_embedding: Whether it gives the embedding too: another pass to remember.

    Returns:
        The figures; None when nothing had to be asked.

    Raises:
        ArtifactError: The answers are off.
    """
    if PROBES not in bundle.files:
        _refuse_unproved(bundle)
        return None
    key = {**_key(bundle, runtime), "embedding": wants_embedding}
    if recall(MEMORY, key).get("is_passed") is True:
        return None
    parity = check_parity(bundle, runtime)
    refuse(bundle, parity)
    remember(MEMORY, key, parity.to_json())
    return parity


def _key(bundle: ModelBundle, runtime: Runtime) -> Mapping[str, Any]:
    """All that the answers depend on, and what they are held to."""
    return {
        "schema": SCHEMA,
        "eagleray": __version__,
        "files": dict(bundle.files),
        "labels": len(bundle.labels),
        "output": bundle.output,
        "image_spec": bundle.image_spec.digest,
        "tolerance": asdict(tolerance_of(bundle, runtime.precision)),
        "engine": [runtime.name, runtime.version, runtime.device, runtime.precision],
        "build": getattr(runtime, "build_sha256", ""),  # of a TensorRT engine: another build is asked again
        "processor": processor.identity(),
        "graphics": graphics() if runtime.device == "cuda" else {},
    }
