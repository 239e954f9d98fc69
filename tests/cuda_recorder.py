"""A stand-in for libcuda and for an engine in it: it records what is called, and does the work when it is waited for.

Queued work is not done before its stream is waited for, as on a device: who reads too early or writes too late gets
wrong answers, not right ones by luck. Memory of the "device" is the host's; a copy outside what was allocated fails.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

INVALID, ILLEGAL, CAPTURING = 1, 700, 900  # CUDA_ERROR_INVALID_VALUE, _ILLEGAL_ADDRESS, _STREAM_CAPTURE_UNSUPPORTED
NAMES = {INVALID: b"CUDA_ERROR_INVALID_VALUE", ILLEGAL: b"CUDA_ERROR_ILLEGAL_ADDRESS", 100: b"CUDA_ERROR_NO_DEVICE"}


class CudaRecorder:
    """What ctypes.CDLL("libcuda.so.1") would give."""

    def __init__(self, *, init_code: int = 0, capability: tuple[int, int] = (8, 9), can_capture: bool = True) -> None:
        self.calls: list[str] = []
        self.live: dict[int, Any] = {}  # handle or address to what it stands for
        self.queues: dict[int, list[Callable[[], None]]] = {}
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.can_capture = can_capture
        self._init_code, self._capability, self._next = init_code, capability, 1000
        for name in [name for name in dir(self) if name.startswith("_cu")]:
            setattr(self, name[1:], self._recorded(name[1:], getattr(self, name)))

    def _recorded(self, name: str, function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return function(*arguments)

        return call  # a function: ctypes' argtypes and restype can be set on it

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        (self.captures if stream in self.captures else self.queues)[stream].append(work)

    def count(self, name: str) -> int:
        return self.calls.count(name)

    def _new(self, out: Any, thing: Any) -> int:
        self._next += 1
        self.live[self._next] = thing
        out._obj.value = self._next
        return 0

    def _new_memory(self, out: Any, num_bytes: int) -> int:
        buffer = (ctypes.c_uint8 * num_bytes)(*([0xAB] * min(num_bytes, 64)))
        self.live[ctypes.addressof(buffer)] = buffer
        out._obj.value = ctypes.addressof(buffer)
        return 0

    def _drop(self, handle: int) -> int:
        return 0 if self.live.pop(handle, None) is not None else INVALID

    def _holds(self, address: int, num_bytes: int) -> bool:
        return any(
            start <= address and address + num_bytes <= start + ctypes.sizeof(thing)
            for start, thing in self.live.items()
            if isinstance(thing, ctypes.Array)
        )

    def _copy(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        if not (self._holds(target, num_bytes) and self._holds(source, num_bytes)):
            return ILLEGAL
        self.enqueue(stream, lambda: ctypes.memmove(target, source, num_bytes))
        return 0

    def _cuInit(self, flags: int) -> int:
        return self._init_code

    def _cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 13000
        return 0

    def _cuGetErrorName(self, code: int, out: Any) -> int:
        out._obj.value = NAMES.get(code)
        return 0 if code in NAMES else INVALID

    def _cuDeviceGet(self, out: Any, ordinal: int) -> int:
        out._obj.value = ordinal
        return 0

    def _cuDeviceGetName(self, text: Any, size: int, device: int) -> int:
        text.value = b"Recorder L4"
        return 0

    def _cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> int:
        out._obj.value = self._capability[{75: 0, 76: 1}[attribute]]
        return 0

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> int:
        return self._new(out, "context")

    def _cuCtxSetCurrent(self, context: int) -> int:
        return 0 if self.live.get(context) == "context" else INVALID

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        taken = sum(ctypes.sizeof(thing) for thing in self.live.values() if isinstance(thing, ctypes.Array))
        free._obj.value, total._obj.value = 2**30 - taken, 2**30
        return 0

    def _cuMemAlloc_v2(self, out: Any, num_bytes: int) -> int:
        return CAPTURING if self.captures else self._new_memory(out, num_bytes)

    def _cuMemHostAlloc(self, out: Any, num_bytes: int, flags: int) -> int:
        return CAPTURING if self.captures else self._new_memory(out, num_bytes)

    def _cuMemFree_v2(self, address: int) -> int:
        return self._drop(address)

    def _cuMemFreeHost(self, address: int) -> int:
        return self._drop(address)

    def _cuMemcpyHtoDAsync_v2(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        return self._copy(target, source, num_bytes, stream)

    def _cuMemcpyDtoHAsync_v2(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        return self._copy(target, source, num_bytes, stream)

    def _cuStreamCreate(self, out: Any, flags: int) -> int:
        code = self._new(out, "stream")
        self.queues[out._obj.value] = []
        return code

    def _cuStreamDestroy_v2(self, stream: int) -> int:
        return self._drop(stream)

    def _cuStreamSynchronize(self, stream: int) -> int:
        if stream in self.captures:
            return CAPTURING
        queue, self.queues[stream] = self.queues[stream], []
        for work in queue:
            work()
        return 0

    def _cuStreamBeginCapture_v2(self, stream: int, mode: int) -> int:
        self.captures[stream] = []
        return 0

    def _cuStreamEndCapture(self, stream: int, out: Any) -> int:
        return self._new(out, self.captures.pop(stream))

    def _cuGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> int:
        return self._new(out, list(self.live[graph]))

    def _cuGraphDestroy(self, graph: int) -> int:
        return self._drop(graph)

    def _cuGraphExecDestroy(self, graph: int) -> int:
        return self._drop(graph)

    def _cuGraphLaunch(self, graph: int, stream: int) -> int:
        self.enqueue(stream, lambda: [work() for work in self.live[graph]])
        return 0


class ModuleOnRecorder:
    """The real TensorRT module, but engines are run by ONNX Runtime on the recorder's memory."""

    def __init__(self, real: Any, cuda: CudaRecorder, onnx: bytes) -> None:
        self._real, self._cuda, self._onnx = real, cuda, onnx
        self.loaded: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Runtime(self, log: Any) -> Any:
        def deserialize_cuda_engine(data: bytes) -> Any:
            self.loaded.append(data)
            return EngineOnRecorder(self._real, self._cuda, self._onnx)

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)


