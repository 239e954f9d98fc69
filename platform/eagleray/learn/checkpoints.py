"""Checkpoints of a training run: safetensors and JSON, published whole, verified before they are loaded.

::

    HOME/step-00000120/checkpoint.json         progress, data position, config, plain state, every sha256
    HOME/step-00000120/<part>.safetensors      model, optimizer, and what else the state has tensors in

A folder is written aside, made durable and renamed: it is all there or not there. The newest whose digests hold is
used; a torn one before it is passed over and named. A checkpoint of another config is refused with the keys that
differ. No pickle.

Example:
    >>> save(home, Checkpoint(progress=progress, position=position, config=config, state={"model": task.state_dict()}))
    >>> found = load_latest(home, config=config)
    >>> found.checkpoint.progress.step, found.passed_over
    (120, ())
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eagleray.core import storage
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError, storage_error
from eagleray.learn.order import Position
from eagleray.learn.state_trees import flatten, unflatten
from eagleray.learn.task import Progress

SCHEMA = 1
HEAD = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8})")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to go on as if it had not stopped.

    Attributes:
        progress: Of the next step.
        position: Of the data.
        config: What the run is, as JSON values: a checkpoint of another is refused.
        state: Part name ("model", "optimizer", "ema", ...) to a tree of dicts, lists, tensors and plain values.
        metrics: Numbers to keep beside it.
    """

    progress: Progress
    position: Position
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What ``load_latest`` found.

    Attributes:
        checkpoint: The newest good one.
        path: Its folder.
        passed_over: Why newer ones were not used, one line each.
    """

    checkpoint: Checkpoint
    path: Path
    passed_over: tuple[str, ...] = ()


def save(home: str | Path, checkpoint: Checkpoint, *, keep: int = 2, best: str | None = None) -> Path:
    """Publishes a checkpoint under its step and removes the oldest beyond ``keep``.

    Args:
        home: The folder of the run's checkpoints; made when absent.
        checkpoint: What to keep.
        keep: How many stay, this one among them.
        best: A metric: the checkpoint where it is highest stays besides.

    Returns:
        The checkpoint's folder.

    Raises:
        StorageError: The storage refuses; what was there before is as it was.
    """
    home = storage.make_folder(home)
    path = home / f"step-{checkpoint.progress.step:08d}"
    aside = storage.aside_path(path)
    try:
        write(aside, checkpoint)
        _discard(path)  # one of the same step is torn, or the same: a run goes on only from what it could load
        aside.rename(path)
        storage.fsync_dir(home)
    except OSError as error:
        raise storage_error(error, f"writing {path}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    spared = _ranked(home, best)[:1] if best else []
    for old in folders(home)[max(1, keep) :]:
        if old not in spared:
            _discard(old)
    return path


def write(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint into a new folder, durable on return.

    Raises:
        StorageError: The storage refuses, or the folder exists.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise storage_error(error, f"writing {folder}") from error
    files, plain = {}, {}
    for name, tree in checkpoint.state.items():
        plain[name], tensors = flatten(tree)
        data = bytes(to_bytes(tensors))
        storage.write_new(folder / f"{name}.safetensors", data)
        files[f"{name}.safetensors"] = storage.sha256_bytes(data)
    value = {
        "schema": SCHEMA,
        "progress": asdict(checkpoint.progress),
        "position": asdict(checkpoint.position),
        "config": dict(checkpoint.config),
        "metrics": dict(checkpoint.metrics),
        "state": plain,
        "files": files,
    }
    storage.write_new(folder / HEAD, storage.json_bytes({**value, "digest": digest_json(value)}))
    storage.fsync_dir(folder)
    return folder


def load(folder: str | Path, *, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Reads a checkpoint; every byte is checked before it is parsed.

    Args:
        folder: The checkpoint's folder.
        config: What the run is; None takes any.

    Raises:
        ArtifactError: It is torn, changed, or of a newer schema.
        ConfigError: It is of another config; the keys that differ are named.
    """
    from safetensors.torch import load as from_bytes

    folder = Path(folder)
    value = _read_head(folder)
    if config is not None:
        _check_config(folder, value["config"], config)
    state = {}
    for name, plain in value["state"].items():
        file = f"{name}.safetensors"
        try:
            data = (folder / file).read_bytes()
        except FileNotFoundError:
            raise _torn(folder, f"{file} is missing") from None
        except OSError as error:
            raise storage_error(error, f"reading {folder / file}") from error
        if storage.sha256_bytes(data) != value["files"].get(file):
            raise _torn(folder, f"{file} has changed")
        state[name] = unflatten(plain, from_bytes(data))
    return Checkpoint(
        progress=Progress(**value["progress"]),
        position=Position(**value["position"]),
        config=value["config"],
        state=state,
        metrics=value["metrics"],
    )


