"""A process of its own that holds one compiled engine and answers requests: a line of JSON in, a line of JSON out.

Engines are measured and checked in one each (runtimes/measure.py, runtimes/timing.py, infer/engine_check.py), so that
none disturbs another and the caller's process loads none: a run with an ONNX bundle never imports torch.

Example:
    >>> with EngineProcess(MODULE, bundle, "onnx", threads=1, device="cpu", timeout_s=120) as probe:
    ...     probe.ask({"seconds": 0.25})
    {'images_per_s': 63.0}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from eagleray.core.errors import CapabilityError, EagleError
from eagleray.core.tables import resolve
from eagleray.infer.runtimes import RUNTIMES, Runtime
from eagleray.vision.bundle import ModelBundle, load_bundle

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class EngineProcess:
    """The caller's end.

    Args:
        module: Run with ``python -m``; its ``main`` calls ``serve``.
        bundle: Saved.
        engine: A name of RUNTIMES.
        threads: Of the engine.
        device: "cpu" or "cuda".
        timeout_s: For one answer; the first waits for the engine's import and compilation too.
    """

    def __init__(
        self, module: str, bundle: ModelBundle, engine: str, *, threads: int, device: str, timeout_s: float
    ) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "OMP_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", module, str(bundle.path.resolve()), engine, str(threads), device]
        self._engine, self._timeout_s = engine, timeout_s
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            CapabilityError: The engine does not run here, or does not answer in time.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # noqa: PT018  both are pipes
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self._process.kill()

        watch = threading.Timer(self._timeout_s, give_up)
        watch.start()
        try:
            stdin.write((json.dumps(request) + "\n").encode())
            stdin.flush()
            answer: dict[str, Any] = json.loads(stdout.readline())
        except (OSError, ValueError):
            code = self._process.wait(10)
            ended = f"its process ended with code {code}"
            why = f"no answer within {self._timeout_s:g} s" if is_late.is_set() else ended
            raise CapabilityError(f"{self._engine}: {why}") from None
        finally:
            watch.cancel()
        if "error" in answer:
            raise CapabilityError(str(answer["error"]))
        return answer


def serve(
    arguments: Sequence[str], stdin: IO[str], stdout: IO[str], *, ready: Callable[[ModelBundle, Runtime, float], Answer]
) -> int:
    """The engine's end: BUNDLE ENGINE THREADS DEVICE; an answer for each request until stdin ends.

    Args:
        arguments: Those four.
        stdin, stdout: Lines of JSON.
        ready: Called once with the bundle, the compiled engine and the seconds that compiling it took; gives what
            answers a request.
    """
    path, engine, threads, device = arguments
    try:
        bundle = load_bundle(path)
        start = time.perf_counter()
        runtime: Runtime = resolve(RUNTIMES, engine, what="runtime")(bundle, threads=int(threads), device=device)
        answer = ready(bundle, runtime, time.perf_counter() - start)
        for line in stdin:
            _say(stdout, answer(json.loads(line)))
    except EagleError as error:
        _say(stdout, {"error": error.seen})
    return 0


def _say(stdout: IO[str], answer: Mapping[str, Any]) -> None:
    stdout.write(json.dumps(answer) + "\n")
    stdout.flush()
