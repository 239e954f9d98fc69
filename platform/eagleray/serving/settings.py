"""What a service is told, in one typed value: its models, batches, limits, SLO, who may ask, and where it listens.

Groups that belong together are Configs of their own, so that a part takes what it needs and no more. What two groups
say about one another is checked here, at deploy, with all faults at once: a replica that may hold fewer requests than
its largest batch would never fill one, a service without keys is for this machine's loopback alone, and a deadline
below the latency that is promised would refuse every request.

Example:
    >>> config = ServingConfig(models=(ModelEntry(name="lite0", bundle="models/lite0"),), access={"auth": "none"})
    >>> config.batching.sizes("cpu")
    (1, 2, 4, 8)
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from eagleray.core.config import Config
from eagleray.infer.runtimes import CHUNK, RUNTIMES
from eagleray.vision.images import Limits

BATCHES_ONGOING = 2  # one runs while the next is decoded: fewer requests than that leave the engine waiting
BUCKETS = {"cpu": (1, 2, 4, CHUNK), "cuda": (1, 2, 4, 8, 16, 32)}
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # stands in URLs, metrics and scopes as it is


def _known_runtime(value: str) -> str:
    if value != "auto" and value not in RUNTIMES:
        raise ValueError(f"unknown runtime; one of auto, {', '.join(RUNTIMES)}")
    return value


def _plain_name(value: str) -> str:
    if not MODEL_NAME.fullmatch(value):
        raise ValueError("a model's name is 1 to 64 of A-Z a-z 0-9 . _ -, and begins with a letter or digit")
    return value


class ModelEntry(Config):
    """One model of a service.

    Attributes:
        name: Its name in URLs, scopes and metrics.
        bundle: The bundle's folder.
        digest: The bundle's model_digest when the service was deployed: a replica that starts later refuses another
            model in the same folder. None: whatever lies there.
        runtime: ``auto`` or a name of RUNTIMES.
        device: Where the engine runs.
        threads: Of one engine.
        engines: Engines of this model in a replica; each takes batches by itself. On a CPU two engines of one thread
            answer more requests a second than one of two threads where the model is light (docs/log.md).
    """

    name: Annotated[str, AfterValidator(_plain_name)]
    bundle: str = Field(min_length=1)
    digest: str | None = Field(None, min_length=1)
    runtime: Annotated[str, AfterValidator(_known_runtime)] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(1, ge=1, le=256)
    engines: int = Field(1, ge=1, le=64)


class BatchingConfig(Config):
    """How images become batches.

    Attributes:
        buckets: Batch sizes that are run once before a replica is ready, rising; none is larger than the last. None =
            by the device: on a CPU, whose engines take CHUNK images at a time and are no faster in larger batches, a
            larger one would only make its images wait for one another.
        decode_threads: Threads that decode; none = one a core.
    """

    buckets: tuple[int, ...] | None = None
    decode_threads: int | None = Field(None, ge=1, le=256)

    @field_validator("buckets")
    @classmethod
    def _rising(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        if not value or value[0] < 1 or value[-1] > 1024 or any(a >= b for a, b in itertools.pairwise(value)):
            raise ValueError("buckets are rising batch sizes, 1 to 1024, at least one")
        return value

    def sizes(self, device: str) -> tuple[int, ...]:
        """The buckets of a model on a device; the last is the most that its engine is given at a time."""
        return self.buckets or BUCKETS[device]


class LimitsConfig(Config):
    """What one request, and all of them together, may take.

    Attributes:
        max_body_bytes: The largest body that is read.
        body_timeout_s: The longest time in which a body must have come, and in which an answer must have been taken.
        max_images_per_request: Images of one request.
        deadline_s: A request's deadline where it names none, and the longest that it may name.
        max_queue_s: An image whose estimated wait is longer is refused at once; none = the SLO's latency.
        head_timeout_s: The longest time in which a request's head must have come.
        max_head_bytes: The largest head.
        max_connections: Open connections of one proxy.
        max_buffered_bytes: All bodies that one proxy holds while they come.
        max_json_depth: Levels of a JSON body.
        max_ongoing_requests: Requests that a replica holds at a time.
        max_queued_requests: Requests that wait for a replica, at most.
        max_pixels: Pixels of one image.
        max_side_px: Its longest side.
        large_pixels: Images of more pixels than this are decoded on a thread of their own, beside the others.
    """

    max_body_bytes: int = Field(16 * 2**20, ge=1024, le=2**30)
    body_timeout_s: float = Field(10.0, gt=0, le=600)
    max_images_per_request: int = Field(32, ge=1, le=1024)
    deadline_s: float = Field(10.0, gt=0, le=600)
    max_queue_s: float | None = Field(None, gt=0, le=600)
    head_timeout_s: float = Field(10.0, gt=0, le=600)
    max_head_bytes: int = Field(32 * 2**10, ge=1024, le=2**20)
    max_connections: int = Field(2_000, ge=1, le=1_000_000)
    max_buffered_bytes: int = Field(512 * 2**20, ge=2**20)
    max_json_depth: int = Field(8, ge=2, le=64)
    max_ongoing_requests: int = Field(256, ge=1, le=100_000)
    max_queued_requests: int = Field(256, ge=0, le=100_000)
    max_pixels: int = Field(Limits().max_pixels, ge=1)
    max_side_px: int = Field(Limits().max_side_px, ge=1)
    large_pixels: int = Field(16_000_000, ge=1)

    @property
    def image_limits(self) -> Limits:
        """The caps on one image, as the decoder takes them."""
        return Limits(max_pixels=self.max_pixels, max_side_px=self.max_side_px, max_bytes=self.max_body_bytes)


class SloConfig(Config):
    """What is promised.

    Attributes:
        latency_p99_ms: 99 of 100 requests are answered within this.
        availability: Share of requests that do not fail, 0..1.
    """

    latency_p99_ms: float = Field(100.0, gt=0)
    availability: float = Field(0.999, gt=0, lt=1)


class AutoscaleConfig(Config):
    """How many replicas there are.

    Attributes:
        min_replicas: The fewest; 0 = none while nobody asks.
        max_replicas: The most.
        target_utilization: Share of the time in which an engine should run, 0..1.
        queue_share: Part of the SLO's latency that an image may spend waiting before replicas are added, 0..1.
        max_growth: A step up multiplies the replicas by this at most.
        upscale_after_s: So long must the load be too high before replicas are added.
        downscale_after_s: So long must it have been low before they are taken away.
        idle_after_s: So long must nothing have come before the last one goes, where min_replicas is 0.
        period_s: How often it is looked.
    """

    min_replicas: int = Field(1, ge=0, le=10_000)
    max_replicas: int = Field(1, ge=1, le=10_000)
    target_utilization: float = Field(0.7, gt=0, lt=1)
    queue_share: float = Field(0.25, gt=0, le=1)
    max_growth: float = Field(2.0, gt=1, le=16)
    upscale_after_s: float = Field(2.0, ge=0)
    downscale_after_s: float = Field(60.0, ge=0)
    idle_after_s: float = Field(300.0, ge=0)
    period_s: float = Field(1.0, gt=0, le=60)


class CanaryConfig(Config):
    """How a replica's health is checked.

    Attributes:
        period_s: Between two checks.
        timeout_s: A check that takes longer is a failed one: the engine hangs.
    """

    period_s: float = Field(2.0, gt=0, le=600)
    timeout_s: float = Field(5.0, gt=0, le=600)


class MemoryConfig(Config):
    """How much of a machine a replica takes.

    Attributes:
        max_loaded_models: Models in memory at a time; the one that was asked longest ago makes room, the first stays.
        gpu_memory_mib: GPU memory that all loaded models may take; needed where one runs on CUDA.
        gpus: GPUs that a replica holds; a fraction shares one.
        cpus: Logical CPUs that a replica holds.
    """

    max_loaded_models: int = Field(4, ge=1, le=1000)
    gpu_memory_mib: int | None = Field(None, ge=64)
    gpus: float = Field(0.0, ge=0, le=1)
    cpus: float = Field(1.0, gt=0, le=1024)


class RateConfig(Config):
    """What a tenant may ask where its key says nothing else.

    Attributes:
        images_per_s: Sustained rate.
        burst: Images at once on top of it.
        images_per_day: Quota; none = no quota.
        max_tenants: Tenants whose counters are kept; the one that asked longest ago is forgotten.
    """

    images_per_s: float = Field(1_000.0, gt=0)
    burst: int = Field(2_000, ge=1)
    images_per_day: int | None = Field(None, ge=1)
    max_tenants: int = Field(10_000, ge=1)


class AccessConfig(Config):
    """Who may ask.

    Attributes:
        auth: ``keys``, or ``none``: everybody who reaches this machine's loopback.
        keys_file: The file of hashed keys (serving/access.py).
    """

    auth: Literal["keys", "none"] = "keys"
    keys_file: str | None = None


class HttpConfig(Config):
    """Where the service listens.

    Attributes:
        host: An address; ``0.0.0.0`` is every one of this machine.
        port: 0 = any that is free.
        proxy: ``python``: Serve's own; ``haproxy``: several times faster, binds every address.
        tls_cert, tls_key: PEM files; both or none.
    """

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    proxy: Literal["python", "haproxy"] = "python"
    tls_cert: str | None = None
    tls_key: str | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it; HAProxy mode binds every address whatever ``host`` says."""
        if self.proxy == "haproxy":
            return False
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class BehaviorConfig(Config):
    """How a service behaves, whatever its models and whoever may ask.

    Attributes:
        batching, limits, slo, autoscale, canary, memory, rates: See there.
        drain_s: How long a replica that goes may take to answer what it holds.
    """

    batching: BatchingConfig = Field(default_factory=BatchingConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    slo: SloConfig = Field(default_factory=SloConfig)
    autoscale: AutoscaleConfig = Field(default_factory=AutoscaleConfig)
    canary: CanaryConfig = Field(default_factory=CanaryConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    rates: RateConfig = Field(default_factory=RateConfig)
    drain_s: float = Field(20.0, gt=0, le=600)


class ServingConfig(BehaviorConfig):
    """A service.

    Attributes:
        models: At least one; the first answers where none is named.
        access, http: See there.
        batching, limits, slo, autoscale, canary, memory, rates, drain_s: As in BehaviorConfig.
    """

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    access: AccessConfig = Field(default_factory=AccessConfig)
    http: HttpConfig = Field(default_factory=HttpConfig)

    @model_validator(mode="after")
    def _consistent(self) -> ServingConfig:
        faults = [*_batch_faults(self), *_scale_faults(self), *_device_faults(self), *_access_faults(self)]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def max_queue_s(self) -> float:
        """An image that would wait longer than this is refused at once."""
        return self.limits.max_queue_s or self.slo.latency_p99_ms / 1000

    def entry(self, name: str) -> ModelEntry | None:
        """A model's entry by name."""
        return next((entry for entry in self.models if entry.name == name), None)


def _batch_faults(config: ServingConfig) -> Iterator[str]:
    """Queues and batches that do not fit one another."""
    limits = config.limits
    most = max(config.models, key=lambda entry: entry.engines * config.batching.sizes(entry.device)[-1])
    largest, engines = config.batching.sizes(most.device)[-1], most.engines
    least = BATCHES_ONGOING * largest * engines
    if limits.max_ongoing_requests < least:
        yield (
            f"limits.max_ongoing_requests={limits.max_ongoing_requests} cannot fill batches of {largest}: at least "
            f"{least} ({BATCHES_ONGOING} batches for each of {engines} engines), or a smaller last bucket"
        )
    if 0 < limits.max_queued_requests < largest:
        yield (
            f"limits.max_queued_requests={limits.max_queued_requests} is less than one batch of {largest}: "
            f"{largest} or more, or 0 to refuse whatever a replica cannot hold"
        )
    if limits.deadline_s * 1000 < config.slo.latency_p99_ms:
        yield (
            f"limits.deadline_s={limits.deadline_s:g} is below slo.latency_p99_ms={config.slo.latency_p99_ms:g}: "
            "what is promised must fit in the deadline"
        )
    if limits.max_buffered_bytes < limits.max_body_bytes:
        yield (
            f"limits.max_buffered_bytes={limits.max_buffered_bytes} is below limits.max_body_bytes="
            f"{limits.max_body_bytes}: the largest body would never be read"
        )
    if limits.max_queue_s is not None and limits.max_queue_s > limits.deadline_s:
        yield f"limits.max_queue_s={limits.max_queue_s:g} is above limits.deadline_s={limits.deadline_s:g}"


def _scale_faults(config: ServingConfig) -> Iterator[str]:
    """Replicas and rates."""
    scale, rates = config.autoscale, config.rates
    if scale.min_replicas > scale.max_replicas:
        yield f"autoscale.min_replicas={scale.min_replicas} is above autoscale.max_replicas={scale.max_replicas}"
    if rates.images_per_day is not None and rates.burst > rates.images_per_day:
        yield f"rates.burst={rates.burst} is above rates.images_per_day={rates.images_per_day}"
    if config.limits.max_images_per_request > rates.burst:
        yield (
            f"rates.burst={rates.burst} is below limits.max_images_per_request="
            f"{config.limits.max_images_per_request}: the largest request would always be refused"
        )


def _device_faults(config: ServingConfig) -> Iterator[str]:
    """Names, devices and memory."""
    names = [entry.name for entry in config.models]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"models: {name} stands twice"
    for entry in config.models:
        if entry.device == "cuda" and entry.runtime == "openvino":
            yield f"models: {entry.name} asks for openvino on cuda; use tensorrt, onnx or torch"
        if entry.device == "cpu" and entry.runtime == "tensorrt":
            yield f"models: {entry.name} asks for tensorrt on the cpu; set its device to cuda"
    on_gpu = [entry.name for entry in config.models if entry.device == "cuda"]
    if on_gpu and config.memory.gpus == 0:
        yield f"memory.gpus is 0 and {', '.join(on_gpu)} run on cuda: give a GPU or a part of one, such as 0.5"
    if on_gpu and config.memory.gpu_memory_mib is None:
        yield f"memory.gpu_memory_mib is missing: {', '.join(on_gpu)} run on cuda"


def _access_faults(config: ServingConfig) -> Iterator[str]:
    """Who may ask, and from where."""
    access, http = config.access, config.http
    if access.auth == "keys" and access.keys_file is None:
        yield "access.keys_file is missing: make one with `eagleray apikeys create`, or access.auth=none on loopback"
    if access.auth == "none" and http.proxy == "haproxy":
        yield "access.auth=none with http.proxy=haproxy: that mode binds every address, so it needs keys"
    elif access.auth == "none" and not http.is_loopback:
        yield f"access.auth=none on {http.host}: without keys a service listens on 127.0.0.1 only"
    if (http.tls_cert is None) != (http.tls_key is None):
        yield "http.tls_cert and http.tls_key go together: give both or none"
