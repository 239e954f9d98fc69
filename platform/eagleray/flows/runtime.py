"""The one place that connects to Ray: a cluster by address, or an embedded one with settings that are known to work.

What is set and why (measured on Ray 2.60, two cores):

- spare logical CPUs: an actor pool that holds every CPU starves Ray Data's own tasks and the job hangs for ever;
- the object store is capped: only unit descriptors and counts pass through it;
- usage statistics off, dashboard off for the embedded cluster (it halves its memory), token auth left on;
- every listener of the embedded cluster on 127.0.0.1 (``RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0``; checked by a test);
- OMP_NUM_THREADS=1 in workers: each worker owns one core.

Example:
    >>> with cluster(None) as where: ...
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagleray.core.errors import CapabilityError, ClusterError, EagleError
from eagleray.flows.pool import Pool, cores, error_json, rebuild_error, worker_environment

SPARE_CPUS = 2  # for Ray Data's own tasks; logical, they are hardly used
OBJECT_STORE_BYTES = 200_000_000
CONNECT_TIMEOUT_S = 10.0
# A task costs its worker 36 ms between two units of 50 ms, tasks of four units 2.4 ms a unit (measured, docs/log.md)
TASK_UNITS, TASK_IMAGES = 4, 512
_FAULT = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt): ")

QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the driver repeats an alarm of the core (ray#53727) that means nothing here
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What an embedded cluster is started with, besides what always holds.

    Attributes:
        environment: Of Ray's processes and all their workers; it wins over what a person has set, as Serve's safety
            hangs on it. Ray reads most of it when it is imported: too late for a process that has imported it.
        num_cpus: Logical CPUs; None: the cores and some to spare.
        folder: Where Ray keeps its sockets and logs; None: its own place.
        metrics_port: Where Prometheus reads, on loopback; None: any that is free.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    num_cpus: int | None = None
    folder: Path | None = None
    metrics_port: int | None = None


def resolve_address(address: str | None) -> str | None:
    """The cluster to connect to: ``--address``, else RAY_ADDRESS, else None for an embedded one."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def cluster(address: str | None, embedded: Embedded | None = None) -> Iterator[dict[str, Any]]:
    """Connects to Ray and disconnects at the end; an embedded cluster is stopped, its workers with it.

    Args:
        address: A cluster's address, or None.
        embedded: How to start an embedded one; given, RAY_ADDRESS is not looked at.

    Yields:
        What is connected to: ``mode``, ``address``, ``nodes``, ``cpus``, ``gpus``, ``ray``.

    Raises:
        ClusterError: It cannot be reached or refuses the token.
    """
    address = address if embedded else resolve_address(address)
    _prepare_environment(is_embedded=address is None)
    os.environ.update(embedded.environment if embedded else {})
    import ray

    was_connected = ray.is_initialized()
    if not was_connected:
        _connect(ray, address, embedded or Embedded())
    try:
        total = ray.cluster_resources()
        yield {
            "mode": "ray cluster" if address else "embedded ray",
            "address": address or "",
            "nodes": sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]),
            "cpus": total.get("CPU", 0.0),
            "gpus": total.get("GPU", 0.0),
            "ray": ray.__version__,
        }
    finally:
        if not was_connected:
            _disconnect(ray)


def _disconnect(ray: Any) -> None:
    """Leaves Ray; what still refers to it goes first, as its core was seen to die of an answer that came too late."""
    gc.collect()
    ray.shutdown()


def _prepare_environment(*, is_embedded: bool) -> None:
    """Environment that Ray reads at import and start; what a person has set stays."""
    for key, value in {**QUIET_ENVIRONMENT, **(worker_environment() if is_embedded else {})}.items():
        os.environ.setdefault(key, value)
    if is_embedded:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        _make_token_private()


def _make_token_private() -> None:
    """Makes Ray's token file, readable by its owner alone, before Ray would make one that everyone can read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        if not path.exists():
            import secrets

            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
        elif path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
            path.chmod(0o600)
    except FileExistsError:
        pass  # another command made it in the same moment
    except OSError as error:
        raise ClusterError(
            f"Ray's token file {path} cannot be made: {error.strerror}",
            expected="a private file with a token",
            fix="set RAY_AUTH_TOKEN_PATH to a file that you may write",
        ) from error


def _connect(ray: Any, address: str | None, embedded: Embedded) -> None:
    from ray.exceptions import RayError

    if address is not None:
        _refuse_silent(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        with _no_native_stderr():
            if address is None:
                ray.init(
                    address="local",
                    num_cpus=embedded.num_cpus or cores() + SPARE_CPUS,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    **({"_temp_dir": str(embedded.folder)} if embedded.folder else {}),
                    **({"_metrics_export_port": embedded.metrics_port} if embedded.metrics_port else {}),
                    **quiet,
                )
            else:
                ray.init(address=address, runtime_env={"env_vars": worker_environment()}, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, RayError) as error:
        first = str(error).strip().splitlines()
        raise ClusterError(
            f"no Ray cluster at {address or 'this machine'}: {first[0] if first else type(error).__name__}",
            expected="a running cluster, and its token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token",
            fix="check the address with `ray status`, the token with `ray get-auth-token`, or leave --address out",
        ) from error


def _refuse_silent(address: str) -> None:
    """Asks whether anything listens: Ray itself would try for minutes.

    Raises:
        ClusterError: Nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local": Ray knows what they mean
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {address}: {error.strerror or error}",
            expected="the address of a running cluster's head, e.g. 10.0.0.5:6379",
            fix="check the address with `ray status`, or leave --address out",
        ) from error


