"""Peer: daft reads, decodes and resizes; a user-defined class calls the same ONNX model; daft writes Parquet.

daft's own resize knows no bicubic filter, so both are tried: its own pixels, and Pillow's inside the class. Steady
state: from the start of the query, daft being imported, to the last result written; the model loads meanwhile.
"""

import os
import time
from itertools import product

os.environ |= {"DAFT_PROGRESS_BAR": "0", "DO_NOT_TRACK": "true", "SCARF_NO_ANALYTICS": "true"}

import daft
import numpy as np
import yardstick
from daft import DataType, col
from daft.functions import crop, decode_image, download, resize
from PIL import Image

CANDIDATES = [
    {"batch": batch, "instances": 2, "is_process": is_process, "is_native": is_native}
    for batch, is_process, is_native in product((8, 32), (True, False), (False, True))
]
ANSWER = DataType.struct({"top1": DataType.int32(), "score": DataType.float32()})


class Model:
    """The engine, one instance in each thread or process of daft's."""

    def __init__(self, job: yardstick.Job, threads: int) -> None:
        self.job, self.engine = job, yardstick.session(job.onnx, threads)

    def score(self, images: daft.Series) -> list[dict[str, float]]:
        """One batch of decoded images -> top-1 and score."""
        arrays = images.to_pylist()
        if arrays and arrays[0].shape[:2] != (yardstick.CROP, yardstick.CROP):
            arrays = [yardstick.target_pixels(Image.fromarray(array)) for array in arrays]
        top1, score = yardstick.best(self.engine, yardstick.normalize(np.stack(arrays), self.job))
        return [{"top1": int(a), "score": float(b)} for a, b in zip(top1, score, strict=True)]


def run(job: yardstick.Job, batch: int, instances: int, is_process: bool, is_native: bool) -> float:
    """Scores the job; returns the seconds of its steady state."""
    job.out.mkdir(parents=True, exist_ok=True)
    Model.score = daft.method.batch(return_dtype=ANSWER, batch_size=batch)(Model.score)
    model = daft.cls(Model, max_concurrency=instances, use_process=is_process)(job, 2 // instances)
    image = decode_image(download(col("name")))
    if is_native:
        with Image.open(job.files[0]) as first:
            wide, high = yardstick.resized(*first.size)
        box = (*yardstick.crop_corner(wide, high), yardstick.CROP, yardstick.CROP)
        image = crop(resize(image, wide, high), box)
    frame = daft.from_pydict({"name": list(job.files)}).into_batches(batch)
    frame = frame.with_column("answer", model.score(image))
    begin = time.perf_counter()
    frame.select("name", col("answer")["top1"], col("answer")["score"]).write_parquet(str(job.out))
    return time.perf_counter() - begin


if __name__ == "__main__":
    yardstick.main(run, CANDIDATES)
