"""Where units run: in child processes of this machine, or as Ray Data over a pool of actors. The work is the same.

A worker is a class of a lower floor, built once from JSON settings and then called with one unit (a JSON dict) at a
time; it returns counts. Pixels and image bytes never pass through here: a unit names what to read, the worker writes
the result itself and commits it to the ledger.

A worker that dies is replaced and its unit is given out again. The ledger counts the attempts, so a unit that kills its
worker is opened with care the third time, and nothing is retried for ever.

Example:
    >>> pool = Pool(workers=2)
    >>> for counts in map_units(units, "eagleray.infer.scoring:ShardScorer", settings, pool): ...
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from eagleray.core import errors
from eagleray.core.errors import ClusterError, EagleError

LOCAL_WORKER = "eagleray.flows.local_worker"
MAX_DEATHS = 8  # in a row, of one child: two for a poison image, the rest is a machine that cannot run a worker


@dataclass(frozen=True)
class Pool:
    """How many workers and what each holds.

    Attributes:
        workers: Number of workers; 0 = one per core (or per accelerator when num_gpus > 0) of what is connected to.
        num_cpus: Logical CPUs a Ray actor holds.
        num_gpus: Accelerators a Ray actor holds, fractions allowed.
        is_local: Child processes instead of Ray.
    """

    workers: int = 0
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    is_local: bool = False


def map_units(
    units: Sequence[Mapping[str, Any]], factory: str, settings: Mapping[str, Any], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Runs every unit once and yields what each returned, in order of completion.

    Args:
        units: JSON dicts; each has ``unit``, its id.
        factory: ``"module:Class"`` of the worker.
        settings: JSON dict, the worker's one constructor argument.
        pool: Where.

    Raises:
        EagleError: What a worker raised; the other workers are stopped.
        ClusterError: Workers die before they can start.
    """
    if not units:
        return iter(())
    if pool.is_local:
        return _map_local(units, factory, settings, max(1, min(pool.workers or cores(), len(units))))
    from eagleray.flows.runtime import map_on_ray

    return map_on_ray(units, factory, settings, pool)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_environment() -> dict[str, str]:
    """The environment of every worker: one thread per math library, nothing phones home."""
    return {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENVINO_TELEMETRY_OPT_OUT": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # mimalloc maps 1 GiB ahead, which a limit on memory counts
    }


class _Child:
    """One child process that answers a unit a line."""

    def __init__(self, factory: str, settings: Mapping[str, Any]) -> None:
        self._first = {"factory": factory, "settings": settings}
        self._process: subprocess.Popen[bytes] | None = None
        self.deaths_in_a_row = 0

    def ask(self, unit: Mapping[str, Any]) -> dict[str, Any] | None:
        """Gives the unit out; None when the child died over it."""
        process = self._process if self._process and self._process.poll() is None else self._start()
        try:
            _send(process.stdin, unit)
            line = process.stdout.readline() if process.stdout else b""
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.stop()
            self.deaths_in_a_row += 1
            return None
        self.deaths_in_a_row = 0
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise rebuild_error(reply["error"])
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", LOCAL_WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **worker_environment()},
            start_new_session=True,  # a Ctrl-C reaches the driver alone, which then stops its children
        )
        _send(self._process.stdin, self._first)
        return self._process

    def stop(self) -> None:
        """Kills the child at once; what it had not committed is as if it had never begun."""
        if self._process:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    _close(pipe)
            self._process = None


def _send(pipe: IO[bytes] | None, value: Mapping[str, Any]) -> None:
    if pipe:
        pipe.write(json.dumps(value).encode() + b"\n")
        pipe.flush()


def _close(pipe: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # a pipe to a dead child has nothing more to flush
        pipe.close()


def _map_local(
    units: Sequence[Mapping[str, Any]], factory: str, settings: Mapping[str, Any], workers: int
) -> Iterator[dict[str, Any]]:
    todo: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
    for unit in units:
        todo.put(unit)
    answers: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
    children = [_Child(factory, settings) for _ in range(workers)]
    stopping = threading.Event()

    def serve(child: _Child) -> None:
        try:
            while not stopping.is_set():
                unit = todo.get_nowait()
                while (answer := child.ask(unit)) is None and not stopping.is_set():
                    if child.deaths_in_a_row > MAX_DEATHS:
                        raise ClusterError(
                            f"a worker process died {child.deaths_in_a_row} times in a row",
                            expected="a worker that outlives one unit",
                            fix="run `eagleray doctor`, and again with --debug to see its output",
                        )
                if answer is not None:
                    answers.put(answer)
        except queue.Empty:
            pass
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread, which raises it
            answers.put(error)

    threads = [threading.Thread(target=serve, args=(child,), daemon=True) for child in children]
    for thread in threads:
        thread.start()
    try:
        for _ in units:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        stopping.set()
        for child in children:
            child.stop()


def error_json(error: EagleError) -> dict[str, str]:
    """An error of ours as JSON, to cross a process border."""
    return {"type": type(error).__name__, "seen": error.seen, "expected": error.expected, "fix": error.fix}


def rebuild_error(value: Mapping[str, str]) -> EagleError:
    """The error that crossed."""
    kind = getattr(errors, value["type"], EagleError)
    return kind(value["seen"], expected=value["expected"], fix=value["fix"])  # type: ignore[no-any-return]
