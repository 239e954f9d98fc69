"""TensorRT's Python interface as far as it is used here, typed by protocols: one adapter, two builds of the library.

Classic TensorRT (``tensorrt``, from 11: strongly typed networks, explicit batch) builds for the GPU that it runs on.
TensorRT-RTX (``tensorrt_rtx``, the extra tensorrt-rtx) builds for any compute capability that it lists, on a machine
without a GPU too, and finishes its kernels where they run. Where both are installed the classic one is taken.

Example:
    >>> load_library().name
    'tensorrt_rtx'
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eagleray.core.errors import CapabilityError

CLASSIC, RTX = "tensorrt", "tensorrt_rtx"
INSTALL = 'pip install "eagleray[tensorrt-rtx]" -c constraints.txt'


class HostMemory(Protocol):
    """Bytes that the library owns; a buffer."""

    @property
    def nbytes(self) -> int:
        """How many."""


class Profile(Protocol):
    """IOptimizationProfile."""

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        """The shapes that an input may have."""


class BuilderConfig(Protocol):
    """IBuilderConfig."""

    def add_optimization_profile(self, profile: Profile) -> int:
        """The profile's number, or -1."""

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        """Bytes that a pool may take."""

    def clear_flag(self, flag: Any) -> None:
        """Switches a BuilderFlag off."""

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        """What was measured before."""

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        """Uses it."""

    def get_timing_cache(self) -> Any:
        """What is known now."""


class Tensor(Protocol):
    """ITensor."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> Sequence[int]:
        """Its dimensions; -1 where they may vary."""


class Network(Protocol):
    """INetworkDefinition."""

    @property
    def num_inputs(self) -> int:
        """How many inputs."""

    def get_input(self, index: int) -> Tensor:
        """One of them."""


class Parser(Protocol):
    """OnnxParser."""

    @property
    def num_errors(self) -> int:
        """How many errors the last parse met."""

    def parse(self, model: bytes) -> bool:
        """Reads an ONNX file into the network."""

    def get_error(self, index: int) -> Any:
        """One of them."""


class Builder(Protocol):
    """Builder."""

    def create_network(self, flags: int = 0) -> Network:
        """An empty network."""

    def create_builder_config(self) -> BuilderConfig:
        """Default settings."""

    def create_optimization_profile(self) -> Profile:
        """An empty profile."""

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> HostMemory | None:
        """The engine's bytes."""


class Context(Protocol):
    """IExecutionContext."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Chooses a profile."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Says how large an input is."""

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Says where a tensor lies on the device."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queues one run on a stream."""


class Engine(Protocol):
    """ICudaEngine."""

    @property
    def num_io_tensors(self) -> int:
        """How many inputs and outputs."""

    def get_tensor_name(self, index: int) -> str:
        """The name of one of them."""

    def get_tensor_mode(self, name: str) -> Any:
        """Whether it is an input or an output (TensorIOMode)."""

    def get_tensor_dtype(self, name: str) -> Any:
        """Its DataType."""

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """Its dimensions; -1 where they may vary."""

    def create_execution_context(self, *, runtime_config: Any = None) -> Context | None:
        """What runs it."""

    def create_runtime_config(self) -> Any:
        """Settings of that."""


@dataclass(frozen=True)
class Library:
    """An imported build of TensorRT.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        module: Builder, OnnxParser, Runtime, ILogger and their enums.
    """

    name: str
    module: Any

    @property
    def version(self) -> str:
        """The library's version."""
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.name == RTX


def load_library() -> Library:
    """Imports classic TensorRT where it is installed, else TensorRT-RTX.

    Raises:
        CapabilityError: Neither is installed, or it cannot be loaded.
    """
    reasons = []
    for name in (CLASSIC, RTX):
        try:
            return Library(name, importlib.import_module(name))
        except ModuleNotFoundError as error:
            reasons.append(f"no {error.name}")
        except (ImportError, OSError) as error:  # installed and broken: another build in its place would be silent
            reasons.append(f"{name}: {str(error).splitlines()[0][:200]}")
            break
    raise CapabilityError(
        f"TensorRT cannot be loaded ({'; '.join(reasons)})", expected="one of its builds", fix=INSTALL
    )


def make_log(library: Library) -> Any:
    """A logger for the library that prints nothing and keeps the last errors in ``errors``."""
    severity = library.module.ILogger.Severity

    class Log(library.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors = [*self.errors[-4:], " ".join(message.split())[:300]]

    return Log()
