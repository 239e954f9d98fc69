"""Who serves side by side: `eagleray serve` and its peers, each a fresh process with what it starts, ended with it.

Every contestant takes the bare bytes of a JPEG and answers with its class. Ours runs with API keys on, as an operator
would start it; the peers have none. Before the first round a peer tries its settings and keeps the best.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from checkout import EAGLERAY, environment
from contestants import HERE, end_all
from model_maker import Model

START_TIMEOUT_S = 120.0
PROXY_MODE = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SWEEP_CONNECTIONS, SWEEP_S = 16, 3.0


@dataclass
class Contestant:
    """One way to serve a model.

    Attributes:
        name: As the table calls it.
        file: The peer's file; empty = `eagleray serve`.
        candidates: Settings to try; the first is the default.
        extra: More environment, or more options of `eagleray serve`.
        settings: Those in use.
        limit_ms: The p99 that is promised: ours is told, the peers know no such thing.
    """

    name: str
    file: str = ""
    candidates: Sequence[Mapping[str, Any]] = ({},)
    extra: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    limit_ms: float = 100.0

    @property
    def is_ours(self) -> bool:
        """Whether it is `eagleray serve`."""
        return not self.file

    @property
    def path(self) -> str:
        """Where it takes pictures."""
        return "/v1/predict" if self.is_ours else "/predict"

    def command(self, model: Model, port: int) -> list[str]:
        """How it is started: ours with keys on, which is its default, and the peers' engine."""
        if self.is_ours:
            given = ["--model", str(model.bundle), "--port", str(port), "--runtime", "onnx", "--json"]
            engines = [f"--{name}={value}" for name, value in self.settings.items()]
            return [
                *EAGLERAY,
                "serve",
                *given,
                *engines,
                "--set",
                f"slo.latency_p99_ms={self.limit_ms:g}",
                *self.options,
            ]
        engine = {"onnx": str(model.onnx), "mean": model.mean, "std": model.std}
        settings = ["--engine", json.dumps(engine), "--settings", json.dumps(dict(self.settings))]
        return [sys.executable, str(HERE / "peers" / self.file), "--port", str(port), *settings]


THREADS = tuple({"threads": threads} for threads in (1, 2))
ENGINES = tuple({"engines": engines, "threads": threads} for engines, threads in ((1, 1), (2, 1), (1, 2)))


def everyone() -> dict[str, Contestant]:
    """All contestants by their short names."""
    lit = [
        {"threads": threads, "batch": batch, "wait_s": 0.002 if batch > 1 else 0.0, **workers, "fast_queue": is_fast}
        for threads, batch, workers, is_fast in (
            (1, 1, {"workers": 2, "servers": 2}, False),
            (1, 8, {"workers": 2, "servers": 2}, False),
            (1, 1, {"workers": 2, "servers": 1}, False),
            (2, 8, {"workers": 1, "servers": 1}, False),
            (1, 1, {"workers": 2, "servers": 2}, True),
        )
    ]
    bare = [{"threads": threads, "pool": pool} for threads, pool in ((1, 2), (2, 1), (2, 2), (1, 4))]
    return {
        "ours": Contestant("eagleray serve --fast", candidates=ENGINES, options=("--fast",)),
        "default": Contestant("eagleray serve", candidates=ENGINES),
        "naive": Contestant("naive Ray Serve", "serve_naive.py", THREADS),
        "proxied": Contestant("naive Ray Serve, HAProxy mode", "serve_naive.py", THREADS, PROXY_MODE),
        "litserve": Contestant("LitServe", "serve_litserve.py", lit),
        "bare": Contestant("one bare uvicorn process", "serve_uvicorn.py", bare),
    }


