"""Peer: Ray Data as its documentation scores images: read_images -> row map -> map_batches (actors) -> write_parquet.

The row map resizes, crops and normalises the whole picture step by step, as the documentation's examples do; with
`--tuned` it has the tricks of the other peers. Steady state: from every actor having its model to the last file.
"""

import logging
import os
import sys
import time
from itertools import product
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}  # the workers unpickle by name

import numpy as np
import ray
import yardstick
from PIL import Image
from ray.data import ActorPoolStrategy, DataContext

LOGICAL_CPUS = 4  # on two cores: with two, a pool of two actors leaves the read no CPU and the job hangs
IS_TUNED = "--tuned" in sys.argv
CANDIDATES = [
    {"blocks": blocks, "batch": batch, "actors": actors, "is_fused": is_fused}
    for blocks, batch, (actors, is_fused) in product((0, 16), (16, 64), ((2, True), (2, False), (1, False)))
]


def preprocess(row: dict[str, Any], job: yardstick.Job, is_tuned: bool) -> dict[str, Any]:
    """Decoded image -> float32 (3, 224, 224)."""
    image = Image.fromarray(row["image"])
    if is_tuned:
        planes = yardstick.normalize(yardstick.target_pixels(image)[None], job)[0]
    else:
        image = image.resize(yardstick.resized(*image.size), Image.Resampling.BICUBIC)
        left, top = yardstick.crop_corner(*image.size)
        array = np.asarray(image.crop((left, top, left + yardstick.CROP, top + yardstick.CROP)), np.float32) / 255
        planes = ((array - np.float32(job.mean)) / np.float32(job.std)).transpose(2, 0, 1)
    return {"name": row["path"], "image": planes}


class Model:
    """The engine in an actor; leaves the time at which it was ready."""

    def __init__(self, job: yardstick.Job) -> None:
        self.engine = yardstick.session(job.onnx, 1)
        (job.out / f"ready-{os.getpid()}").write_text(str(time.time()))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        top1, score = yardstick.best(self.engine, batch["image"])
        return {"name": batch["name"], "top1": top1, "score": score}


def run(job: yardstick.Job, blocks: int, batch: int, actors: int, is_fused: bool) -> float:
    """Scores the job; returns the seconds of its steady state."""
    asked = {"job": job, "is_tuned": IS_TUNED}
    if not ray.is_initialized():
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=LOGICAL_CPUS, **settings)
        context = DataContext.get_current()
        context.wait_for_min_actors_s, context.enable_progress_bars = 120, False
        warm = ray.data.read_images(list(job.files[:8]), mode="RGB", include_paths=True, override_num_blocks=4)
        warm.map(preprocess, fn_kwargs=asked).materialize()  # the workers have imported what they need
    job.out.mkdir(parents=True, exist_ok=True)
    cpus = 1.0 if is_fused else 0.9  # Ray Data fuses the row map into the actor when both ask for the same
    images = ray.data.read_images(
        list(job.files), mode="RGB", include_paths=True, override_num_blocks=blocks or None, num_cpus=cpus
    )
    found = images.map(preprocess, fn_kwargs=asked, num_cpus=cpus).map_batches(
        Model, batch_size=batch, compute=ActorPoolStrategy(size=actors), num_cpus=1, fn_constructor_args=(job,)
    )
    found.write_parquet(str(job.out))
    end = time.time()
    marks = list(job.out.glob("ready-*"))
    ready = max(float(mark.read_text()) for mark in marks)
    [mark.unlink() for mark in marks]
    return end - ready


if __name__ == "__main__":
    yardstick.main(run, CANDIDATES)
    ray.shutdown()