@contextmanager
def _no_native_stderr() -> Iterator[None]:
    """Keeps what Ray's C++ core writes past Python out of a person's terminal while it connects."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def pool_size(pool: Pool, where: Mapping[str, Any], num_units: int) -> int:
    """Workers to start: what was asked, else one per accelerator or core, never more than units.

    Raises:
        CapabilityError: Accelerators were asked for and the cluster has none.
    """
    if pool.num_gpus > 0:
        fit = int(where["gpus"] / pool.num_gpus)
        if fit < 1:
            raise CapabilityError(
                f"{pool.num_gpus} GPU a worker asked, the cluster has {where['gpus']:g}",
                expected="a cluster with GPUs",
                fix="leave --num-gpus out to score on CPUs",
            )
    else:
        spare = SPARE_CPUS if where["mode"] == "embedded ray" else 1
        fit = max(1, int((where["cpus"] - spare) / pool.num_cpus))
    return max(1, min(pool.workers or fit, fit, num_units))


def tasks(units: Sequence[Mapping[str, Any]], workers: int) -> Iterator[list[Mapping[str, Any]]]:
    """Units in their order, a few a task while many are left, one at the end so that the workers end together."""
    few: list[Mapping[str, Any]] = []
    images = 0
    for number, unit in enumerate(units):
        most = min(TASK_UNITS, (len(units) - number + len(few)) // (TASK_UNITS * max(1, workers)))
        size = unit.get("images", TASK_IMAGES)
        if few and (len(few) >= most or images + size > TASK_IMAGES):
            yield few
            few, images = [], 0
        few.append(unit)
        images += size
    if few:
        yield few


def map_on_ray(
    units: Sequence[Mapping[str, Any]], factory: str, settings: Mapping[str, Any], pool: Pool
) -> Iterator[dict[str, Any]]:
    """Ray Data over unit descriptors: a few units a task, one actor a worker. Call it inside ``cluster``.

    A task that is given out again, its worker dead, asks the ledger and does only what is not committed.

    Raises:
        EagleError: What a worker raised.
        ClusterError: Ray lost what the run needs.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.enable_auto_log_stats = False
    context.memory_usage_poll_interval_s = None  # else a thread a task
    context.max_errored_blocks = 0  # an error is never a dropped block
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"units": json.dumps(few)} for few in tasks(units, pool.workers)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        RayWorker,
        fn_constructor_kwargs={"factory": factory, "settings": dict(settings)},
        compute=ActorPoolStrategy(size=max(1, pool.workers), max_tasks_in_flight_per_actor=2),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
    )  # Ray Data restarts dead actors and retries their tasks without end; the ledger bounds it (MAX_ATTEMPTS)
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for answers in batch.column("answers").to_pylist():
                for reply in json.loads(answers):
                    if "error" in reply:
                        raise rebuild_error(reply["error"])
                    yield reply
    except RayError as error:
        raise ClusterError(
            f"Ray lost the run: {first_fault(error)}",
            expected="workers that start and stay",
            fix="run the same command again: it resumes; `ray status` shows what the cluster has",
        ) from error


def first_fault(error: BaseException) -> str:
    """The line of Ray's long text that names what happened first; its last lines speak of retries."""
    lines = [line for line in str(error).strip().splitlines() if line and not line[0].isspace()]
    named = [line for line in lines if _FAULT.match(line) and not line.startswith("ray.exceptions.UserCode")]
    return (named or lines or [type(error).__name__])[0 if named else -1]


class RayWorker:
    """The thin shell of a worker inside an actor: JSON in, JSON out; an error of ours is an answer, not a crash."""

    def __init__(self, factory: str, settings: dict[str, Any]) -> None:
        self._factory, self._settings = factory, settings
        self._worker: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        from eagleray.flows.local_worker import build_worker

        answers: list[dict[str, Any]] = []
        try:
            self._worker = self._worker or build_worker(self._factory, self._settings)
            for unit in json.loads(row["units"]):
                answers.append(self._worker(unit))
        except EagleError as error:
            answers.append({"error": error_json(error)})
        return {"answers": json.dumps(answers)}
