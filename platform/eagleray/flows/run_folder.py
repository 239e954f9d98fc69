"""The folder of a training run, and who may write into it.

::

    RUN/run.json            config, versions, where it ran, timings, how it ended
    RUN/metrics.jsonl       one line a report; lines that a resume has overtaken are taken out
    RUN/starts.jsonl        one line for each time that workers began, and from which step
    RUN/events/             the same figures for TensorBoard
    RUN/checkpoints/        learn.checkpoints
    RUN/record.json, report.json, report.html

An entry (``enter``) takes the next attempt's number. Workers of an earlier attempt that are still alive, as after the
death of Ray Train's controller, see that theirs has passed: they save nothing more and stop.

Example:
    >>> folder = RunFolder(Path("bundles/trash.run"))
    >>> attempt = folder.enter()
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.core import storage
from eagleray.core.errors import ArtifactError, ConfigError

OURS = {"run.json", "metrics.jsonl", "starts.jsonl", "attempt", "checkpoints", "record.json"}


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of a run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Home of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.root / "metrics.jsonl"

    @property
    def starts(self) -> Path:
        """starts.jsonl."""
        return self.root / "starts.jsonl"

    @property
    def events(self) -> Path:
        """TensorBoard's folder."""
        return self.root / "events"

    def refuse_foreign(self) -> None:
        """Refuses a folder that holds something else.

        Raises:
            ConfigError: It does.
        """
        if not self.root.is_dir():
            return
        found = {path.name for path in self.root.iterdir() if not path.name.startswith(".")}
        if found and not found & OURS:
            raise ConfigError(
                f"{self.root} is not empty and holds no training run: {', '.join(sorted(found)[:5])}",
                expected="a new or empty folder, or that of the run to resume",
                fix="give another --out, or run_dir",
            )

    def lay_aside(self) -> Path | None:
        """Renames the folder of an earlier run, which stays as it is; None when there is none."""
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return None
        number = 1
        while (aside := self.root.with_name(f"{self.root.name}.{number}")).exists():
            number += 1
        self.root.rename(aside)
        return aside

    def read_run(self) -> dict[str, Any] | None:
        """run.json, or None.

        Raises:
            ArtifactError: It is not JSON.
        """
        try:
            run: dict[str, Any] = storage.read_json(self.root / "run.json")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ArtifactError(
                f"{self.root}/run.json is not JSON", expected="as written", fix="use a new --out"
            ) from error
        return run

    def enter(self) -> int:
        """Takes the next attempt's number; what earlier attempts asked for no longer counts."""
        attempt = self.attempt() + 1
        storage.write_atomic(self.root / "attempt", f"{attempt}\n".encode())
        return attempt

    def attempt(self) -> int:
        """The newest attempt's number; 0 before the first."""
        try:
            return int((self.root / "attempt").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def ask_to_stop(self, attempt: int) -> None:
        """Asks the workers of an attempt to checkpoint and return."""
        (self.root / f".stop-{attempt}").touch()

    def is_asked_to_stop(self, attempt: int) -> bool:
        """Whether they are, or a later attempt has begun."""
        return (self.root / f".stop-{attempt}").exists() or self.attempt() != attempt

    def put_error(self, attempt: int, error: Mapping[str, str]) -> None:
        """Keeps the first error of an attempt that no restart would mend."""
        storage.publish_new(self.root / f".error-{attempt}.json", storage.json_bytes(dict(error)))

    def get_error(self, attempt: int) -> dict[str, str] | None:
        """The error of an attempt."""
        try:
            error: dict[str, str] = storage.read_json(self.root / f".error-{attempt}.json")
        except (FileNotFoundError, ValueError):
            return None
        return error

    def take_ray_run(self, run_id: str) -> str:
        """Notes Ray Train's id of this entry and gives that of the one before; empty when there was none."""
        path = self.root / ".ray-run"
        before = path.read_text().strip() if path.exists() else ""
        storage.write_atomic(path, f"{run_id}\n".encode())
        return before

    def clean(self) -> None:
        """Takes out what a finished run needs no more."""
        for pattern in (".stop-*", ".error-*.json", ".ray-run"):
            for path in self.root.glob(pattern):
                path.unlink(missing_ok=True)

    def cut_metrics(self, step: int) -> None:
        """Takes out the reports after a step, which the run is about to make again."""
        rows = [row for row in read_lines(self.metrics) if row["step"] <= step]
        if self.metrics.exists():
            storage.write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Appends one JSON line."""
    with open(path, "ab") as file:
        file.write((json.dumps(dict(value), ensure_ascii=False) + "\n").encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; a torn last one, as a kill leaves it, does not count."""
    return list(_lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for line in data.splitlines(keepends=True):
        if line.endswith(b"\n") and line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # two lines run into one after a torn write


class Tail:
    """Reads what is appended to metrics.jsonl; one that a resume wrote anew is read again, for what is new in it.

    Args:
        path: The file.
        since: Rows whose ``at`` is not later are not news.
    """

    def __init__(self, path: Path, *, since: float) -> None:
        self._path, self._offset, self._inode, self._since = path, 0, 0, since

    def read(self) -> list[dict[str, Any]]:
        """Rows that are new."""
        try:
            with open(self._path, "rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = [row for row in map(json.loads, whole.splitlines()) if row["at"] > self._since]
        self._since = max([self._since, *(row["at"] for row in rows)])
        return rows
