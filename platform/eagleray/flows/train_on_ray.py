"""The same worker on Ray Train V2: data-parallel, gloo on CPUs and NCCL on GPUs, elastic, restarted when one dies.

Ray decides where workers are and starts them again; the run itself (checkpoints, position in the data, figures) is in
the run's folder, which every node sees. Three things Ray Train leaves to its caller are answered here:

- an error that no restart would mend (a diverged loss, a corpus that changed) must not be retried: the worker keeps it
  in the folder, and those that are started next return it instead of training;
- the controller is one actor without restarts. When it dies, the flow connects anew (what the old connection held is
  then freed by Ray) and enters the run again;
- the CPUs and GPUs that a dead controller had reserved stay reserved for three minutes (Ray's AutoscalingCoordinator
  waits for it to renew): an elastic run would begin with what is left, or not at all. The next entry gives them back.

Example:
    >>> with ExitStack() as connection:
    ...     train_on_ray(run, lambda: False, connection)["is_finished"]
    True
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from eagleray.core.errors import CapabilityError, ClusterError, EagleError
from eagleray.flows import runtime
from eagleray.flows.pool import error_json, rebuild_error
from eagleray.flows.run_folder import RunFolder, Tail, read_lines
from eagleray.flows.train_worker import MakeBatches, Seat, Spec, run_worker
from eagleray.flows.training_config import TrainingConfig
from eagleray.flows.training_run import Run

MOST_IDLE_ENTRIES = 3  # in a row that ended without a new checkpoint
LOOK_EVERY_S = 0.2
COLLECTIVE_TIMEOUT_S = 1800  # torch's own default for gloo; a dead peer is noticed at once, by its closed connection
COORDINATOR = "AutoscalingCoordinator"  # of Ray 2.60: the name and the namespace of the actor that reserves
COORDINATOR_TIMEOUT_S = 10.0
log = logging.getLogger(__name__)


class Lost(Exception):
    """Ray Train gave up, or its controller died: the run can be entered again."""


def train_on_ray(run: Run, is_asked: Callable[[], bool], connection: ExitStack) -> dict[str, Any]:
    """Trains on Ray Train until the end of the run or until it is told to stop.

    Args:
        run: The run.
        is_asked: Whether a person wants it to stop.
        connection: Takes the connection to Ray, which the caller ends: after what counts is written.

    Returns:
        What rank 0's ``run_worker`` answered.

    Raises:
        EagleError: What a worker raised.
        CapabilityError: The machine has too few cores or GPUs.
        ClusterError: Entering again and again made no progress.
    """
    idle = 0
    while True:
        before, spec = _newest_step(run.folder), run.spec()
        where = connection.enter_context(runtime.cluster(run.config.address))
        _check_resources(run.config, where)
        run.where.update(where)
        try:
            answer = _fit(run, spec, is_asked)
        except Lost as lost:
            connection.close()
            idle = idle + 1 if _newest_step(run.folder) == before else 0
            if idle >= MOST_IDLE_ENTRIES or is_asked():
                raise ClusterError(
                    f"the run was lost {idle} times without a new checkpoint, last: {lost}",
                    expected="a cluster that keeps workers until a checkpoint",
                    fix="look at `ray status`, then run the same command again: it resumes",
                ) from lost
            run.line.note(f"{lost}; the run is entered again from step {max(0, _newest_step(run.folder)):,}")
            continue
        error = answer.get("error") or run.folder.get_error(spec.attempt)
        if error:
            raise rebuild_error(error)
        run.where["workers"] = answer["world_size"]
        return answer


def _newest_step(folder: RunFolder) -> int:
    """Of the newest checkpoint, good or not; -1 without one."""
    names = sorted(path.name for path in folder.checkpoints.glob("step-*")) if folder.checkpoints.is_dir() else []
    return int(names[-1].removeprefix("step-")) if names else -1


def _check_resources(config: TrainingConfig, where: Mapping[str, Any]) -> None:
    """An embedded Ray never grows: what does not fit there would be waited for without end."""
    fewest = config.workers if isinstance(config.workers, int) else config.workers[0]
    wanted = {"cpus": fewest * config.num_cpus, "gpus": fewest * config.num_gpus}
    short = [name for name, count in wanted.items() if count > where[name]]
    if short and where["mode"] == "embedded ray":
        raise CapabilityError(
            f"{fewest} workers want {wanted[short[0]]:g} {short[0]}, this machine has {where[short[0]]:g}",
            expected="workers that fit",
            fix="give fewer workers, or the address of a cluster",
        )


def _fit(run: Run, spec: Spec, is_asked: Callable[[], bool]) -> dict[str, Any]:
    """One entry into the run; progress is told meanwhile.

    Raises:
        Lost: Ray Train gave up, or its controller died.
    """
    outcome: dict[str, Any] = {}

    def fit() -> None:  # not in the main thread: there Ray Train would take Ctrl-C for itself
        try:
            trainer = make_trainer(run, spec)
            _release(run.folder.take_ray_run(trainer.train_run_context.run_id))
            outcome["answer"] = trainer.fit().return_value
        except BaseException as error:  # noqa: BLE001  for the main thread; not as it is: its frames hold Ray's handles
            outcome["error"] = _lost(error, run.folder, spec)

    tail, began = Tail(run.folder.metrics, since=time.time()), _Starts(run)
    thread = threading.Thread(target=fit, daemon=True, name="eagleray-fit")
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_EVERY_S)
        began.tell()
        for row in tail.read():
            run.line.show(row["line"])
        if is_asked():
            run.folder.ask_to_stop(spec.attempt)
    if "error" in outcome:
        raise outcome["error"]
    answer: dict[str, Any] = outcome["answer"]
    return answer


def _release(run_id: str) -> None:
    """Gives back what Ray has reserved for an entry whose controller, or whose driver, died; nothing where it ended."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    if not run_id:
        return
    try:
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
        ray.get(coordinator.cancel_request.remote(f"train-{run_id}"), timeout=COORDINATOR_TIMEOUT_S)
    except ValueError:
        return  # nobody has reserved anything since this cluster began
    except (RayError, GetTimeoutError) as error:
        log.warning("Ray keeps what the entry before had reserved for three minutes: %s", error)


