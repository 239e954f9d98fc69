"""What every peer shares, so that nothing but its pipeline differs: target pixels, engine, meter, the one JSON line.

A peer is `run(job, **settings) -> seconds of its steady state` and a list of settings to try; `main` does the rest:

    python two_process_loop.py --folder DIR --onnx FILE --out DIR --sweep 400      # one line per setting tried
    python two_process_loop.py --folder DIR --onnx FILE --out DIR --settings '{"batch": 16}'

Needs numpy, Pillow, onnxruntime, pyarrow and psutil; never eagleray.
"""

import argparse
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHORT_SIDE, CROP = 256, 224
SCHEMA = pa.schema([("name", pa.string()), ("top1", pa.int32()), ("score", pa.float32())])


@dataclass(frozen=True)
class Job:
    """What to score: files, the ONNX classifier and its normalisation, the folder for the results."""

    files: tuple[str, ...]
    onnx: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    out: Path


def resized(width: int, height: int) -> tuple[int, int]:
    """Width and height after the short side became 256, as timm's Resize computes them."""
    if width < height:
        return SHORT_SIDE, SHORT_SIDE * height // width
    return SHORT_SIDE * width // height, SHORT_SIDE


def crop_corner(width: int, height: int) -> tuple[int, int]:
    """Left and top of the centre crop inside the resized image."""
    return round((width - CROP) / 2), round((height - CROP) / 2)


def target_pixels(image: Image.Image, full: tuple[int, int] | None = None) -> np.ndarray:
    """Short side 256 bicubic, centre crop 224: uint8 (224, 224, 3). Only what the crop keeps is computed.

    `full` is the width and height before a scaled JPEG decode, which is by eighths: the crop is the same place in both.
    """
    width, height = full or image.size
    wide, high = resized(width, height)
    left, top = crop_corner(wide, high)
    eighths = round(8 * image.height / height) / 8
    across, down = width / wide * eighths, height / high * eighths
    box = (left * across, top * down, (left + CROP) * across, (top + CROP) * down)
    return np.asarray(image.resize((CROP, CROP), Image.Resampling.BICUBIC, box=box))


def normalize(batch_u8_nhwc: np.ndarray, job: Job) -> np.ndarray:
    """float32 NCHW, a plane at a time: ten times faster than the same arithmetic on NHWC and a transpose after it."""
    out = np.empty((len(batch_u8_nhwc), 3, *batch_u8_nhwc.shape[1:3]), np.float32)
    for channel, (mean, std) in enumerate(zip(job.mean, job.std, strict=True)):
        np.multiply(batch_u8_nhwc[..., channel], np.float32(1 / (255 * std)), out=out[:, channel])
        out[:, channel] -= np.float32(mean / std)
    return out


def session(onnx: str, threads: int) -> Any:
    """An ONNX Runtime session on `threads` cores."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def best(engine: Any, batch_nchw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Top-1 index (N,) int32 and its probability (N,) float32."""
    logits = engine.run(["logits"], {"image": batch_nchw})[0]
    top1 = logits.argmax(1)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return top1.astype(np.int32), (odds.max(1) / odds.sum(1)).astype(np.float32)


def write_rows(path: Path, names: Sequence[str], top1: np.ndarray, score: np.ndarray) -> None:
    """One Parquet file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([pa.array(names), pa.array(top1), pa.array(score)], schema=SCHEMA), path)


class Meter:
    """CPU seconds and peak memory of a process and all its descendants, sampled from outside.

    Attributes:
        cpu_s: user + system seconds, of dead descendants too (to one sample).
        peak_rss_mib: the highest sum of resident sizes, shared pages counted in each process.
        root_peak_rss_mib: the highest resident size of the root process alone.
    """

    def __init__(self, pid: int | None = None, period_s: float = 0.25) -> None:
        self._root, self._period_s = psutil.Process(pid or os.getpid()), period_s
        self._cpu: dict[tuple[int, float], float] = {}
        self.peak_rss_mib = self.root_peak_rss_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU used so far by the whole tree."""
        return sum(self._cpu.values())

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            self._sample()

    def _sample(self) -> None:
        total = 0
        try:
            tree = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                with process.oneshot():
                    times, size = process.cpu_times(), process.memory_info().rss
                    self._cpu[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
            total += size
            if process is self._root:
                self.root_peak_rss_mib = max(self.root_peak_rss_mib, size / 2**20)
        self.peak_rss_mib = max(self.peak_rss_mib, total / 2**20)


def read_top1(out: Path) -> dict[str, int]:
    """Top-1 index by file name, from whatever Parquet files a peer wrote."""
    table = pa.concat_tables(pq.read_table(path, columns=["name", "top1"]) for path in sorted(out.rglob("*.parquet")))
    return {Path(name).name: top1 for name, top1 in zip(*(column.to_pylist() for column in table.columns), strict=True)}


def digest(top1: dict[str, int]) -> str:
    """SHA-256 of the sorted answers: equal digests = equal answers."""
    return hashlib.sha256("\n".join(f"{name}:{top1[name]}" for name in sorted(top1)).encode()).hexdigest()


def main(run: Callable[..., float], candidates: Sequence[dict[str, Any]]) -> None:
    """The command line of a peer: tries every candidate on a few images, or runs one on all; prints JSON lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--onnx", required=True)
    parser.add_argument("--mean", default="0.485,0.456,0.406")
    parser.add_argument("--std", default="0.229,0.224,0.225")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, default=candidates[0])
    parser.add_argument("--sweep", type=int, default=0, help="try every candidate on this many images")
    parser.add_argument("--tuned", action="store_true", help="the peer's hand-tuned form, where it has one")
    parser.add_argument("--no-meter", action="store_true", help="someone else measures: do not spend time on it twice")
    args = parser.parse_args()
    files = tuple(sorted(str(path) for path in args.folder.rglob("*.jpg")))
    floats = [tuple(float(part) for part in text.split(",")) for text in (args.mean, args.std)]
    if args.sweep:
        for number, settings in enumerate(candidates):
            seconds = run(Job(files[: args.sweep], args.onnx, *floats, args.out / f"sweep-{number}"), **settings)
            tried = min(args.sweep, len(files))
            print(
                json.dumps({"settings": settings, "seconds_steady": seconds, "images_per_s": tried / seconds}),
                flush=True,
            )
        return
    meter = Meter()
    with nullcontext() if args.no_meter else meter:
        steady = run(Job(files, args.onnx, *floats, args.out), **args.settings)
    total = time.time() - psutil.Process().create_time()
    top1 = read_top1(args.out)
    row = {"images": len(top1), "seconds_total": total, "seconds_steady": steady, "cpu_s": meter.cpu_s}
    print(json.dumps({**row, "peak_rss_mib": meter.peak_rss_mib, "top1": [digest(top1)]}), flush=True)