class EngineOnRecorder:
    """ICudaEngine."""

    def __init__(self, real: Any, cuda: CudaRecorder, onnx: bytes) -> None:
        self._real, self._cuda = real, cuda
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.outputs = {one.name: [-1, *one.shape[1:]] for one in self.session.get_outputs()}
        self.num_io_tensors = 1 + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return ["image", *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._real.TensorIOMode.OUTPUT if name in self.outputs else self._real.TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._real.float32 if name in self.outputs else self._real.uint8

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.outputs[name]

    def create_runtime_config(self) -> Any:
        kernels = SimpleNamespace(serialize=lambda: b"compiled kernels", deserialize=lambda blob: True)
        return SimpleNamespace(create_runtime_cache=lambda: kernels, set_runtime_cache=lambda cache: True)

    def create_execution_context(self, *, runtime_config: Any = None) -> Any:
        return ContextOnRecorder(self._cuda, self)


class ContextOnRecorder:
    """IExecutionContext."""

    def __init__(self, cuda: CudaRecorder, engine: EngineOnRecorder) -> None:
        self._cuda, self._engine = cuda, engine
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index >= 0 and stream in self._cuda.queues

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return name == "image"

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory in self._cuda.live

    def is_stream_capturable(self, stream: int) -> bool:
        return self._cuda.can_capture

    def execute_async_v3(self, stream: int) -> bool:
        def work() -> None:
            image = np.ctypeslib.as_array(
                (ctypes.c_uint8 * int(np.prod(self._shape))).from_address(self._addresses["image"])
            )
            names = list(self._engine.outputs)
            answers = self._engine.session.run(names, {"image": image.reshape(self._shape)})
            for name, found in zip(names, answers, strict=True):
                data = np.ascontiguousarray(found, np.float32).tobytes()
                ctypes.memmove(self._addresses[name], data, len(data))

        self._cuda.enqueue(stream, work)
        return True
