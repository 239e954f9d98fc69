"""TensorRT: the fastest engine on NVIDIA GPUs. Pinned double buffers, a CUDA graph for each batch size, no torch.

Two lanes, each with a stream, buffers and contexts of its own, take chunks in turn: while one computes, the pixels of
the next chunk are copied into the other's pinned memory and cross to the device. A chunk has one of the fixed batch
sizes that the engine was built for; the last is filled up. Copy, run and copy back are captured once as a CUDA graph.

The engine is built from the bundle's ONNX when the cache (engine_cache.py) holds none for this graph, GPU, driver and
version of the library.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.core.storage import sha256_bytes
from eagleray.infer.export import with_preprocessing
from eagleray.infer.runtimes import (
    Float32,
    Outputs,
    Uint8,
    check_request,
    check_width,
    cuda_driver,
    engine_cache,
    tensor_rt_api,
)
from eagleray.infer.runtimes.cuda_driver import CudaDriver, Pinned
from eagleray.infer.runtimes.engine_build import BuildSettings, Target, build_engine
from eagleray.infer.runtimes.tensor_rt_api import Context, Engine, Library, make_log
from eagleray.vision.bundle import ONNX, ModelBundle
from eagleray.vision.onnx_graph import IMAGE, parse

NUM_LANES = 2
FLOAT_BYTES = 4


class TensorRt:
    """A bundle's model.onnx in TensorRT, on a GPU.

    Args:
        bundle: A bundle that holds model.onnx.
        threads: Not used: the work is the GPU's.
        device: "cuda".
        wants_embedding: Whether run gives the embedding too.

    Raises:
        ArtifactError: The graph cannot be built, or its width does not fit the labels.
        CapabilityError: Another device than CUDA is asked for, there is none, or the library does not build for it.
        ConfigError: The bundle gives no embedding and it is wanted.
    """

    name = "tensorrt"
    device = "cuda"

    def __init__(
        self, bundle: ModelBundle, *, threads: int, device: str = "cpu", wants_embedding: bool = False
    ) -> None:
        check_request(bundle, runtime=self.name, device=device, wants_embedding=wants_embedding)
        if device != "cuda":
            raise CapabilityError(
                f"runtime 'tensorrt' does not run on {device}",
                expected="an NVIDIA GPU, asked for as device cuda (score: num_gpus above 0)",
                fix="ask for --runtime onnx or openvino",
            )
        self.precision: str = bundle.precision
        library = tensor_rt_api.load_library()
        self.version = library.version
        self._driver = cuda_driver.open_driver()
        self._finalize = weakref.finalize(self, self._driver.close)  # before anything on the device can fail
        self._finalize.atexit = False  # the process's end frees all of it, and the driver may be gone before us
        onnx = with_preprocessing(bundle.read_verified(ONNX), bundle)
        self._settings = settings_of(onnx)
        key = make_key(library, onnx, target_of(self._driver), self._settings)
        log = make_log(library)
        self._library_runtime = library.module.Runtime(log)
        built = provide(library, onnx, key)
        self.size_bytes, self.build_sha256 = len(built), sha256_bytes(built)
        engine: Engine | None = self._library_runtime.deserialize_cuda_engine(built)
        if engine is None:
            reason = log.errors[-1] if log.errors else "no reason given"
            raise CapabilityError(
                f"{library.name} {library.version} cannot load the engine that it built: {reason}",
                expected="a driver that is new enough for this TensorRT",
                fix="look at nvidia-smi, or ask for --runtime torch or onnx",
            )
        self._names = ["logits", "embedding"] if wants_embedding else ["logits"]
        widths = _widths(library, engine)
        check_width(bundle, widths["logits"])
        spec = bundle.image_spec
        shape, kernels = (spec.height, spec.width, 3), _Kernels(library, engine, key)
        self._lanes = [_Lane(self._driver, kernels, self._settings.buckets, shape, widths) for _ in range(NUM_LANES)]

    def run(self, batch_u8_nhwc: Uint8) -> Outputs:
        """Runs a batch.

        Args:
            batch_u8_nhwc: uint8, shape (N, H, W, 3).

        Returns:
            float32 logits (N, C) and, when wanted, embedding (N, D).
        """
        self._driver.enter()
        found: dict[str, list[Float32]] = {name: [] for name in self._names}
        busy: list[_Lane] = []
        for number, (start, count, bucket) in enumerate(pieces(len(batch_u8_nhwc), self._settings.buckets)):
            lane = self._lanes[number % NUM_LANES]
            if len(busy) == NUM_LANES:
                _collect(busy.pop(0), found)
            lane.start(batch_u8_nhwc[start : start + count], bucket)
            busy.append(lane)
        for lane in busy:
            _collect(lane, found)
        joined = {name: np.concatenate(parts) for name, parts in found.items()}
        return Outputs(logits=joined["logits"], embedding=joined.get("embedding"))


def settings_of(onnx: bytes) -> BuildSettings:
    """How a graph's engine is built: one of a fixed batch has that bucket only."""
    fixed = int(parse(onnx, ONNX).graph.input[0].type.tensor_type.shape.dim[0].dim_value)
    return BuildSettings(buckets=(fixed,)) if fixed else BuildSettings()


