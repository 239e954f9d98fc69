"""Child processes of this machine that answer units: for archives too small to be worth a cluster.

A child that dies over a unit is replaced and gets the unit again, as Ray does with its actors.

Example:
    >>> for counts in map_local(units, "eagleray.infer.scoring:ShardScorer", settings, workers=2): ...
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
from typing import IO, Any

from eagleray.core.errors import ClusterError
from eagleray.flows.pool import rebuild_error, worker_environment

LOCAL_WORKER = "eagleray.flows.local_worker"
MAX_DEATHS = 8  # in a row, of one child: two for a poison image, the rest is a machine that cannot run a worker


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


def map_local(
    units: Sequence[Mapping[str, Any]], factory: str, settings: Mapping[str, Any], workers: int
) -> Iterator[dict[str, Any]]:
    """Runs every unit in one of ``workers`` child processes; see ``units.map_units``."""
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