def load_latest(home: str | Path, *, config: Mapping[str, Any] | None = None) -> Found | None:
    """The newest good checkpoint of a run; None when there is none at all.

    Raises:
        ArtifactError: There are some and none is good; each is named.
        ConfigError: The newest good one is of another config.
    """
    return _first_good(home, folders(home), config)


def load_best(home: str | Path, metric: str, *, config: Mapping[str, Any] | None = None) -> Found | None:
    """The good checkpoint where a metric is highest, of equals the earliest; None when no checkpoint has it.

    Raises:
        ArtifactError: There are some and none is good; each is named.
        ConfigError: It is of another config.
    """
    return _first_good(home, _ranked(home, metric), config)


def _ranked(home: str | Path, metric: str) -> list[Path]:
    """The checkpoints that have a metric, the highest first, of equals the earliest; one that is torn has none."""
    found = []
    for folder in folders(home):
        try:
            value = _read_head(folder)["metrics"].get(metric)
        except ArtifactError:
            continue
        if value is not None:
            found.append((-value, folder.name, folder))
    return [folder for _, _, folder in sorted(found)]


def _first_good(home: str | Path, candidates: Sequence[Path], config: Mapping[str, Any] | None) -> Found | None:
    """The first of some checkpoints that is whole."""
    passed_over: list[str] = []
    for folder in candidates:
        try:
            checkpoint = load(folder, config=config)
        except ArtifactError as error:
            passed_over.append(error.seen)
            log.warning("%s; the next is used", error.seen)
            continue
        return Found(checkpoint, folder, tuple(passed_over))
    if passed_over:
        raise ArtifactError(
            f"no checkpoint in {home} is whole: {'; '.join(passed_over)}",
            expected="at least one as it was written",
            fix="start the run anew: --resume never, or another --out",
        )
    return None


def folders(home: str | Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, good or not."""
    home = Path(home)
    found = [path for path in home.iterdir() if _NAME.fullmatch(path.name)] if home.is_dir() else []
    return sorted(found, key=lambda path: path.name, reverse=True)


def differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two JSON values differ, each with both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        lines: list[str] = []
        for key in sorted({*one, *other}):
            lines += differences(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else str(key))
        return lines
    return [] if one == other else [f"{prefix}: {one!r} in the checkpoint, {other!r} asked for"]


def _read_head(folder: Path) -> dict[str, Any]:
    try:
        value = storage.read_json(folder / HEAD)
    except (FileNotFoundError, NotADirectoryError):
        raise _torn(folder, f"{HEAD} is missing") from None
    except OSError as error:
        raise storage_error(error, f"reading {folder / HEAD}") from error
    except ValueError as error:
        raise _torn(folder, f"{HEAD} is not JSON ({error})") from None
    if not isinstance(value, dict) or value.get("digest") != digest_json(
        {key: item for key, item in value.items() if key != "digest"}
    ):
        raise _torn(folder, f"{HEAD} has changed")
    if value["schema"] > SCHEMA:
        raise ArtifactError(
            f"{folder} has schema {value['schema']}",
            expected=f"schema {SCHEMA} or older",
            fix="use the eagleray that wrote it, or a newer one",
        )
    return value


def _check_config(folder: Path, kept: Any, config: Mapping[str, Any]) -> None:
    # through JSON, as the kept one went: tuples are lists
    faults = differences(kept, json.loads(storage.json_bytes(dict(config))))
    if faults:
        raise ConfigError(
            f"{folder} is a checkpoint of another run; {len(faults)} keys differ:\n    " + "\n    ".join(faults[:20]),
            expected="the config that the run was started with",
            fix="give the same settings, or another --out",
        )


def _torn(folder: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{folder.name}: {what}", expected="the files that were saved, byte for byte", fix="use an older checkpoint"
    )


def _discard(path: Path) -> None:
    """Removes a folder so that no reader sees half of it."""
    if path.exists():
        gone = storage.aside_path(path)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
