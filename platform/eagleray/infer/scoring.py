"""Scores one unit of an archive: read, decode, infer, write the unit's rows, commit them, return counts. Knows no Ray.

Decoding (a few threads) of the next batch runs while the engine works on this one. Pixels go from the decoder straight
into the batch that the engine reads. An image that cannot be decoded becomes a row with its reason; an exact duplicate
is inferred once and gets a row for each uri.

A unit whose two attempts before this one failed is opened with care: each image is decoded in a limited child process,
so that the one that kills, hangs or eats memory costs itself only.

Example:
    >>> scorer = ShardScorer(settings)
    >>> scorer(unit)["scored"]
    128
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from eagleray.core.commits import CAREFUL_FROM_ATTEMPT, Ledger
from eagleray.core.errors import ArtifactError
from eagleray.infer import score_rows
from eagleray.infer.classifier import Classifier
from eagleray.vision.bundle import load_bundle
from eagleray.vision.images import ImageRefused, ImageSpec, Limits, Reason, decode
from eagleray.vision.sandbox import SandboxedDecoder

ANSWERED = (
    *("unit", "rows", "scored", "quarantined", "images", "inferred"),
    *("attempt", "pid", "node", "started", "ended", "cpu_s"),
)


@dataclass(frozen=True)
class ScoreSettings:
    """What a scorer needs; JSON values, as they travel to workers.

    Attributes:
        root: The run's folder.
        key: The ledger's key.
        bundle: The bundle's folder.
        model_digest: What the bundle must have.
        runtime: A name of RUNTIMES, never ``auto``: a run resolves it once.
        device: ``cpu`` or ``cuda``.
        top_k: Labels a row.
        has_embeddings: Write the embedding column.
        threads: Engine threads.
        decode_threads: Threads that decode while the engine runs; 0 = the worker's own, in turn with the engine.
        batch_size: Images an engine call takes.
        hang_timeout_s: A decode that makes no progress for so long ends the worker.
        memory_mib: Data memory this worker may add to what it starts with; 0 = no limit.
        duplicates: Path of a corpus' duplicates.parquet, or "".
        max_pixels, max_side_px, max_bytes: Caps of images.Limits.
    """

    root: str
    key: str
    bundle: str
    model_digest: str
    runtime: str
    device: str = "cpu"
    top_k: int = 5
    has_embeddings: bool = False
    threads: int = 1
    decode_threads: int = 2
    batch_size: int = 32
    hang_timeout_s: float = 20.0
    memory_mib: int = 4096
    duplicates: str = ""
    max_pixels: int = Limits().max_pixels
    max_side_px: int = Limits().max_side_px
    max_bytes: int = Limits().max_bytes

    @property
    def limits(self) -> Limits:
        """The caps on one image."""
        return Limits(max_pixels=self.max_pixels, max_side_px=self.max_side_px, max_bytes=self.max_bytes)


class ShardScorer:
    """A worker: compiled once, then called with one unit at a time.

    Args:
        settings: ScoreSettings as a dict.

    Raises:
        ArtifactError: The bundle is not the one that the run began with.
        CapabilityError: The engine or device is not here.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = ScoreSettings(**settings)
        s = self._settings
        self._ledger = Ledger(Path(s.root), s.key)
        bundle = load_bundle(s.bundle)
        if bundle.model_digest != s.model_digest:
            raise ArtifactError(
                f"{s.bundle} has changed since the run began: model {bundle.model_digest[:12]}",
                expected=f"model {s.model_digest[:12]}",
                fix="put the bundle back, or run the same command again: it starts over with the new model",
            )
        self._classifier = Classifier(
            bundle,
            s.runtime,
            threads=s.threads,
            device=s.device,
            top_k=s.top_k,
            wants_embedding=s.has_embeddings,
        )
        spec = bundle.image_spec  # the first call of an engine plans its memory: before the first unit, not in it
        self._classifier.infer(np.zeros((min(8, s.batch_size), spec.height, spec.width, 3), np.uint8))
        self._threads = ThreadPoolExecutor(s.decode_threads, "decode") if s.decode_threads else None
        self._duplicates = score_rows.Duplicates(s.duplicates)
        _limit_process(s.memory_mib if s.device == "cpu" else 0)

    def __call__(self, unit: Mapping[str, Any]) -> dict[str, Any]:
        """Scores and commits one unit.

        Args:
            unit: A row of inputs.UNITS_SCHEMA; ``reuse`` may name the part of the unit that it is derived from.

        Returns:
            ``unit``, ``rows``, ``scored``, ``quarantined``, ``images``, ``inferred``, ``started``, ``ended`` (seconds
            since the epoch), ``cpu_s``, ``pid``, ``node``, ``attempt``, ``is_mine`` (False: another attempt had
            committed before).
        """
        done = self._ledger.find(unit["unit"])
        if done is not None:  # by an attempt whose worker died before it had answered
            return {**{name: done[name] for name in ANSWERED}, "is_mine": False}
        started, cpu = time.time(), time.process_time()
        attempt = self._ledger.begin(unit["unit"])
        rows = score_rows.UnitRows.open(unit, self._settings.limits, self._duplicates)
        if unit.get("reuse"):
            table, inferred = score_rows.reuse(Path(self._settings.root) / unit["reuse"], rows), 0
        elif unit["kind"] == "set_aside":
            table, inferred = score_rows.set_aside_table(rows, self._classifier, self._settings.has_embeddings), 0
        else:
            answers = self._answer(rows, is_careful=attempt >= CAREFUL_FROM_ATTEMPT)
            table, inferred = answers.table(rows), answers.num_inferred
        counts = {
            **score_rows.count(table),
            "images": unit["images"],
            "inferred": inferred,
            "attempt": attempt,
            "pid": os.getpid(),
            "node": socket.gethostname(),
            "started": started,
            "ended": time.time(),
            "cpu_s": time.process_time() - cpu,
        }
        path = self._ledger.new_part(unit["unit"], "scores")
        part = {**score_rows.write_part(table, path), "path": f"scores/{path.name}"}
        is_mine = self._ledger.commit(unit["unit"], {**counts, **part})
        return {"unit": unit["unit"], **counts, "ended": time.time(), "is_mine": is_mine}

    def _answer(self, rows: score_rows.UnitRows, *, is_careful: bool) -> score_rows.Answers:
        """Decodes and infers every image of a unit, one batch ahead."""
        s, classifier = self._settings, self._classifier
        answers = score_rows.Answers(classifier, rows.num_images, has_embeddings=s.has_embeddings)
        sandbox: AbstractContextManager[SandboxedDecoder | None]
        sandbox = nullcontext()
        if is_careful:
            memory_mib = min(1024, s.memory_mib or 1024)
            sandbox = SandboxedDecoder(timeout_s=s.hang_timeout_s, memory_mib=memory_mib, limits=s.limits)
        spec = classifier.bundle.image_spec
        buffers = [np.empty((s.batch_size, spec.height, spec.width, 3), np.uint8) for _ in range(2)]
        # with care the sandbox times each image itself: a second timer would race it and kill the worker again
        with sandbox as child, _HangGuard(0.0 if is_careful else s.hang_timeout_s) as guard:
            decoder = _Decoder(s, spec, guard, child)
            ahead: _Batch | None = None
            for number, items in enumerate(_batched(rows.items(), s.batch_size)):
                batch = decoder.start(items, buffers[number % 2], self._threads)
                if ahead is not None:
                    answers.add(*ahead.finish())
                ahead = batch
            if ahead is not None:
                answers.add(*ahead.finish())
        return answers


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


