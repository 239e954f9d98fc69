"""What a model said about one image, and the policy that turns scores into a decision.

assure *finds* a ThresholdPolicy, the bundle *keeps* it, Classifier *applies* it: one definition, so that bulk, online
and in-process answers cannot differ. Refuses a policy for labels that a model does not have.

Example:
    >>> policy = ThresholdPolicy(thresholds={"crack": 0.3, "ok": 0.9}, otherwise="inspect")
    >>> decide(policy, ("crack", "ok"), np.float32([[0.4, 0.6]]))
    ['crack']
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError
from eagleray.vision.evidence import Evidence

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Status = Literal["scored", "quarantined"]
Scaling = Literal["softmax", "sigmoid"]
SCHEMA = 1
POLICY_SCHEMA = 2  # 2: temperature and floor, which change what is decided; a policy without them is still written as 1


@dataclass(frozen=True)
class Label:
    """One class: a stable id (a WordNet id, a folder name) and the name that a person reads."""

    id: str
    name: str

    def to_json(self) -> dict[str, str]:
        """The label as JSON."""
        return {"id": self.id, "name": self.name}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model said about one image, or why it said nothing.

    Attributes:
        schema: Number of this record's format.
        task: "classify".
        status: "scored" or "quarantined".
        reason: Reason code when quarantined (images.Reason), else None.
        detail: The reason in words, or "".
        label: Id of the most probable label; None when quarantined.
        label_name: Its name.
        score: Its probability, 0..1.
        topk: (label id, probability), most probable first.
        decision: What the bundle's ThresholdPolicy decides; None without a policy.
        embedding: float16, shape (embedding_dim,), when it was asked for.
        model_digest: Digest of the model that answered.
    """

    schema: int = SCHEMA
    task: str = "classify"
    status: Status
    reason: str | None = None
    detail: str = ""
    label: str | None = None
    label_name: str | None = None
    score: float | None = None
    topk: tuple[tuple[str, float], ...] = ()
    decision: str | None = None
    embedding: npt.NDArray[np.float16] | None = field(default=None, compare=False, repr=False)
    model_digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """The prediction as JSON; the embedding as a list of numbers."""
        return {
            "schema": self.schema,
            "task": self.task,
            "status": self.status,
            "reason": self.reason,
            "detail": self.detail,
            "label": self.label,
            "label_name": self.label_name,
            "score": self.score,
            "topk": [[label, score] for label, score in self.topk],
            "decision": self.decision,
            "embedding": None if self.embedding is None else [float(value) for value in self.embedding],
            "model_digest": self.model_digest,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Prediction:
        """Reads what to_json wrote.

        Raises:
            ArtifactError: A newer schema, or a key missing or unknown.
        """
        refuse_newer(value, SCHEMA, "prediction")
        try:
            embedding = value["embedding"]
            return cls(
                **{
                    **value,
                    "topk": tuple((str(label), float(score)) for label, score in value["topk"]),
                    "embedding": None if embedding is None else np.asarray(embedding, np.float16),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"not a prediction: {error}", expected="what Prediction.to_json writes") from None


@dataclass(frozen=True)
class ThresholdPolicy:
    """From probabilities to a decision.

    An image is decided to be the label of highest probability among those that reach their own threshold and the floor;
    when none does, the decision is ``otherwise``. A label without a threshold is never decided, unless the policy holds
    no threshold at all: then every label has the floor alone, and without one the most probable label is the decision.

    Thresholds and floor are compared with probabilities at the policy's temperature. Label, score and top-k of a
    Prediction stay the model's own: they say what the model said, under any policy and under none.

    Attributes:
        thresholds: Label id to the lowest probability, 0..1, at which it may be decided.
        otherwise: The decision when no label reaches its threshold.
        floor: The lowest probability at which any label may be decided: below it the policy abstains.
        temperature: Above 1 probabilities are softened before they are compared, below 1 sharpened.
        scaling: How a temperature acts: ``softmax`` on one distribution an image, ``sigmoid`` on each label for itself.
        evidence: What certified it; None for one set by hand. Decides nothing and is not in the digest.
        schema: Number of the newest format that this version reads.
    """

    thresholds: Mapping[str, float] = field(default_factory=dict)
    otherwise: str = "abstain"
    floor: float = 0.0
    temperature: float = 1.0
    scaling: Scaling = "softmax"
    evidence: Evidence | None = None
    schema: int = POLICY_SCHEMA

    def __post_init__(self) -> None:
        named = [*self.thresholds.items(), *([("floor", self.floor)] if self.floor != 0 else [])]
        wrong = [f"{name}: {value!r}" for name, value in named if not _is_number(value) or not 0 <= value <= 1]
        if wrong:
            raise ConfigError(f"not thresholds: {', '.join(wrong)}", expected="numbers from 0 to 1", fix="correct them")
        if not _is_number(self.temperature) or self.temperature <= 0 or self.scaling not in get_args(Scaling):
            raise ConfigError(
                f"temperature {self.temperature!r} by {self.scaling!r}",
                expected=f"a number above 0, by {' or '.join(get_args(Scaling))}",
                fix="correct them",
            )

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the canonical JSON of what decides: the evidence is not in it."""
        return digest_json({name: item for name, item in self.to_json().items() if name != "evidence"})

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON; what it does not use is left out, so that an older policy reads and digests as it did."""
        more: dict[str, Any] = {}
        if self.floor:
            more["floor"] = float(self.floor)
        if self.temperature != 1:
            more |= {"temperature": float(self.temperature), "scaling": self.scaling}
        return {
            "schema": POLICY_SCHEMA if more else 1,
            "thresholds": {label: float(value) for label, value in self.thresholds.items()},
            "otherwise": self.otherwise,
            **more,
            **({"evidence": self.evidence.to_json()} if self.evidence else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ThresholdPolicy:
        """Reads what to_json wrote.

        Raises:
            ArtifactError: A newer schema, or something that is not a policy.
        """
        refuse_newer(value, POLICY_SCHEMA, "threshold policy")
        try:
            evidence = value.get("evidence")
            return cls(
                thresholds=dict(value["thresholds"]),
                otherwise=str(value["otherwise"]),
                floor=value.get("floor", 0.0),
                temperature=value.get("temperature", 1.0),
                scaling=value.get("scaling", "softmax"),
                evidence=None if evidence is None else Evidence.from_json(evidence),
            )
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise ArtifactError(f"not a threshold policy: {error}", expected="{thresholds, otherwise}") from None


def decide(policy: ThresholdPolicy | None, label_ids: Sequence[str], probabilities: Float32) -> list[str | None]:
    """Applies a policy to a batch.

    Args:
        policy: The policy; None decides nothing.
        label_ids: The C label ids in the model's order.
        probabilities: float32, shape (N, C).

    Returns:
        N decisions: a label id or ``policy.otherwise``; None throughout without a policy.

    Raises:
        ArtifactError: The policy names a label that is not among label_ids.
    """
    if policy is None:
        return [None] * len(probabilities)
    said = (*label_ids, policy.otherwise)  # -1, no label, is the last
    return [said[index] for index in decided(policy, label_ids, probabilities).tolist()]


def decided(policy: ThresholdPolicy, label_ids: Sequence[str], probabilities: Float32) -> Int64:
    """What ``decide`` says as indices: int64 (N,), -1 where no label is decided.

    Args:
        policy: The policy.
        label_ids: The C label ids in the model's order.
        probabilities: float32, shape (N, C), as the model gives them.

    Raises:
        ArtifactError: The policy names a label that is not among label_ids.
    """
    check_labels(policy, label_ids)
    never = 0.0 if not policy.thresholds else math.inf
    lowest = [max(policy.thresholds.get(label, never), policy.floor) for label in label_ids]
    floors = np.array(lowest, np.float32)  # as scores are kept
    tempered = temper(probabilities, policy.temperature, policy.scaling)
    passing = np.where(tempered >= floors, tempered, np.float32(-1.0))
    best = passing.argmax(axis=1)
    is_decided = passing[np.arange(len(passing)), best] >= 0
    return np.asarray(np.where(is_decided, best, -1), np.int64)


def temper(probabilities: Float32, temperature: float, scaling: Scaling = "softmax") -> Float32:
    """Probabilities as the model would give them if its logits were divided by a temperature.

    softmax(z / T) is softmax(z)^(1/T), scaled to sum to 1: no logits are needed.

    Args:
        probabilities: float32, shape (N, C).
        temperature: T > 0; at 1 they come back as they are.
        scaling: ``softmax``, or ``sigmoid`` for labels that each stand for themselves.

    Returns:
        float32, shape (N, C).

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 9.
    """
    if temperature == 1 or not len(probabilities):
        return probabilities
    exact = probabilities.astype(np.float64)
    if scaling == "sigmoid":
        rest = 1.0 - exact
        larger = np.maximum(exact, rest)
        yes, no = (exact / larger) ** (1 / temperature), (rest / larger) ** (1 / temperature)
        return np.asarray(yes / (yes + no), np.float32)
    powers = (exact / np.maximum(exact.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)) ** (1 / temperature)
    total = np.maximum(powers.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return np.asarray(powers / total, np.float32)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def check_labels(policy: ThresholdPolicy, label_ids: Sequence[str]) -> None:
    """Refuses a policy for labels that the model does not have.

    Raises:
        ArtifactError: Names those labels.
    """
    foreign = sorted(set(policy.thresholds) - set(label_ids))
    if foreign:
        raise ArtifactError(
            f"the threshold policy names {len(foreign)} labels that the model lacks: {', '.join(foreign[:5])}",
            expected="ids among the bundle's labels",
            fix="find the thresholds again for this model",
        )


def refuse_newer(value: Any, schema: int, what: str) -> None:
    """Refuses a record that is not an object, or of a schema that this version does not know.

    Raises:
        ArtifactError: With what to do.
    """
    number = value.get("schema") if isinstance(value, Mapping) else None
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ArtifactError(f"not a {what}: it has no schema number", expected=f"a {what} of schema {schema}")
    if number > schema:
        raise ArtifactError(
            f"the {what} has schema {number}, newer than this version's {schema}",
            expected=f"schema {schema} or older",
            fix="install a newer eagleray",
        )