def target_of(driver: CudaDriver) -> Target:
    """The GPU at hand, as what engines are built for."""
    return Target(driver.compute_capability, driver.name, driver.version)


def make_key(library: Library, onnx: bytes, target: Target, settings: BuildSettings) -> engine_cache.EngineKey:
    """The cache's key of an engine."""
    return engine_cache.EngineKey(
        onnx_sha256=sha256_bytes(onnx),
        target=target,
        library=library.name,
        version=library.version,
        settings=settings,
    )


def provide(library: Library, onnx: bytes, key: engine_cache.EngineKey) -> bytes:
    """An engine's bytes: those that were built and signed here before, or new ones, which are kept.

    Raises:
        ArtifactError, CapabilityError: As build_engine and engine_cache say.
    """
    engine = engine_cache.load(key)
    if engine is None:
        of_any_model = replace(key, onnx_sha256="")  # how fast a kernel is on this GPU is no matter of the model
        timings = engine_cache.load(of_any_model, engine_cache.TIMINGS) or b""
        engine, timings = build_engine(library, onnx, key.target, key.settings, timings=timings)
        engine_cache.store(key, engine)
        if timings:
            engine_cache.store(of_any_model, timings, engine_cache.TIMINGS)
    return engine


def pieces(count: int, buckets: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Cuts a batch into chunks of fixed sizes: (start, images, bucket) of each.

    A rest goes into one bucket that it fills by half or more, else into smaller ones; a bucket is filled up only then.
    """
    start = 0
    while start < count:
        rest = count - start
        above = min((bucket for bucket in buckets if bucket >= rest), default=0)
        below = max((bucket for bucket in buckets if bucket <= rest), default=0)
        bucket = above if above and (above <= 2 * rest or not below) else below
        yield start, min(bucket, rest), bucket
        start += bucket


def _collect(lane: _Lane, found: dict[str, list[Float32]]) -> None:
    for name, parts in found.items():
        parts.append(lane.answer(name))


def _widths(library: Library, engine: Engine) -> dict[str, int]:
    """Values an image of each output, all of them float32.

    Raises:
        ArtifactError: An output is of another type or of no fixed width.
    """
    trt = library.module
    widths = {}
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
            shape = tuple(engine.get_tensor_shape(name))[1:]
            if engine.get_tensor_dtype(name) != trt.float32 or min(shape, default=1) < 1:
                raise ArtifactError(
                    f"the output {name!r} is {engine.get_tensor_dtype(name)} {shape} an image",
                    expected="float32 of a fixed width",
                    fix="export the model again: outputs stay in FP32",
                )
            widths[name] = math.prod(shape)
    return widths


class _Kernels:
    """An engine's contexts; TensorRT-RTX finishes its kernels when one is first used, and those are kept and signed."""

    def __init__(self, library: Library, engine: Engine, key: engine_cache.EngineKey) -> None:
        self._engine, self._key, self._cache, self._config = engine, key, None, None
        self._kept: bytes | None = None
        if library.is_rtx:
            self._config = engine.create_runtime_config()
            # kernels for these very shapes from the first run on: answers do not change while others are compiled
            strategies = library.module.DynamicShapesKernelSpecializationStrategy
            self._config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            self._cache = self._config.create_runtime_cache()
            stored = engine_cache.load(key, engine_cache.KERNELS)
            if stored:
                self._cache.deserialize(stored)
                self._kept = stored
            self._config.set_runtime_cache(self._cache)

    def context(self) -> Context:
        """A new context.

        Raises:
            CapabilityError: The device has no room for it.
        """
        made = self._engine.create_execution_context(**({"runtime_config": self._config} if self._config else {}))
        if made is None:
            raise CapabilityError(
                "TensorRT cannot make an execution context", expected="free memory on the GPU", fix="look at nvidia-smi"
            )
        return made

    def keep(self) -> None:
        """Keeps the kernels that have been compiled by now."""
        if self._cache is not None and (data := bytes(self._cache.serialize())) != self._kept:
            engine_cache.store(self._key, data, engine_cache.KERNELS)
            self._kept = data


class _Lane:
    """One of two: a stream, pinned and device buffers for the largest batch, a context and a graph for each size."""

    def __init__(
        self,
        driver: CudaDriver,
        kernels: _Kernels,
        buckets: tuple[int, ...],
        shape: tuple[int, int, int],
        widths: dict[str, int],
    ) -> None:
        self._driver, self._kernels, self._buckets, self._shape, self._widths = driver, kernels, buckets, shape, widths
        self._stream = driver.stream()
        self._image_bytes = math.prod(shape)
        largest = max(buckets)
        self._pixels, self._image = (
            driver.pinned(largest * self._image_bytes),
            driver.memory(largest * self._image_bytes),
        )
        self._answers: dict[str, tuple[Pinned, int]] = {
            name: (driver.pinned(largest * width * FLOAT_BYTES), driver.memory(largest * width * FLOAT_BYTES))
            for name, width in widths.items()
        }
        self._contexts: dict[int, Context] = {}
        self._graphs: dict[int, int | None] = {}
        self._count = 0

    def start(self, batch: Uint8, bucket: int) -> None:
        """Queues a chunk; the lane's last one must have been answered."""
        if bucket not in self._contexts:
            self._prepare(bucket)
        size, filled = len(batch) * self._image_bytes, bucket * self._image_bytes
        pixels = self._pixels.array
        pixels[:size] = np.ascontiguousarray(batch).reshape(-1)
        pixels[size:filled] = 0
        graph = self._graphs[bucket]
        if graph is None:
            self._queue(bucket)
        else:
            self._driver.launch(graph, self._stream)
        self._count = len(batch)

    def answer(self, name: str) -> Float32:
        """float32 (n, width): an output of the chunk that was started last; waits for it."""
        self._driver.wait(self._stream)
        width = self._widths[name]
        values = self._answers[name][0].array[: self._count * width * FLOAT_BYTES].view(np.float32)
        return values.reshape(self._count, width).copy()

    def _prepare(self, bucket: int) -> None:
        """Makes the context for a batch size, runs it once (TensorRT plans and compiles then), and captures it."""
        context = self._kernels.context()
        is_set = context.set_optimization_profile_async(self._buckets.index(bucket), self._stream)
        is_set = is_set and context.set_input_shape(IMAGE, (bucket, *self._shape))
        is_set = is_set and context.set_tensor_address(IMAGE, self._image)
        for name, (_, address) in self._answers.items():
            is_set = is_set and context.set_tensor_address(name, address)
        if not is_set:
            raise ArtifactError(f"TensorRT refuses a batch of {bucket}", expected=f"one of {self._buckets}")
        self._contexts[bucket] = context
        self._queue(bucket)
        self._driver.wait(self._stream)
        self._kernels.keep()
        can_capture: Any = getattr(context, "is_stream_capturable", lambda _: True)
        self._graphs[bucket] = (
            self._driver.capture(self._stream, lambda: self._queue(bucket)) if can_capture(self._stream) else None
        )

    def _queue(self, bucket: int) -> None:
        """Queues copy in, run, copy out."""
        self._driver.copy_in(self._image, self._pixels, bucket * self._image_bytes, self._stream)
        if not self._contexts[bucket].execute_async_v3(self._stream):
            raise CapabilityError("TensorRT did not start the run", expected="a working GPU", fix="look at nvidia-smi")
        for name, (pinned, address) in self._answers.items():
            self._driver.copy_out(pinned, address, bucket * self._widths[name] * FLOAT_BYTES, self._stream)