class _Decoder:
    """Turns bytes into pixels of one batch, on threads or, with care, in a child process."""

    def __init__(
        self, settings: ScoreSettings, spec: ImageSpec, guard: _HangGuard, child: SandboxedDecoder | None
    ) -> None:
        self._spec, self._limits, self._guard, self._child = spec, settings.limits, guard, child
        self._num_tasks = settings.decode_threads if settings.decode_threads < 2 else 2 * settings.decode_threads
        self._first: dict[str, int] = {}  # image id -> position of its first occurrence in the unit
        self._lock = threading.Lock()

    def start(self, items: list[score_rows.Item], buffer: np.ndarray, threads: ThreadPoolExecutor | None) -> _Batch:
        """Begins to decode a batch."""
        self._guard.start(len(items))
        if threads is None or self._child is not None:  # with care: one at a time, so that the culprit is known
            return _Batch(items, buffer, [self._decode_run(items, buffer)])
        run = max(
            1, -(-len(items) // self._num_tasks)
        )  # a task of several images: one hand-over of the interpreter for all
        starts = range(0, len(items), run)
        tasks = [threads.submit(self._decode_run, items[at : at + run], buffer[at : at + run]) for at in starts]
        return _Batch(items, buffer, tasks)

    def _decode_run(self, items: list[score_rows.Item], buffer: np.ndarray) -> list[score_rows.Decoded]:
        return [self._decode(item, buffer[slot]) for slot, item in enumerate(items)]

    def _decode(self, item: score_rows.Item, out: np.ndarray) -> score_rows.Decoded:
        try:
            return self._decode_one(item, out)
        finally:
            self._guard.beat()

    def _decode_one(self, item: score_rows.Item, out: np.ndarray) -> score_rows.Decoded:
        if isinstance(item.data, ImageRefused):
            return score_rows.Decoded(None, None, item.data)
        name = hashlib.sha256(item.data).hexdigest()
        if item.id is not None and item.id != name:
            changed = ImageRefused(Reason.CORRUPT, f"the bytes have changed since ingest: sha256 {name[:12]}")
            return score_rows.Decoded(item.id, None, changed)
        with self._lock:
            first = self._first.setdefault(name, item.position)
        if first != item.position:
            return score_rows.Decoded(name, first, None)
        try:
            if self._child is not None:
                out[...] = self._child.decode(item.data, self._spec)
            else:
                decode(item.data, self._spec, out=out, limits=self._limits)
        except ImageRefused as refusal:
            return score_rows.Decoded(name, None, refusal)
        return score_rows.Decoded(name, None, None)


@dataclass
class _Batch:
    """A batch whose decoding has begun."""

    items: list[score_rows.Item]
    buffer: np.ndarray
    runs: Sequence[Future[list[score_rows.Decoded]] | list[score_rows.Decoded]]

    def finish(self) -> tuple[list[score_rows.Item], list[score_rows.Decoded], np.ndarray]:
        """Waits for the decoders; returns items, what became of each, and the pixels of those that have some."""
        decoded = [d for run in self.runs for d in (run.result() if isinstance(run, Future) else run)]
        slots = [slot for slot, d in enumerate(decoded) if d.has_pixels]
        pixels = self.buffer[: len(slots)] if slots == list(range(len(slots))) else self.buffer[slots]
        return self.items, decoded, pixels


class _HangGuard:
    """Ends the process when no image has been decoded for a while although some are due.

    The timer is faulthandler's, a C thread: it fires even when a decoder hangs with the interpreter lock held. The exit
    is seen as a dead worker, the unit is given out again, and the third attempt finds the culprit.

    Args:
        timeout_s: Time without an image; 0 = no watch.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._due, self._armed_at = timeout_s, 0, 0.0
        self._lock = threading.Lock()
        self._sink = open(os.devnull, "w", encoding="ascii")  # noqa: SIM115  lives as long as the timer may fire

    def __enter__(self) -> _HangGuard:
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._sink.close()

    def start(self, num_images: int) -> None:
        """Says that so many more images are due."""
        with self._lock:
            self._due += num_images
            self._arm()

    def beat(self) -> None:
        """Says that one image is done."""
        with self._lock:
            self._due -= 1
            if self._due <= 0:
                faulthandler.cancel_dump_traceback_later()
            elif time.monotonic() - self._armed_at > 1.0:  # arming starts a thread: not for every image
                self._arm()

    def _arm(self) -> None:
        self._armed_at = time.monotonic()
        if self._timeout_s > 0:
            faulthandler.dump_traceback_later(self._timeout_s + 1.0, exit=True, file=self._sink)


def _limit_process(memory_mib: int) -> None:
    """Bounds what this process may allocate from here on, so that one image cannot take the node's memory.

    A worker that dies leaves no core file: writing a gigabyte would take longer than replacing it.
    """
    import resource

    import psutil

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if memory_mib <= 0:
        return
    used = psutil.Process().memory_info().data
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
