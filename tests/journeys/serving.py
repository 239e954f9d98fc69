"""A real service for the journeys: ``eagleray serve`` in its own process group, its key, its replicas, and a load.

The load is closed-loop: some threads ask one after another on kept connections, each failed request once more on a new
one, as a client does. What comes back is told raw and after that one retry.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.journeys.conftest import command, environment, wait_for

JPEG = {"Content-Type": "image/jpeg"}
ASK_TIMEOUT_S = 30.0
REPLICA = "ServeReplica:eagleray"  # in the title that Ray gives the process


@dataclass(frozen=True)
class Reply:
    """One answer over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A service that runs.

    Attributes:
        url: Where.
        host, port: The same.
        headers: With this run's key, where there is one.
        process: ``eagleray serve``.
        env: Its environment, which ``eagleray rollout`` needs too.
        home: Its folder: log, faults, cache.
        facts: The line that it said.
    """

    url: str
    host: str
    port: int
    headers: dict[str, str]
    process: subprocess.Popen[str]
    env: dict[str, str]
    home: Path
    facts: dict[str, Any]

    def ask(
        self, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, method: str = ""
    ) -> Reply:
        """One request with the key on a new connection; headers of value "" are left out."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ASK_TIMEOUT_S)
        with contextlib.closing(connection):
            given = {name: value for name, value in {**self.headers, **(headers or {})}.items() if value}
            connection.request(method or ("GET" if body is None else "POST"), path, body, given)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def predict(self, image: bytes, query: str = "") -> Reply:
        return self.ask(f"/v1/predict{query}", image, JPEG)

    def go_wrong(self, **faults: Any) -> None:
        (self.home / "faults.json").write_text(json.dumps(faults))

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def replicas(self) -> list[psutil.Process]:
        """The processes of its replicas, those too that start or end."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if REPLICA in " ".join(process.cmdline()):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def log(self) -> str:
        return (self.home / "serve.log").read_text()


@contextlib.contextmanager
def served(home: Path, models: Sequence[str], *words: str, timeout_s: float = 120.0) -> Iterator[Served]:
    """Starts a service on a free port and ends it by Ctrl-C; kills what is left of it.

    Args:
        home: A folder of its own.
        models: Values of ``--model``.
        words: More words of the command.
        timeout_s: Within which it must answer.
    """
    home.mkdir(parents=True, exist_ok=True)
    env = environment(home)
    named = [word for model in models for word in ("--model", model)]
    process = subprocess.Popen(
        command("serve", *named, "--port", "0", "--runtime", "onnx", "--json", *words),
        env=env,
        stdout=subprocess.PIPE,
        stderr=(home / "serve.log").open("w"),
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout
        watchdog = threading.Timer(timeout_s, lambda: os.killpg(process.pid, signal.SIGKILL))
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        assert line.startswith("{"), (home / "serve.log").read_text()[-3000:]
        facts = json.loads(line)
        assert "url" in facts, line
        host, _, port = facts["url"].partition("://")[2].rpartition(":")
        headers = {}
        if facts["key_file"]:
            name, _, value = Path(facts["key_file"]).read_text().strip().partition(": ")
            headers[name] = value
        yield Served(facts["url"], host, int(port), headers, process, env, home, facts)
    finally:
        end(process)


def end(process: subprocess.Popen[str], timeout_s: float = 40.0) -> None:
    """Ctrl-C, and what is left of its group a KILL."""
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(10)


@dataclass
class Load:
    """A load while it runs and what came of it.

    Attributes:
        raw: Count by status, of first tries; 0 is no answer.
        final: Count by status after one retry.
        versions: Model versions of the answers, in the order in which they ended, with the time.
        mixed: Answers that named more than one model, or another than their header.
        slowest_s: Of an answered request.
    """

    raw: Counter[int] = field(default_factory=Counter)
    final: Counter[int] = field(default_factory=Counter)
    versions: list[tuple[float, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def failed(self) -> int:
        """Requests that got no 200, even when asked once more."""
        return sum(count for status, count in self.final.items() if status != 200)

    def report(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        p99 = round(1000 * ordered[int(0.99 * (len(ordered) - 1))]) if ordered else None
        return {"raw": dict(self.raw), "after one retry": dict(self.final), "p99_ms": p99}


@contextlib.contextmanager
def load(service: Served, images: Sequence[bytes], *, threads: int = 4, path: str = "/v1/predict") -> Iterator[Load]:
    """Asks without a pause until the block ends."""
    found = Load()

    def work(place: int) -> None:
        connection: http.client.HTTPConnection | None = None
        while not found._ended.is_set():
            image, began = images[place % len(images)], time.monotonic()
            place += threads
            status, version, connection = _once(service, connection, path, image)
            first = status
            if status != 200:
                if connection is not None:
                    connection.close()
                time.sleep(0.05)
                status, version, connection = _once(service, None, path, image)
            with found._lock:
                found.raw[first] += 1
                found.final[status] += 1
                if version:
                    found.versions.append((time.monotonic(), version))
                    found.seconds.append(time.monotonic() - began)
        if connection is not None:
            connection.close()

    workers = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield found
    finally:
        found._ended.set()
        for worker in workers:
            worker.join(ASK_TIMEOUT_S + 5)


def _once(
    service: Served, connection: http.client.HTTPConnection | None, path: str, image: bytes
) -> tuple[int, str, http.client.HTTPConnection | None]:
    """One request: status (0: no answer), the answer's model version, and the connection while it is good."""
    connection = connection or http.client.HTTPConnection(service.host, service.port, timeout=ASK_TIMEOUT_S)
    try:
        connection.request("POST", path, image, {**service.headers, **JPEG})
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0, "", None
    if answer.status != 200:
        return answer.status, "", connection
    return 200, json.loads(body)["model"]["version"], connection


def wait_for_replicas(service: Served, number: int, timeout_s: float = 90.0) -> list[psutil.Process]:
    """Waits until so many replicas' processes are there."""
    wait_for(lambda: len(service.replicas()) == number, timeout_s)
    return service.replicas()