class _Starts:
    """Tells when workers begin again, or as another number."""

    def __init__(self, run: Run) -> None:
        self._run, self._seen = run, len(read_lines(run.folder.starts))

    def tell(self) -> None:
        rows = read_lines(self._run.folder.starts)
        for row in rows[self._seen :]:
            again = f", from step {row['step']:,}" if row["step"] else ""
            self._run.line.note(f"{row['world_size']} workers on {row['device']}{again}")
        self._seen = len(rows)


def _lost(error: BaseException, folder: RunFolder, spec: Spec) -> BaseException:
    """What an exception of ``fit`` means."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    kept = folder.get_error(spec.attempt)
    if kept:
        return rebuild_error(kept)
    if isinstance(error, TrainingFailedError):
        return Lost(f"Ray Train gave the workers up ({runtime.first_fault(error)[:200]})")
    if isinstance(error, RayError):
        return Lost(f"Ray Train's controller died ({type(error).__name__})")
    return error


def make_trainer(run: Run, spec: Spec) -> Any:
    """Ray Train's trainer of a run. Call it inside ``runtime.cluster``."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = run.config
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    resources = {"CPU": config.num_cpus, **({"GPU": config.num_gpus} if config.num_gpus > 0 else {})}
    root = run.folder.root.resolve()
    return TorchTrainer(
        work_on_ray,
        train_loop_config=dataclasses.asdict(spec),
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.num_gpus > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=config.resize_check_s,
        ),
        run_config=RunConfig(
            name=root.name,
            storage_path=str(root / "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures, max_preemption_failures=-1),
        ),
    )


def work_on_ray(values: dict[str, Any]) -> dict[str, Any]:
    """A Ray Train worker."""
    import ray.train
    from ray.train.torch import get_device

    spec, context = Spec(**values), ray.train.get_context()
    seat = Seat(context.get_world_rank(), context.get_world_size(), str(get_device()))
    folder = RunFolder(Path(spec.values["run_dir"]))
    kept = folder.get_error(spec.attempt)
    if kept:
        return {"error": kept}
    make_batches: MakeBatches | None = None
    if spec.config.is_fed_by_ray:
        from eagleray.flows.ray_feed import ray_batches

        make_batches = ray_batches
    try:
        answer = run_worker(spec, seat, is_stopped=_is_preempted, make_batches=make_batches)
    except EagleError as error:
        with contextlib.suppress(EagleError):  # where even that cannot be written, the bound on failures ends it
            folder.put_error(spec.attempt, error_json(error))
        if seat.world_size == 1:
            return {"error": error_json(error)}
        raise  # the others may wait for this one: Ray Train ends them, and the next ones return what was kept
    if not answer["is_finished"] and not folder.is_asked_to_stop(spec.attempt):
        raise RuntimeError("a node of this run is about to be taken away; its checkpoint is written")
    return answer


def _is_preempted() -> bool:
    """Whether Ray has said that a node of this run will be taken away.

    ``ray.train.get_preemption_info`` says the same, by a message to all workers each time; the loop's own vote already
    carries it to them.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
