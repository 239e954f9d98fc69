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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError

Float32 = npt.NDArray[np.float32]
Status = Literal["scored", "quarantined"]
SCHEMA = 1


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

    An image is decided to be the label of highest probability among those that reach their own threshold; when none
    does, the decision is ``otherwise``. A label without a threshold is never decided, unless the policy holds no
    threshold at all: then the most probable label is the decision.

    Attributes:
        thresholds: Label id to the lowest probability, 0..1, at which it may be decided.
        otherwise: The decision when no label reaches its threshold.
        schema: Number of this record's format.
    """

    thresholds: Mapping[str, float] = field(default_factory=dict)
    otherwise: str = "abstain"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        wrong = [
            f"{label}: {value!r}"
            for label, value in self.thresholds.items()
            if isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not 0 <= value <= 1
        ]
        if wrong:
            raise ConfigError(f"not thresholds: {', '.join(wrong)}", expected="numbers from 0 to 1", fix="correct them")

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the canonical JSON."""
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON."""
        return {
            "schema": self.schema,
            "thresholds": {label: float(value) for label, value in self.thresholds.items()},
            "otherwise": self.otherwise,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ThresholdPolicy:
        """Reads what to_json wrote.

        Raises:
            ArtifactError: A newer schema, or something that is not a policy.
        """
        refuse_newer(value, SCHEMA, "threshold policy")
        try:
            return cls(thresholds=dict(value["thresholds"]), otherwise=str(value["otherwise"]))
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
    check_labels(policy, label_ids)
    never = 0.0 if not policy.thresholds else math.inf
    floors = np.array([policy.thresholds.get(label, never) for label in label_ids], np.float32)  # as scores are kept
    passing = np.where(probabilities >= floors, probabilities, -1.0)
    best = passing.argmax(axis=1)
    is_decided = passing[np.arange(len(passing)), best] >= 0
    return [
        label_ids[index] if found else policy.otherwise
        for index, found in zip(best.tolist(), is_decided.tolist(), strict=True)
    ]


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
