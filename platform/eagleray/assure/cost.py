"""What scoring a million images costs on a kind of node, from seconds that were measured; and what is cheapest.

The model is plain and says what it does not know. Work on CPUs is a number of core-seconds an image (decoding, the
model, writing), measured here; a node of n cores is taken to do n times that, a core of it what a core here does. So a
figure for another node is an estimate, and there is none where nothing was measured that could carry over: another
processor architecture, or a GPU that was not there. With a GPU the slower of the two halves sets the pace: its cores
decode while it computes.

Example:
    >>> price(Work(core_s_per_image=0.014), NodeShape(name="c7i.4xlarge", cores=16, usd_per_hour=0.714)).usd_per_million
    0.1735...
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from eagleray.core.config import Config

LOCAL = "local"  # the name of the shape that stands for the machine that measures
MILLION = 1_000_000


class NodeShape(Config):
    """A kind of node and its price.

    Attributes:
        name: As its provider has it, or LOCAL.
        provider, region: Where it is rented.
        cores: What the operating system counts: vCPUs on a cloud.
        memory_gib: Of the node.
        processor: As ``platform.machine`` says it, ``x86_64`` or ``aarch64``.
        gpu: The GPU's name as its driver says it, in part (``L4``, ``H100``); empty: none.
        num_gpus: How many.
        usd_per_hour: None: not known, and no cost is said.
        source, as_of: Where and when the price was read; both indicative.
    """

    name: str = Field(min_length=1)
    provider: str = ""
    region: str = ""
    cores: int = Field(ge=1)
    memory_gib: float | None = Field(None, gt=0)
    processor: str = "x86_64"
    gpu: str = ""
    num_gpus: int = Field(0, ge=0)
    usd_per_hour: float | None = Field(None, ge=0)
    source: str = ""
    as_of: str = ""


@dataclass(frozen=True)
class Work:
    """What one image takes, as measured.

    Attributes:
        core_s_per_image: Core-seconds on CPUs: all of the work, or what is left for them beside a GPU.
        gpu_s_per_image: Seconds of one GPU; 0 where none was used.
        gpu: Its name as the driver says it.
        processor: Architecture of the machine that measured.
        what: What was measured, for the page.
    """

    core_s_per_image: float
    gpu_s_per_image: float = 0.0
    gpu: str = ""
    processor: str = ""
    what: str = ""

    @property
    def machine(self) -> str:
        """The architecture; this machine's where none is said."""
        return self.processor or platform.machine()


@dataclass(frozen=True)
class Cost:
    """A million images on one kind of node.

    Attributes:
        shape: The node.
        images_per_s: Of one node; None where it cannot be said.
        hours_per_million: Of one node.
        usd_per_million: None also where the price is not known.
        why: Why there is no figure, or on what it rests.
    """

    shape: NodeShape
    images_per_s: float | None
    hours_per_million: float | None
    usd_per_million: float | None
    why: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "shape": self.shape.name,
            "cores": self.shape.cores,
            "gpu": self.shape.gpu,
            "usd_per_hour": self.shape.usd_per_hour,
            "images_per_s": _rounded(self.images_per_s, 2),
            "hours_per_million": _rounded(self.hours_per_million, 4),
            "usd_per_million": _rounded(self.usd_per_million, 4),
            "why": self.why,
        }


def price(work: Work, shape: NodeShape) -> Cost:
    """What a million images cost on one kind of node.

    Args:
        work: Measured.
        shape: The node.
    """
    reason = _unmeasured(work, shape)
    if reason:
        return Cost(shape, None, None, None, reason)
    rates = [shape.cores / work.core_s_per_image] if work.core_s_per_image else []
    if work.gpu_s_per_image:
        rates.append(shape.num_gpus / work.gpu_s_per_image)
    rate = min(rates)
    hours = MILLION / rate / 3600
    usd = None if shape.usd_per_hour is None else hours * shape.usd_per_hour
    is_here = shape.name == LOCAL
    why = "measured on this machine" if is_here else "estimated: a core there is taken to do what a core here does"
    if usd is None:
        why += "; its price is not known"
    return Cost(shape, rate, hours, usd, why)


def _unmeasured(work: Work, shape: NodeShape) -> str:
    """Why nothing that was measured says anything about this node; empty when something does."""
    if not work.core_s_per_image and not work.gpu_s_per_image:
        return "not measured: no image was scored in this run"
    if shape.processor != work.machine:
        return f"not measured on {shape.processor}"
    if shape.gpu and not work.gpu_s_per_image:
        return f"not measured on a GPU ({shape.gpu})"
    if shape.gpu and shape.gpu.casefold() not in work.gpu.casefold():
        return f"measured on {work.gpu}, not on {shape.gpu}"
    if work.gpu_s_per_image and not shape.gpu:
        return "measured on a GPU, not on CPUs alone"
    return ""


@dataclass(frozen=True)
class Cheapest:
    """The bundle, and the node, on which a million images cost least."""

    bundle: str
    cost: Cost

    @property
    def text(self) -> str:
        """In words."""
        return f"{self.bundle} on {self.cost.shape.name}: {dollars(self.cost.usd_per_million)} for a million images"


def cheapest(costs: Mapping[str, Sequence[Cost]], *, meets: Iterable[str]) -> Cheapest | None:
    """The least cost among the bundles that meet what is asked of them; None where no cost is known.

    Args:
        costs: Bundle name to its cost on each shape.
        meets: Names of those that meet the KPI.
    """
    known = [Cheapest(name, cost) for name in meets for cost in costs.get(name, ()) if cost.usd_per_million is not None]
    return min(known, key=lambda found: found.cost.usd_per_million or 0.0, default=None)


def dollars(usd: float | None) -> str:
    """A price as it is read: ``$0.17``, ``$1.4``, ``$120``; a dash where it is not known."""
    if usd is None:
        return "–"
    return f"${usd:,.0f}" if usd >= 100 else f"${usd:.2g}" if usd < 0.1 else f"${usd:.2f}"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