class Load:
    """The client as a process; see open_loop.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def closed(self, connections: int, seconds: float) -> dict[str, Any]:
        """Each connection asks as soon as it is answered."""
        return self._ask(do="closed", connections=connections, seconds=seconds)

    def open(self, rate: float, seconds: float) -> dict[str, Any]:
        """Requests at fixed times."""
        return self._ask(do="open", rate=rate, seconds=seconds)

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the client has ended; its error stands above")
        told: dict[str, Any] = json.loads(line)
        return told


@dataclass(frozen=True)
class Server:
    """A contestant that answers.

    Attributes:
        process: Its root; what it started is below it.
        port: Where it listens.
        key: The header with its API key; "" = none.
        seconds_to_ready: From the command to the first answer.
    """

    contestant: Contestant
    process: subprocess.Popen[bytes]
    port: int
    key: str
    seconds_to_ready: float

    @contextmanager
    def load(self, folder: Path, images: int, deadline_ms: float) -> Iterator[Load]:
        """A client of it, with the pictures of a folder."""
        headers = [f"X-Deadline-Ms: {deadline_ms:g}", *([self.key] if self.key else [])]
        options = ["--folder", str(folder), "--images", str(images), "--port", str(self.port)]
        command = [sys.executable, str(HERE / "open_loop.py"), *options, "--path", self.contestant.path]
        secret = {"BENCH_HEADERS": "\n".join(headers)}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**environment(), **secret}, text=True
        )
        try:
            yield Load(process)
        finally:
            process.kill()
            process.communicate()

    def replicas(self) -> list[psutil.Process]:
        """The processes that hold an engine of a Ray Serve contestant."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [
            each for each in below if each.name().startswith("ray::") and "ServeReplica" in " ".join(each.cmdline())
        ]


@contextmanager
def serving(contestant: Contestant, model: Model, picture: bytes, work: Path) -> Iterator[Server]:
    """Starts a contestant, waits for its first answer, and ends it with all it started.

    Raises:
        SystemExit: It ended or did not answer; the message holds the end of its log.
    """
    work.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), work / f"{contestant.file or 'eagleray'}-{len(contestant.extra)}.log"
    begin = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            contestant.command(model, port),
            env={**environment(), **contestant.extra},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield _wait(Server(contestant, process, port, "", 0.0), picture, log, begin)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C first, so that temporary folders and sockets go; then by force, with what is left below it."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with suppress(ProcessLookupError):
        process.send_signal(2)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    end_all(process.pid)
    for each in below:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(below, timeout=30)
    process.wait(timeout=30)


def _wait(server: Server, picture: bytes, log: Path, begin: float) -> Server:
    """The server once it has answered a picture."""
    while True:
        if server.contestant.is_ours:
            server = replace(server, key=_announced(log))
        status = 0 if server.contestant.is_ours and not server.key else _ask(server, picture)
        seconds = time.perf_counter() - begin
        if status == 200:
            return replace(server, seconds_to_ready=seconds)
        if server.process.poll() is not None or seconds > START_TIMEOUT_S:
            tail = log.read_text(errors="replace")[-3_000:]
            raise SystemExit(f"{server.contestant.name} gave no answer ({status}); its log ends:\n{tail}")
        time.sleep(0.25)


def _ask(server: Server, picture: bytes) -> int:
    """The status of one request; 0 when nothing answers."""
    name, _, value = server.key.partition(": ")
    headers = {"Content-Type": "image/jpeg", **({name: value} if name else {})}
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        link.request("POST", server.contestant.path, body=picture, headers=headers)
        return link.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        link.close()


def _announced(log: Path) -> str:
    """The key header of a run of ours, from the private file that it names when it is ready; "" before."""
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"url"'):
            return Path(json.loads(line)["key_file"]).read_text(encoding="utf-8").strip()
    return ""


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def tune(contestant: Contestant, model: Model, folder: Path, work: Path) -> dict[str, Any]:
    """Tries a contestant's settings, prints what each gave, and keeps the one that answers the most."""
    picture = next(iter(sorted(folder.rglob("*.jpg")))).read_bytes()
    tried: list[tuple[float, dict[str, Any]]] = []
    for candidate in contestant.candidates:
        contestant.settings = candidate
        with serving(contestant, model, picture, work) as server, server.load(folder, 100, 60_000) as load:
            load.closed(4, 1.0)
            rate = load.closed(SWEEP_CONNECTIONS, SWEEP_S)["answered_per_s"]
        tried.append((rate, dict(candidate)))
        print(f"#   sweep {contestant.name}: {json.dumps(candidate)} {rate:.0f} /s", flush=True)
    contestant.settings = max(tried, key=lambda each: each[0])[1]
    return dict(contestant.settings)
