"""Peer: the loop an engineer writes by hand. Two processes, simplejpeg, Pillow, ONNX Runtime on one core each, no Ray.

Steady state: from the moment both have their model loaded to the last Parquet file closed.
"""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import yardstick
from PIL import Image

PROCESSES = 2
CANDIDATES = [{"batch": batch, "is_scaled": scaled} for batch in (4, 8, 16, 32) for scaled in (False, True)]


def pixels(path: str, is_scaled: bool) -> np.ndarray:
    """One file as uint8 (224, 224, 3); scaled = the JPEG is decoded at the least size that still covers the target."""
    data, side = Path(path).read_bytes(), yardstick.SHORT_SIDE if is_scaled else 0
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    array = simplejpeg.decode_jpeg(data, min_height=side, min_width=side)
    return yardstick.target_pixels(Image.fromarray(array), (width, height))


def work(number: int, job: yardstick.Job, batch: int, is_scaled: bool, gates: tuple[Any, Any]) -> None:
    """Every second file, from number on: read, decode, infer, and one Parquet file at the end."""
    engine = yardstick.session(job.onnx, 1)
    yardstick.best(engine, np.zeros((batch, 3, 224, 224), np.float32))
    mine, found = job.files[number::PROCESSES], []
    gates[0].wait()
    for first in range(0, len(mine), batch):
        group = [pixels(path, is_scaled) for path in mine[first : first + batch]]
        found.append(yardstick.best(engine, yardstick.normalize(np.stack(group), job)))
    top1, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
    yardstick.write_rows(job.out / f"part-{number}.parquet", mine, top1, score)
    gates[1].wait()


def run(job: yardstick.Job, batch: int, is_scaled: bool) -> float:
    """Scores the job; returns the seconds of its steady state."""
    context = multiprocessing.get_context("fork")
    gates = (context.Barrier(PROCESSES + 1), context.Barrier(PROCESSES + 1))
    args = [(number, job, batch, is_scaled, gates) for number in range(PROCESSES)]
    children = [context.Process(target=work, args=each) for each in args]
    for child in children:
        child.start()
    gates[0].wait()
    begin = time.perf_counter()
    gates[1].wait()
    seconds = time.perf_counter() - begin
    for child in children:
        child.join()
    return seconds


if __name__ == "__main__":
    yardstick.main(run, CANDIDATES)
