"""Where and how images are scored: the fields that every flow with a scoring run of its own shares.

Example:
    >>> class ScoreConfig(ScoringPlace): ...
    >>> ScoreConfig(**scoring_place(evaluation))
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from eagleray.core.config import Config
from eagleray.infer.runtimes import RUNTIMES


def _known(value: str) -> str:
    if value != "auto" and value not in RUNTIMES:
        raise ValueError(f"unknown runtime; one of auto, {', '.join(RUNTIMES)}")
    return value


RuntimeName = Annotated[str, AfterValidator(_known)]


class ScoringPlace(Config):
    """Where and how.

    Attributes:
        runtime: ``auto`` or a name of RUNTIMES.
        address: A Ray cluster; default RAY_ADDRESS, else an embedded one.
        workers: Workers; 0 = one per core or accelerator.
        num_cpus: Logical CPUs a worker holds on Ray.
        num_gpus: Accelerators a worker holds on Ray; above 0 the engine runs on CUDA.
        threads: Engine threads a worker.
        decode_threads: Decoding threads a worker; none = by device, 0 = decode in turn with the engine.
        batch_size: Images an engine call takes.
        in_process_below: Fewer images than this are scored on this machine without Ray.
    """

    runtime: RuntimeName = "auto"
    address: str | None = None
    workers: int = Field(0, ge=0)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1)
    decode_threads: int | None = Field(None, ge=0)
    batch_size: int = Field(32, ge=1, le=4096)
    in_process_below: int = Field(256, ge=0)


def scoring_place(config: ScoringPlace) -> dict[str, Any]:
    """These fields of a config, for another's."""
    return {name: getattr(config, name) for name in ScoringPlace.model_fields}
