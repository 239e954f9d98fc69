"""The CUDA driver, as far as running an engine needs it: memory, streams, events, graphs; by ctypes, no torch.

It is libcuda.so.1, which comes with every NVIDIA driver: no toolkit and no package is needed, and its streams and
pointers are those of the runtime library that TensorRT links (both use the device's primary context).
Source: CUDA driver API 13.0, cuda.h; the names with _v2 are what its macros call.

Example:
    >>> driver = open_driver()
    >>> driver.name, driver.compute_capability
    ('NVIDIA L4', '8.9')
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eagleray.core.errors import CapabilityError

LIBRARY = "libcuda.so.1"
POINTER, SIZE, INT, UINT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
ADDRESS = ctypes.c_uint64  # CUdeviceptr
OUT, OUT_INT, OUT_ADDRESS = ctypes.POINTER(POINTER), ctypes.POINTER(INT), ctypes.POINTER(ADDRESS)
SIGNATURES: dict[str, Sequence[Any]] = {
    "cuInit": (UINT,),
    "cuDriverGetVersion": (OUT_INT,),
    "cuGetErrorName": (INT, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGet": (OUT_INT, INT),
    "cuDeviceGetName": (ctypes.c_char_p, INT, INT),
    "cuDeviceGetAttribute": (OUT_INT, INT, INT),
    "cuDevicePrimaryCtxRetain": (OUT, INT),
    "cuCtxSetCurrent": (POINTER,),
    "cuMemGetInfo_v2": (ctypes.POINTER(SIZE), ctypes.POINTER(SIZE)),
    "cuMemAlloc_v2": (OUT_ADDRESS, SIZE),
    "cuMemFree_v2": (ADDRESS,),
    "cuMemHostAlloc": (OUT, SIZE, UINT),
    "cuMemFreeHost": (POINTER,),
    "cuMemcpyHtoDAsync_v2": (ADDRESS, POINTER, SIZE, POINTER),
    "cuMemcpyDtoHAsync_v2": (POINTER, ADDRESS, SIZE, POINTER),
    "cuStreamCreate": (OUT, UINT),
    "cuStreamDestroy_v2": (POINTER,),
    "cuStreamSynchronize": (POINTER,),
    "cuStreamBeginCapture_v2": (POINTER, INT),
    "cuStreamEndCapture": (POINTER, OUT),
    "cuGraphInstantiateWithFlags": (OUT, POINTER, ctypes.c_uint64),
    "cuGraphLaunch": (POINTER, POINTER),
    "cuGraphDestroy": (POINTER,),
    "cuGraphExecDestroy": (POINTER,),
}
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting on the default stream
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do cannot spoil a capture
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Pinned:
    """Page-locked memory of the host, which the device reads and writes by itself.

    Attributes:
        address: Where it begins.
        array: uint8 (n,): a view of it.
    """

    address: int
    array: npt.NDArray[np.uint8]


class CudaDriver:
    """The first device that CUDA_VISIBLE_DEVICES leaves.

    Args:
        library: libcuda, loaded; a recorder in tests.

    Raises:
        CapabilityError: There is no device, or the driver lacks a function that is needed.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        try:
            for name, arguments in SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = list(arguments), INT
        except AttributeError as error:
            raise _no_device(f"the NVIDIA driver is too old: {error}") from None
        code = library.cuInit(0)
        if code:
            raise _no_device(f"CUDA finds no device here ({self._name_of(code)})")
        self._device = self._get_int("cuDeviceGet", 0)
        self._context = self._get_pointer("cuDevicePrimaryCtxRetain", self._device)
        self.enter()
        self._freeing: list[Callable[[], Any]] = []

    @property
    def name(self) -> str:
        """The device's name."""
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, 256, self._device)
        return text.value.decode("utf-8", "replace")

    @property
    def compute_capability(self) -> str:
        """Major and minor, "8.9"."""
        major, minor = (self._get_int("cuDeviceGetAttribute", number, self._device) for number in (MAJOR, MINOR))
        return f"{major}.{minor}"

    @property
    def version(self) -> str:
        """The kernel driver's version where it tells it, else the CUDA version that the driver speaks."""
        try:
            text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
            found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
        except OSError:
            found = None
        return found[1] if found else f"cuda {self._get_int('cuDriverGetVersion')}"

    def enter(self) -> None:
        """Makes the device's context the calling thread's: once before a thread's first call, cheap when it is."""
        self._call("cuCtxSetCurrent", self._context)

    def memory_info(self) -> tuple[int, int]:
        """Free and total memory of the device, in bytes; of all processes together."""
        free, total = SIZE(), SIZE()
        self.enter()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return int(free.value), int(total.value)

    def stream(self) -> int:
        """A new queue of work."""
        stream = self._get_pointer("cuStreamCreate", NON_BLOCKING)
        self._later("cuStreamDestroy_v2", stream)
        return stream

    def pinned(self, num_bytes: int) -> Pinned:
        """New page-locked memory of the host."""
        address = self._get_pointer("cuMemHostAlloc", num_bytes, 0)
        self._later("cuMemFreeHost", address)
        view = (ctypes.c_uint8 * num_bytes).from_address(address)
        return Pinned(address, np.ctypeslib.as_array(view))

    def memory(self, num_bytes: int) -> int:
        """New memory of the device."""
        address = ADDRESS()
        self._call("cuMemAlloc_v2", ctypes.byref(address), num_bytes)
        self._later("cuMemFree_v2", address.value)
        return int(address.value)

    def copy_in(self, target: int, source: Pinned, num_bytes: int, stream: int) -> None:
        """Queues a copy from the host to the device."""
        self._call("cuMemcpyHtoDAsync_v2", target, source.address, num_bytes, stream)

    def copy_out(self, target: Pinned, source: int, num_bytes: int, stream: int) -> None:
        """Queues a copy from the device to the host."""
        self._call("cuMemcpyDtoHAsync_v2", target.address, source, num_bytes, stream)

    def wait(self, stream: int) -> None:
        """Waits for all that was queued on a stream."""
        self._call("cuStreamSynchronize", stream)

    def capture(self, stream: int, queue: Callable[[], None]) -> int:
        """What a function queues on a stream, as a graph that can be launched again and again; it is not run now."""
        self._call("cuStreamBeginCapture_v2", stream, THREAD_LOCAL)
        try:
            queue()
        finally:  # a stream that stays in capture could never be used again
            graph = POINTER()
            code = self._library.cuStreamEndCapture(stream, ctypes.byref(graph))
        self._check("cuStreamEndCapture", code)
        try:
            runnable = self._get_pointer("cuGraphInstantiateWithFlags", graph.value, 0)
        finally:
            self._call("cuGraphDestroy", graph.value)
        self._later("cuGraphExecDestroy", runnable)
        return runnable

    def launch(self, graph: int, stream: int) -> None:
        """Queues a captured graph."""
        self._call("cuGraphLaunch", graph, stream)

    def close(self) -> None:
        """Frees all that was made here, the newest first; the context is the process's and stays."""
        self._library.cuCtxSetCurrent(self._context)
        while self._freeing:
            self._freeing.pop()()

    def _later(self, name: str, value: int) -> None:
        function = getattr(self._library, name)
        self._freeing.append(lambda: function(value))

    def _get_int(self, name: str, *arguments: Any) -> int:
        value = INT()
        self._call(name, ctypes.byref(value), *arguments)
        return int(value.value)

    def _get_pointer(self, name: str, *arguments: Any) -> int:
        value = POINTER()
        self._call(name, ctypes.byref(value), *arguments)
        return int(value.value or 0)

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            raise CapabilityError(
                f"{name} failed on the GPU: {self._name_of(code)}",
                expected="a device with free memory and a working driver",
                fix="look at nvidia-smi; ask for a smaller batch, or for device cpu",
            )

    def _name_of(self, code: int) -> str:
        text = ctypes.c_char_p()
        is_known = self._library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value
        return text.value.decode() if is_known and text.value else f"error {code}"


def open_driver() -> CudaDriver:
    """The CUDA driver of this machine.

    Raises:
        CapabilityError: It has none, or no device.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise _no_device(f"no CUDA driver on this machine ({LIBRARY} is not found)") from None
    return CudaDriver(library)


def _no_device(seen: str) -> CapabilityError:
    return CapabilityError(
        seen,
        expected="an NVIDIA GPU with its driver",
        fix="run this on a machine with a GPU, or ask for --runtime onnx or openvino",
    )
