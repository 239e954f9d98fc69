"""Evidence: what certified a threshold policy: by which images, which claims hold, with which confidence, since when.

It travels inside the policy and decides nothing: two policies that decide alike have one digest, whatever proves them.

Example:
    >>> claim = Claim(kpi="precision(crack)>=0.95@0.95", target=0.95, confidence=0.95, num_trials=93, num_successes=92)
    >>> Claim.from_json(claim.to_json()) == claim
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One constraint of a KPI on the images that certify.

    Attributes:
        kpi: The constraint as text, e.g. ``precision(crack)>=0.95@0.95``.
        target: What was asked for.
        confidence: One-sided, 0..1.
        num_trials: Images that count (of precision: those decided to be the label).
        num_successes: Those of them that the metric counts; None for a mean (cost).
        value: The observed figure; None where no image counts.
        bound: Its exact confidence bound, from the side that the constraint asks for.
        is_met: Whether the bound reaches the target.
    """

    kpi: str
    target: float
    confidence: float
    num_trials: int
    num_successes: int | None
    value: float | None = None
    bound: float | None = None
    is_met: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Claim:
        """Reads what to_json wrote; raises TypeError or KeyError where it is something else."""
        return cls(**{field.name: value[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What certified a policy.

    Attributes:
        kpi: The whole KPI.
        claims: Each of its constraints.
        method: How the threshold was searched and tested, in words.
        corpus: Digest of the corpus.
        split: Name of the split.
        split_digest: Which image of the corpus is in which split.
        num_selection: Images that chose what to test.
        num_certification: Images, of other groups, that tested it.
        model: Digest of the model whose scores were used.
        certified_at: ISO 8601, UTC.
    """

    kpi: str
    claims: tuple[Claim, ...]
    method: str
    corpus: str
    split: str
    split_digest: str
    num_selection: int
    num_certification: int
    model: str
    certified_at: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "claims": [claim.to_json() for claim in self.claims]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evidence:
        """Reads what to_json wrote; raises TypeError or KeyError where it is something else."""
        claims = tuple(Claim.from_json(claim) for claim in value["claims"])
        return cls(**{**{field.name: value[field.name] for field in fields(cls)}, "claims": claims})
