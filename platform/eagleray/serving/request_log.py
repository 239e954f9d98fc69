"""One JSON line a request, without what was asked: keyed hashes of the inputs, sizes, times, decisions.

Who holds the key and an image can prove that it was (or was not) among the requests, and equal uploads are seen to be
equal; without the key nobody can test a guess, nor link what two services saw. The key is drawn anew in each process
unless one is given. No image, no file name, no API key and no score is written; a tenant is.

Hashing and writing run in a thread of their own: the event loop only puts a request into a queue. Where images come
faster than they are hashed, lines are written without hashes rather than late.

Example:
    >>> log = RequestLog(folder)
    >>> app = build_app(service, log=log)
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from eagleray.core.errors import storage_error
from eagleray.serving.exchanges import Exchange
from eagleray.serving.service import Answer
from eagleray.serving.traces import TraceContext
from eagleray.serving.visits import Visit

LOG = logging.getLogger("eagleray.serving.request_log")
HASH_BYTES = 16  # 128 bits: no two inputs of one log meet by chance
MOST_PENDING = 10_000  # lines
MOST_PENDING_BYTES = 64 << 20  # of inputs that wait for their hash
FILE_BYTES, FILES = 64 << 20, 4  # a process' log is 256 MiB at most
FLUSH_S = 2.0

Line = dict[str, Any]
Wall = Callable[[], float]


class RequestLog:
    """Writes ``requests-<host>-<pid>.jsonl`` (mode 0600) in a folder, ``.1`` to ``.3`` before it when it is full.

    Args:
        folder: Made (mode 0700) when there is none.
        key: Of the hashes, 16 to 64 bytes; None = drawn for this process.
        wall: Unix time in s.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, folder: str | Path, *, key: bytes | None = None, wall: Wall = time.time) -> None:
        self._key, self._wall = key or secrets.token_bytes(32), wall
        host = re.sub(r"[^A-Za-z0-9.]", "-", socket.gethostname())[:64]  # nodes may share the folder
        self._path = Path(folder) / f"requests-{host}-{os.getpid()}.jsonl"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise storage_error(error, f"making {folder}") from error
        self._queue: queue.Queue[tuple[Line, Sequence[bytes]] | None] = queue.Queue(MOST_PENDING)
        self._lock, self._pending_bytes, self._lost = threading.Lock(), 0, 0
        self._file: IO[bytes] | None = None
        self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __call__(self, exchange: Exchange) -> None:
        """Takes a request that the app answered."""
        passport, card = exchange.passport, exchange.card
        line = self._line(exchange.request_id, exchange.route, exchange.status, exchange.code, exchange.seconds)
        if passport is not None:
            line |= {"tenant": passport.tenant, "key_id": passport.key_id, "trace_id": _trace_id(passport.trace)}
        if card is not None:
            line |= {"model": card.name, "model_version": card.version}
        line |= {"bytes": exchange.body_bytes, "num_images": exchange.num_images}
        line["images"] = [_image(answer) for answer in exchange.answers]
        self._put(line, tuple(exchange.inputs))

    def refused(self, visit: Visit) -> None:
        """Takes a request that the gateway, or Serve, refused."""
        line = self._line(visit.request_id, visit.target.route, visit.status, visit.code, visit.seconds)
        line |= {"tenant": visit.tenant, "key_id": visit.key.id if visit.key else "", "trace_id": visit.trace.trace_id}
        self._put(line | {"bytes": visit.body.num_read}, ())

    def close(self) -> None:
        """Writes what is queued, for FLUSH_S at most, and ends the thread."""
        atexit.unregister(self.close)
        try:
            self._queue.put(None, timeout=FLUSH_S)
        except queue.Full:
            return
        self._thread.join(FLUSH_S)

    def _line(self, request_id: str, route: str, status: int, code: str, seconds: float) -> Line:
        when = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds")
        line: Line = {"time": when, "request_id": request_id, "route": route, "status": status}
        if code:
            line["code"] = code
        return line | {"ms": round(seconds * 1000, 3)}

    def _put(self, line: Line, inputs: Sequence[bytes]) -> None:
        size = sum(map(len, inputs))
        with self._lock:
            if self._pending_bytes + size > MOST_PENDING_BYTES:
                line["hashes"] = "skipped"
                inputs, size = (), 0
            try:
                self._queue.put_nowait((line, inputs))
            except queue.Full:
                self._lost += 1
            else:
                self._pending_bytes += size

    def _write_all(self) -> None:
        while (entry := self._queue.get()) is not None:
            line, inputs = entry
            hashes = [hashlib.blake2b(data, key=self._key, digest_size=HASH_BYTES).hexdigest() for data in inputs]
            sizes = [len(data) for data in inputs]
            with self._lock:
                self._pending_bytes -= sum(sizes)
                lost, self._lost = self._lost, 0
            if len(line.get("images", ())) == len(inputs):
                for image, digest, size in zip(line.get("images", ()), hashes, sizes, strict=True):
                    image |= {"hash": digest, "bytes": size}
            elif inputs:
                line["images"] = [{"hash": d, "bytes": s} for d, s in zip(hashes, sizes, strict=True)]
            if lost:
                line["lost_before"] = lost
            del entry, inputs
            self._write(line)
        if self._file is not None:
            self._file.close()

    def _write(self, line: Line) -> None:
        try:
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0, opener=_private)  # noqa: SIM115  kept open
            self._file.write((json.dumps(line, ensure_ascii=True, separators=(",", ":")) + "\n").encode())
            if self._file.tell() >= FILE_BYTES:
                self._file.close()
                self._file = None
                _turn(self._path)
        except OSError as error:
            with self._lock:
                self._lost += 1
            LOG.error("a line of the request log %s was not written: %s", self._path, error.strerror)


def _image(answer: Answer) -> Line:
    said, timing = answer.prediction, answer.timing
    image: Line = {"status": said.status, "decision": said.decision, "reason": said.reason}
    times = {"queue_ms": timing.queue_ms, "decode_ms": timing.decode_ms, "infer_ms": timing.infer_ms}
    return {name: value for name, value in image.items() if value} | {
        name: round(value, 3) for name, value in times.items()
    }


def _trace_id(traceparent: str) -> str:
    context = TraceContext.parse(traceparent)
    return context.trace_id if context else ""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _turn(path: Path) -> None:
    """Full: .2 becomes .3, .1 becomes .2, the file becomes .1; what was .3 is gone."""
    for number in range(FILES - 1, 0, -1):
        older = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number}"))
