"""Faults for journeys: Python imports this at start when its folder is on PYTHONPATH. The product holds no test hook.

The file that EAGLERAY_TEST_FAULTS names says what goes wrong; without the file nothing does. It is read at each call,
so that one cluster serves many journeys:

- ``slow_ms``: every decode sleeps so long;
- images that carry a marker: ``POISON-ABORT`` kills the process, ``POISON-HANG`` never returns, ``POISON-MEMORY`` eats
  memory until the process is refused more and dies;
- ``stop_before_commit``: path of a marker file; the first worker that comes to commit stops itself there (SIGSTOP);
- ``slow_step_ms``: every training step sleeps so long;
- ``consumed``: folder; every training step writes there which images it took, one file a process;
- ``die_before``: ``bundle`` or ``disconnect``: the driver of a training kills itself just before that;
- ``hang_engine``: path of a marker file; the first process whose engine runs then hangs there for good;
- ``slow_bundle``, ``slow_engine_ms``: every call of an engine made of the bundle in that folder sleeps so long;
- ``no_space_at``: the n-th durable write of the run fails with ENOSPC; ``no_space_counts``: folder that counts them.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = os.environ.get("EAGLERAY_TEST_FAULTS", "")
LIMITS = {"POISON-ABORT": b"POISON-ABORT", "POISON-HANG": b"POISON-HANG", "POISON-MEMORY": b"POISON-MEMORY"}


def faults() -> dict[str, Any]:
    try:
        return json.loads(Path(FAULTS).read_text())
    except (OSError, ValueError):
        return {}


def suffer(data: bytes) -> None:
    head = bytes(data[:400])
    if LIMITS["POISON-ABORT"] in head:
        os.abort()
    if LIMITS["POISON-HANG"] in head:
        time.sleep(3600)
    if LIMITS["POISON-MEMORY"] in head:
        eaten = []
        try:
            while True:
                eaten.append(bytearray(os.urandom(1) * (64 << 20)))
        except MemoryError:
            os.abort()  # as a C library does that cannot answer std::bad_alloc
    time.sleep(faults().get("slow_ms", 0) / 1000)


def patch_images(module: Any) -> None:
    for name in ("decode", "validate"):
        setattr(module, name, _after(suffer, getattr(module, name)))


def _after(before: Callable[[bytes], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(data: bytes, *args: Any, **kwargs: Any) -> Any:
        before(data)
        return call(data, *args, **kwargs)

    return wrapped


def patch_commits(module: Any) -> None:
    commit = module.Ledger.commit

    def stopping(self: Any, unit: str, part: Any) -> bool:
        marker = faults().get("stop_before_commit")
        if marker and Path(marker).parent.is_dir():
            try:
                fd = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                pass
            else:
                os.write(fd, f"{os.getpid()} {unit} {part['path']}".encode())
                os.close(fd)
                os.kill(os.getpid(), signal.SIGSTOP)
        return commit(self, unit, part)

    module.Ledger.commit = stopping


def patch_storage(module: Any) -> None:
    flush = module.flush

    def failing(*args: Any) -> None:
        wanted, counts = faults().get("no_space_at"), faults().get("no_space_counts")
        if wanted:
            number = 1
            while True:
                try:
                    os.close(os.open(f"{counts}/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                    break
                except FileExistsError:
                    number += 1
            if number == wanted:
                raise OSError(errno.ENOSPC, "No space left on device")
        flush(*args)

    module.flush = failing


def _dying(before: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if faults().get("die_before") == before:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return wrapped


def patch_outputs(module: Any) -> None:
    module.write_bundle = _dying("bundle", module.write_bundle)


def patch_runtime(module: Any) -> None:
    module._disconnect = _dying("disconnect", module._disconnect)


def patch_training(module: Any) -> None:
    run = module._Loop._step

    def told(self: Any, step: Any, batch: Any) -> bool:
        wanted = faults()
        time.sleep(wanted.get("slow_step_ms", 0) / 1000)
        if "consumed" in wanted and Path(wanted["consumed"]).is_dir():
            rank, world = module.parallel.rank(), module.parallel.world_size()
            row = {"step": self.progress.step, "epoch": batch.epoch, "rank": rank, "world": world, "pid": os.getpid()}
            keys = [int(key) for key in batch.arrays["key"]]
            with (Path(wanted["consumed"]) / f"{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps({**row, "keys": keys, "at": time.time()}) + "\n")
        return run(self, step, batch)

    module._Loop._step = told


def patch_engine(module: Any) -> None:
    make, run = module.OnnxRuntime.__init__, module.OnnxRuntime.run

    def made(self: Any, bundle: Any, **options: Any) -> None:
        make(self, bundle, **options)
        self.folder = str(bundle.path)

    def suffering(self: Any, batch: Any) -> Any:
        wanted = faults()
        marker = wanted.get("hang_engine")
        if marker and is_first(marker):
            time.sleep(3600)
        if wanted.get("slow_bundle") == self.folder:
            time.sleep(wanted.get("slow_engine_ms", 0) / 1000)
        return run(self, batch)

    module.OnnxRuntime.__init__, module.OnnxRuntime.run = made, suffering


def is_first(marker: str) -> bool:
    """Whether this process made the marker, now or before."""
    try:
        with open(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return Path(marker).read_text() == str(os.getpid())
    return True


PATCHES = {
    "eagleray.infer.runtimes.onnx_runtime": patch_engine,
    "eagleray.flows.runtime": patch_runtime,
    "eagleray.flows.training_outputs": patch_outputs,
    "eagleray.learn.training": patch_training,
    "eagleray.vision.images": patch_images,
    "eagleray.core.commits": patch_commits,
    "eagleray.core.storage": patch_storage,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets a module load as it is and patches it then."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        patch = PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FAULTS:
    sys.meta_path.insert(0, _Finder())
