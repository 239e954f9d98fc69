"""Peer: Ray Data as its documentation scores images: read_images -> row map -> map_batches (actors) -> write_parquet.

Steady state: from the moment the cluster is up and every actor has its model loaded (the executor is told to wait for
them before it reads) to the last Parquet file written.
"""

import logging
import os
import shutil
import time
from itertools import product
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}  # the workers unpickle by name

import ray
import yardstick
from PIL import Image
from ray.data import ActorPoolStrategy, DataContext

LOGICAL_CPUS = 4  # on two cores: with two, a pool of two actors leaves the read no CPU and the job hangs
CANDIDATES = [
    {"blocks": blocks, "batch": batch, "actors": actors, "threads": 1}
    for blocks, batch, actors in product((0, 8, 32), (16, 64), (1, 2))
]


def preprocess(row: dict[str, Any], job: yardstick.Job) -> dict[str, Any]:
    """Decoded image -> float32 (3, 224, 224)."""
    pixels = yardstick.target_pixels(Image.fromarray(row["image"]))
    return {"name": row["path"], "image": yardstick.normalize(pixels[None], job)[0]}


class Model:
    """The engine in an actor; leaves the time at which it was ready."""

    def __init__(self, job: yardstick.Job, threads: int) -> None:
        self.engine = yardstick.session(job.onnx, threads)
        (job.out / f"ready-{os.getpid()}").write_text(str(time.time()))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        top1, score = yardstick.best(self.engine, batch["image"])
        return {"name": batch["name"], "top1": top1, "score": score}


def run(job: yardstick.Job, blocks: int, batch: int, actors: int, threads: int) -> float:
    """Scores the job; returns the seconds of its steady state."""
    if not ray.is_initialized():
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        settings = {"object_store_memory": int(os.environ.get("PEER_OBJECT_STORE_MB", "2000")) * 10**6}
        settings |= {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=LOGICAL_CPUS, **settings)
        context = DataContext.get_current()
        context.wait_for_min_actors_s, context.enable_progress_bars = 120, False
    job.out.mkdir(parents=True, exist_ok=True)
    images = ray.data.read_images(list(job.files), mode="RGB", include_paths=True, override_num_blocks=blocks or None)
    pool = ActorPoolStrategy(size=actors)
    found = images.map(preprocess, fn_kwargs={"job": job}).map_batches(
        Model, batch_size=batch, compute=pool, num_cpus=1, fn_constructor_args=(job, threads)
    )
    found.write_parquet(str(job.out))
    end = time.time()
    marks = list(job.out.glob("ready-*"))
    ready = max(float(mark.read_text()) for mark in marks)
    for mark in marks:
        mark.unlink()
    return end - ready


if __name__ == "__main__":
    yardstick.main(run, CANDIDATES)
    ray.shutdown()
    shutil.rmtree("/tmp/ray", ignore_errors=True) if os.environ.get("PEER_CLEAN_RAY") else None
