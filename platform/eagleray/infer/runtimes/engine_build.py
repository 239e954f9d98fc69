"""TensorRT engines from ONNX: one optimisation profile for each fixed batch size, FP32 that is FP32, memory bounded.

What the arithmetic is stands in the ONNX: networks are strongly typed, INT8 is its Q/DQ pairs, FP16 its types. The
pixels enter as uint8 and are normalised in the graph, so that a fourth of the bytes cross to the GPU.

Example:
    >>> build_engine(load_library(), onnx_bytes, Target("8.9"), BuildSettings(buckets=(1, 8)))[0][:4]
    b'vtrt'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from eagleray.core.errors import ArtifactError, CapabilityError
from eagleray.infer.runtimes.tensor_rt_api import BuilderConfig, Library, Network, make_log

BUCKETS = (1, 8, 32, 128)  # batch sizes that have a profile: a request, a few, a scoring batch, a GPU's fill
MEMORY_MIB = 1024
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """What an engine is built for.

    Attributes:
        compute_capability: "8.9".
        gpu: The device's name; "" when only its compute capability was declared.
        driver: Its driver's version; "" likewise.
    """

    compute_capability: str
    gpu: str = ""
    driver: str = ""


@dataclass(frozen=True)
class BuildSettings:
    """How it is built.

    Attributes:
        buckets: Batch sizes, ascending; a graph of fixed batch has that one.
        memory_mib: Device memory that a layer may use for its work.
    """

    buckets: tuple[int, ...] = BUCKETS
    memory_mib: int = MEMORY_MIB


def build_engine(
    library: Library, onnx: bytes, target: Target, settings: BuildSettings, *, timings: bytes = b""
) -> tuple[bytes, bytes]:
    """Builds an engine.

    Args:
        library: Which TensorRT.
        onnx: One input "image", uint8 (N, H, W, 3).
        target: A compute capability that the library can build for here.
        settings: Batch sizes and memory.
        timings: Classic TensorRT's timing cache of an earlier build; b"" for none.

    Returns:
        The engine's bytes, and the timing cache as it is now (b"" for TensorRT-RTX, which times nothing).

    Raises:
        ArtifactError: TensorRT cannot read or build the graph.
        CapabilityError: It cannot build for this compute capability.
    """
    trt, log = library.module, make_log(library)
    builder = trt.Builder(log)
    network: Network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise _refused(library, "read", errors or log.errors)
    config: BuilderConfig = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.memory_mib * MIB)
    config.clear_flag(trt.BuilderFlag.TF32)  # FP32 means FP32: TF32 would break the parity law
    _aim(library, config, target)
    _add_profiles(builder, network, config, settings.buckets)
    if not library.is_rtx:  # there its calls do nothing and are deprecated
        config.set_timing_cache(config.create_timing_cache(timings), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(library, "build", log.errors)
    cache = None if library.is_rtx else config.get_timing_cache()
    return bytes(engine), bytes(cache.serialize()) if cache else b""


def _refused(library: Library, verb: str, errors: list[str]) -> ArtifactError:
    reason = errors[-1][:300] if errors else "no reason given"
    return ArtifactError(
        f"{library.name} {library.version} cannot {verb} the model: {reason}",
        expected="a graph of operators that TensorRT knows",
        fix="run it with --runtime onnx or torch",
    )


def capabilities(library: Library) -> tuple[str, ...]:
    """The compute capabilities that the library lists, e.g. "8.9"; empty for the classic one, which lists none."""
    if not library.is_rtx:
        return ()
    found = [re.fullmatch(r"SM(\d+)(\d)", name) for name in library.module.ComputeCapability.__members__]
    return tuple(f"{match[1]}.{match[2]}" for match in found if match)


def _aim(library: Library, config: Any, target: Target) -> None:
    """Sets the compute capability: TensorRT-RTX builds for any that it lists, the classic one for the GPU at hand."""
    if not library.is_rtx:
        if not target.gpu:
            raise CapabilityError(
                f"{library.name} {library.version} builds for the GPU that it runs on, and there is none here",
                expected="a GPU, or TensorRT-RTX, which builds for a declared compute capability",
                fix="pip uninstall tensorrt; pip install tensorrt-rtx-cu13, or run this on the GPU's machine",
            )
        return
    listed = capabilities(library)
    if target.compute_capability not in listed:
        raise CapabilityError(
            f"{library.name} {library.version} does not list compute capability {target.compute_capability}"
            + (f" ({target.gpu})" if target.gpu else ""),
            expected=f"one of {', '.join(listed)}",
            fix="install classic TensorRT (pip install tensorrt), or ask for --runtime torch or onnx",
        )
    config.num_compute_capabilities = 1
    name = f"SM{target.compute_capability.replace('.', '')}"
    config.set_compute_capability(library.module.ComputeCapability.__members__[name], 0)


def _add_profiles(builder: Any, network: Network, config: BuilderConfig, buckets: tuple[int, ...]) -> None:
    """One profile a bucket, of that very size: no kernel is chosen for a batch that never comes."""
    image = network.get_input(0)
    batch, *rest = image.shape
    if batch != -1:
        return
    for bucket in buckets:
        profile = builder.create_optimization_profile()
        shape = (bucket, *rest)
        profile.set_shape(image.name, shape, shape, shape)
        config.add_optimization_profile(profile)
