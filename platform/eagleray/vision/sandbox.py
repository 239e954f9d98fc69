"""Decodes images that may kill, hang or swell the process, in a child that may die of them.

After a shard has failed twice, its images are read here one by one: what kills the child, outlasts the time limit or
asks for more memory than allowed is ``poison``, costs itself only, and the next image gets a fresh child. The child is
``python -m eagleray.vision.sandbox``; it imports no torch and no Ray, speaks length-prefixed frames of JSON and raw
bytes over its pipes (no pickle), and ends by itself when its parent is gone.

Example:
    >>> with SandboxedDecoder() as sandbox:
    ...     header = sandbox.validate(data)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from eagleray.core.errors import CapabilityError
from eagleray.vision.images import Header, ImageRefused, ImageSpec, Limits, Reason, decode, validate

# Two lengths: of the JSON, of the raw bytes after it.
_FRAME = struct.Struct("<QQ")
# A cold start imports numpy and Pillow: 0.3 s here. A loaded machine gets this much, and no image is blamed for it.
_START_TIMEOUT_S = 120.0
_CHUNK_BYTES = 1 << 20


class _ChildGone(Exception):
    """The child ended or did not answer in time; the text says which."""


class SandboxedDecoder:
    """``decode`` and ``validate`` of images.py with the image's own risk put on a child process.

    Args:
        timeout_s: Longest time for one image.
        memory_mib: Address space that one image may take on top of what the child has after its imports.
        limits: Caps on file and picture.
    """

    def __init__(self, timeout_s: float = 20.0, memory_mib: int = 1024, *, limits: Limits | None = None) -> None:
        self._timeout_s, self._memory_mib, self._limits = timeout_s, memory_mib, limits or Limits()
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> SandboxedDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child; the next image would start another."""
        with self._lock:
            self._end_child()

    def validate(self, data: bytes) -> Header:
        """As ``images.validate``.

        Raises:
            ImageRefused: ``poison`` where the child did not survive the image; else as ``images.validate``.
            CapabilityError: The child cannot be started.
        """
        answer, _ = self._ask({"do": "validate"}, data)
        return Header(**answer["header"])

    def decode(self, data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
        """As ``images.decode``: uint8 (spec.height, spec.width, 3).

        Raises:
            ImageRefused: ``poison`` where the child did not survive the image; else as ``images.decode``.
            CapabilityError: The child cannot be started.
        """
        _, pixels = self._ask({"do": "decode", "spec": spec.to_json()}, data)
        return np.frombuffer(pixels, np.uint8).reshape(spec.height, spec.width, 3)

    def _ask(self, question: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytearray]:
        with self._lock:
            child = self._child or self._start_child()
            try:
                answer, payload = _exchange(child, question, data, self._timeout_s)
            except _ChildGone as gone:
                code = self._end_child()
                raise ImageRefused(Reason.POISON, f"{gone}{_cause(code)}") from None
            except BaseException:
                self._end_child()  # Ctrl-C in the middle of a frame: the pipes hold half of it
                raise
            if (reason := answer.get("refused")) is not None:
                if reason == Reason.POISON:
                    self._end_child()  # out of memory: a fresh heap for the next image
                raise ImageRefused(Reason(reason), answer["detail"])
            return answer, payload

    def _start_child(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
        child = subprocess.Popen(
            [sys.executable, "-m", "eagleray.vision.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            bufsize=0,
        )
        self._child = child
        terms = {"memory_mib": self._memory_mib, "timeout_s": self._timeout_s, "limits": asdict(self._limits)}
        try:
            _exchange(child, terms, b"", _START_TIMEOUT_S)
        except _ChildGone as gone:
            code = self._end_child()
            raise CapabilityError(
                f"the process that decodes suspect images does not start: {gone}{_cause(code)}",
                expected="python -m eagleray.vision.sandbox to run",
                fix="run eagleray doctor; raise the memory limit of this process or of the container",
            ) from None
        return child

    def _end_child(self) -> int | None:
        """Kills the child and gives how it had ended by itself: None where it had not."""
        child, self._child = self._child, None
        if child is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.05)  # one that is dying may not be reaped yet
        code = child.poll()
        if code is None:
            child.kill()
            child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return code


def _cause(code: int | None) -> str:
    if code is None:
        return ""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f" ({signal.Signals(-code).name})"
    return f" (exit {code})"


def _exchange(
    child: subprocess.Popen[bytes], question: dict[str, Any], data: bytes, timeout_s: float
) -> tuple[dict[str, Any], bytearray]:
    """Sends one frame and takes one, within the time."""
    text = json.dumps(question).encode()
    deadline = time.monotonic() + timeout_s
    for part in (_FRAME.pack(len(text), len(data)) + text, data):
        _send(child, memoryview(part), deadline, timeout_s)
    text_bytes, data_bytes = _FRAME.unpack(_take(child, _FRAME.size, deadline, timeout_s))
    answer = json.loads(_take(child, text_bytes, deadline, timeout_s))
    return answer, _take(child, data_bytes, deadline, timeout_s)


def _send(child: subprocess.Popen[bytes], part: memoryview, deadline: float, timeout_s: float) -> None:
    assert child.stdin is not None
    fd = child.stdin.fileno()
    os.set_blocking(fd, False)
    while part:
        _await(fd, select.POLLOUT, deadline, timeout_s)
        try:
            part = part[os.write(fd, part[:_CHUNK_BYTES]) :]
        except BlockingIOError:
            continue
        except BrokenPipeError:
            raise _ChildGone("the image killed the process that read it") from None


def _take(child: subprocess.Popen[bytes], num_bytes: int, deadline: float, timeout_s: float) -> bytearray:
    assert child.stdout is not None
    fd, taken = child.stdout.fileno(), bytearray()
    while len(taken) < num_bytes:
        _await(fd, select.POLLIN, deadline, timeout_s)
        got = os.read(fd, min(_CHUNK_BYTES, num_bytes - len(taken)))
        if not got:
            raise _ChildGone("the image killed the process that read it")
        taken += got
    return taken


def _await(fd: int, event: int, deadline: float, timeout_s: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    left_s = deadline - time.monotonic()
    if left_s <= 0 or not poll.poll(left_s * 1000):
        raise _ChildGone(f"not read within {timeout_s:g} s")


# ---- the child


def _limit_memory(memory_mib: int) -> None:
    """Caps the address space at what it is now plus ``memory_mib``."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    cap = pages * resource.getpagesize() + memory_mib * 2**20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        cap = min(cap, hard)
    resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read_frame(source: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    head = source.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    text_bytes, data_bytes = _FRAME.unpack(head)
    question = json.loads(source.read(text_bytes))
    return question, source.read(data_bytes)


def _write_frame(sink: BinaryIO, answer: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps(answer).encode()
    sink.write(_FRAME.pack(len(text), len(payload)) + text)
    sink.write(payload)
    sink.flush()


def _answer(question: dict[str, Any], data: bytes, limits: Limits) -> tuple[dict[str, Any], bytes]:
    try:
        if question["do"] == "validate":
            return {"header": asdict(validate(data, limits))}, b""
        spec = ImageSpec.from_json(question["spec"])
        return {}, decode(data, spec, limits=limits).tobytes()
    except ImageRefused as refused:
        return {"refused": str(refused.reason), "detail": refused.detail}, b""
    except MemoryError:
        return {"refused": str(Reason.POISON), "detail": "it needs more memory than one image may take"}, b""


def main() -> int:
    """Serves frames from stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a codec that prints must not break the frames
    first = _read_frame(source)
    if first is None:
        return 0
    terms = first[0]
    limits = Limits(**terms["limits"])
    _limit_memory(terms["memory_mib"])
    _write_frame(sink, {"ready": os.getpid()})
    while (frame := _read_frame(source)) is not None:
        # the parent kills on time; this is for a parent that is gone
        signal.alarm(math.ceil(terms["timeout_s"]) + 5)
        answer, payload = _answer(*frame, limits)
        signal.alarm(0)
        try:
            _write_frame(sink, answer, payload)
        except BrokenPipeError:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
