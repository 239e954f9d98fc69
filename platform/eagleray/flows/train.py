"""A training run from command to bundle: enter the run's folder, train here or on Ray Train, save the bundle.

Whatever ends a run early, the same command goes on from the newest good checkpoint. Ctrl-C, SIGTERM and a preemption
notice make a checkpoint first. Where Ray Train's controller dies, which it does not survive, the flow connects anew and
enters the run again, by the same name and storage. The bundle and what explains it are written before Ray is left: a
process was seen to die of a fault of Ray's own while it disconnected.

Example:
    >>> run_training("eagleray.flows.pretrain", PretrainConfig(...))["bundle"]
    'bundles/ssl'
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from eagleray.core.config import digest_json
from eagleray.core.errors import CapabilityError, ConfigError
from eagleray.flows import training_outputs
from eagleray.flows.pool import cores
from eagleray.flows.train_worker import Seat, run_worker
from eagleray.flows.training_config import TrainingConfig
from eagleray.flows.training_run import Run, command_line, opened
from eagleray.vision.bundle import HEAD, load_bundle


def run_training(
    flow: str, config: TrainingConfig, *, is_quiet: bool = False, is_live: bool | None = None
) -> dict[str, Any]:
    """Trains, or resumes, or finds that there is nothing to do; see the flow's own ``run``."""
    with opened(flow, config, is_quiet=is_quiet, is_live=is_live) as run:
        module = importlib.import_module(flow)
        work = module.make_work(config)  # here first: what is wrong with corpus or config is said at once
        done = already_done(run, work.key)
        if done is not None:
            return done
        refuse_other(run, work.key)
        for note in work.notes:
            run.line.note(note)
        prepare = getattr(module, "prepare", None)
        if prepare is not None:
            prepare(run, is_quiet=is_quiet, is_live=is_live)
        training_outputs.write_running(run, work)
        with trained(run) as answer:
            if not answer["is_finished"]:
                training_outputs.write_stopped(run, answer)
                run.line.note(
                    f"a checkpoint of step {answer['step']:,} of {answer['num_steps']:,} is in "
                    f"{run.folder.checkpoints}\nresume: {command_line()}"
                )
                raise KeyboardInterrupt
            state, kept = training_outputs.final_state(run, work)
            made = module.make_bundle(config, state)
            made = replace(made, lineage={**made.lineage, **kept})
            return training_outputs.finish(run, work, answer, made, judge=getattr(module, "judge", None))


def already_done(run: Run, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that is done already; None when there is something to do.

    Raises:
        ConfigError: ``out`` holds the bundle of another run.
    """
    if not Path(run.config.out).exists() or not (Path(run.config.out) / HEAD).is_file():
        return None
    bundle = load_bundle(run.config.out)
    previous = run.folder.read_run()
    if bundle.lineage.get("run_key") != digest_json(dict(key)):
        raise ConfigError(
            f"{run.config.out} holds the bundle of another run",
            expected="a new folder, or the bundle of this very config and corpus",
            fix="give another --out",
        )
    if previous is not None and previous.get("state") != "finished":
        return None  # the last step's checkpoint is there: what explains the bundle is written again
    run.line.note(f"nothing to do: {run.config.out} is trained")
    if previous is None:  # somebody has removed the run's folder, which a bundle does not need
        return {"bundle": str(bundle.path), "digest": bundle.model_digest, "run": "", "report": ""}
    return training_outputs.summary(previous)


def refuse_other(run: Run, key: Mapping[str, Any]) -> None:
    """Refuses to go on from another run's checkpoints, before anything is written.

    Raises:
        ConfigError: They are of another config or corpus; the keys that differ are named.
    """
    from eagleray.learn.checkpoints import differences, folders

    previous = run.folder.read_run()
    if previous is None or not folders(run.folder.checkpoints):
        return
    faults = differences(previous.get("key", {}), json.loads(json.dumps(dict(key))))
    if faults:
        raise ConfigError(
            f"{run.folder.checkpoints} holds checkpoints of another run; {len(faults)} keys differ:\n    "
            + "\n    ".join(faults[:20]),
            expected="the config and the corpus that the run was started with",
            fix="give the same settings; or another --out; or --resume never, which lays that run aside",
        )


@contextmanager
def trained(run: Run) -> Iterator[dict[str, Any]]:
    """Trains where the config says; where that is Ray, it stays connected until the end of the ``with``.

    Yields:
        What ``run_worker`` answers.
    """
    with ExitStack() as connection:
        with _asked_to_stop() as is_asked:
            answer = _train(run, is_asked, connection)
        yield answer


def _train(run: Run, is_asked: Callable[[], bool], connection: ExitStack) -> dict[str, Any]:
    config = run.config
    if config.is_on_ray:
        from eagleray.flows.train_on_ray import train_on_ray

        return train_on_ray(run, is_asked, connection)
    device = "cuda" if config.num_gpus > 0 else "cpu"
    _check_device(device)
    run.where.update({"mode": "in process", "cpus": cores(), "gpus": int(config.num_gpus), "workers": 1})

    def tell(row: Mapping[str, Any]) -> None:
        run.line.show(row["line"])

    if not config.is_fed_by_ray:
        return run_worker(run.spec(), Seat(device=device), is_stopped=is_asked, tell=tell)
    from eagleray.flows import runtime
    from eagleray.flows.ray_feed import ray_batches

    connection.enter_context(runtime.cluster(config.address))
    return run_worker(run.spec(), Seat(device=device), is_stopped=is_asked, tell=tell, make_batches=ray_batches)


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise CapabilityError(
                "a GPU was asked for, and torch sees none",
                expected="a CUDA GPU and a CUDA build of torch",
                fix="leave --num-gpus out, or run `eagleray doctor`",
            )


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a question that the loop asks; a second Ctrl-C ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        sys.stderr.write("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
