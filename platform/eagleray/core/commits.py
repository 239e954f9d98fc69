"""The ledger: which units of a run are done, by which attempt, and the one manifest that readers go by.

A run is cut into units. Any number of attempts may work on one unit, on any machine, even after they were presumed
dead; the first to commit wins, every other attempt's file is garbage that no reader sees:

1. ``begin``    leaves a durable attempt marker, so that a unit that kills its worker is recognised the next time;
2. ``new_part`` gives an attempt-unique file name under the run's folder; the attempt writes and fsyncs it;
3. ``commit``   publishes ``_ledger/<key>/parts/<unit>.json`` by a hard link, which never replaces: one winner;
4. ``seal``     (driver) writes ``_manifest.json``: the parts that count. It must balance or it is not written.

The ledger's key is the digest of everything that changes a result, so results of another model are never reused in
silence. A run resumes by the anti-join of its units with ``committed()``.

Example:
    >>> ledger = Ledger(Path("runs/a"), key="3f0c...")
    >>> attempt = ledger.begin("u0001")
    >>> part = ledger.new_part("u0001", "scores")
    >>> ledger.commit("u0001", {"path": "scores/...", "rows": 128, "sha256": "..."})
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.core import storage
from eagleray.core.errors import ArtifactError, DataError, RunIncomplete, storage_error

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.dataset import Dataset

MANIFEST = "_manifest.json"
LEDGER = "_ledger"
SCHEMA = 1
CAREFUL_FROM_ATTEMPT = 3  # two failed attempts: from the third on, inputs are opened in a limited child process
MAX_ATTEMPTS = 30  # above it the unit is given up with an error: nothing is retried for ever


class Ledger:
    """Attempts and commits of one run under one key.

    Args:
        root: The run's folder; part paths are relative to it.
        key: Digest of all that changes a result (hex).
    """

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.key = Path(root), key
        self._home = self.root / LEDGER / key[:20]
        self._attempts, self._parts = self._home / "attempts", self._home / "parts"

    def open(self) -> Ledger:
        """Makes the ledger's folders; the driver does it once before workers start."""
        storage.make_folder(self._attempts)
        storage.make_folder(self._parts)
        return self

    def begin(self, unit: str) -> int:
        """Marks the start of an attempt.

        Returns:
            The attempt's number, from 1.

        Raises:
            RunIncomplete: The unit has failed MAX_ATTEMPTS times.
        """
        number = 1
        while number <= MAX_ATTEMPTS:
            try:
                os.close(os.open(self._attempts / f"{unit}.{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                number += 1
                continue
            except OSError as error:
                raise storage_error(error, f"opening an attempt in {self._attempts}") from error
            return number
        raise RunIncomplete(
            f"unit {unit} has failed {MAX_ATTEMPTS} times",
            expected="a worker that outlives one unit",
            fix=f"look at the worker's log, then remove {self._attempts}/{unit}.* and run the same command again",
        )

    def new_part(self, unit: str, folder: str, suffix: str = ".parquet") -> Path:
        """An attempt-unique path under ``root/folder``, which exists."""
        home = self.root / folder
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"making {home}") from error
        return home / f"part-{unit}-{uuid.uuid4().hex[:12]}{suffix}"

    def commit(self, unit: str, part: Mapping[str, Any]) -> bool:
        """Publishes a unit's result, unless another attempt has.

        Args:
            unit: The unit.
            part: ``path`` (relative to root), ``rows``, ``sha256`` and any counts; JSON values.

        Returns:
            True when this attempt won. When it lost, its part file is removed.
        """
        if storage.publish_new(self._parts / f"{unit}.json", storage.json_bytes({"unit": unit, **part})):
            return True
        if part.get("path"):
            (self.root / part["path"]).unlink(missing_ok=True)
        return False

    def committed(self) -> dict[str, dict[str, Any]]:
        """Every committed unit with its part, by unit; a commit whose part file is gone or cut does not count."""
        done: dict[str, dict[str, Any]] = {}
        if not self._parts.is_dir():
            return done
        for entry in sorted(os.scandir(self._parts), key=lambda e: e.name):
            if entry.name.startswith(storage.ASIDE) or not entry.name.endswith(".json"):
                continue
            part = json.loads(Path(entry.path).read_bytes())
            if self._is_whole(part):
                done[part["unit"]] = part
            else:
                Path(entry.path).unlink(missing_ok=True)
        return done

    def _is_whole(self, part: Mapping[str, Any]) -> bool:
        if not part.get("path"):
            return True
        path = self.root / part["path"]
        return path.is_file() and part.get("bytes") in (None, path.stat().st_size)

    def attempts(self) -> dict[str, int]:
        """How many attempts each unit has had."""
        counts: dict[str, int] = {}
        if self._attempts.is_dir():
            for entry in os.scandir(self._attempts):
                unit, _, number = entry.name.rpartition(".")
                counts[unit] = max(counts.get(unit, 0), int(number))
        return counts


def seal(root: Path, manifest: Mapping[str, Any], parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Writes the one final manifest, if it balances.

    Args:
        root: The run's folder.
        manifest: ``images_in``, ``scored``, ``quarantined`` and more.
        parts: Committed parts; each with ``path``, ``rows``, ``scored``, ``quarantined``, ``sha256``, ``unit``.

    Returns:
        The manifest as written.

    Raises:
        RunIncomplete: The totals do not balance; the message names the parts that do not.
    """
    listed = sorted(parts, key=lambda part: part["path"])
    wrong = [part["unit"] for part in listed if part["rows"] != part["scored"] + part["quarantined"]]
    total = sum(part["rows"] for part in listed)
    balances = manifest["images_in"] == manifest["scored"] + manifest["quarantined"] == total
    if wrong or not balances:
        raise RunIncomplete(
            f"{manifest['images_in']} images in, {manifest['scored']} scored, {manifest['quarantined']} quarantined, "
            f"{total} rows in {len(listed)} parts" + (f"; does not balance: {', '.join(wrong[:5])}" if wrong else ""),
            expected="images in = scored + quarantined = rows",
            fix="run the same command again: it does what is missing",
        )
    keep = ("path", "rows", "bytes", "sha256")
    whole = {"schema": SCHEMA, **manifest, "parts": [{k: part[k] for k in keep if k in part} for part in listed]}
    storage.write_json(Path(root) / MANIFEST, whole)
    return whole


def collect_garbage(root: Path, folder: str, manifest: Mapping[str, Any]) -> int:
    """Removes files of dead attempts: what lies in ``root/folder`` and is not listed. Readers never saw them.

    Returns:
        How many files were removed.
    """
    listed = {part["path"] for part in manifest["parts"]}
    removed = 0
    for path in (Path(root) / folder).glob("*"):
        if path.is_file() and f"{folder}/{path.name}" not in listed:
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def read_manifest(root: str | Path) -> dict[str, Any]:
    """The final manifest of a run.

    Raises:
        DataError: There is none: the run is unfinished, or this is no run.
        ArtifactError: It is not ours, or of a newer schema.
    """
    path = Path(root) / MANIFEST
    try:
        manifest = storage.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        unfinished = (Path(root) / "run.json").exists()
        raise DataError(
            f"{root} holds {'an unfinished run' if unfinished else 'no finished run'} (no {MANIFEST})",
            expected="the --out folder of a finished `eagleray score`",
            fix="run the same score command again: it resumes" if unfinished else "check the path",
        ) from None
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not JSON: {error}", expected="a manifest as written", fix="score again"
        ) from None
    if not isinstance(manifest, dict) or "parts" not in manifest:
        raise ArtifactError(f"{path} lists no parts", expected="a manifest as written", fix="score again")
    if manifest.get("schema", 0) > SCHEMA:
        raise ArtifactError(
            f"{path} has schema {manifest['schema']}", expected=f"schema {SCHEMA} or older", fix="use a newer eagleray"
        )
    return manifest


def open_scores(root: str | Path) -> Dataset:
    """Opens the scores of a finished run: exactly the parts that its manifest lists, nothing else in the folder.

    Args:
        root: The ``--out`` folder of ``eagleray score``.

    Returns:
        A pyarrow Dataset with one row per image uri.

    Raises:
        DataError: The run is not finished.
        ArtifactError: A listed part is missing or has another size.
    """
    import pyarrow.dataset as ds

    return ds.dataset([str(path) for path in _listed(root)], format="parquet")


def read_parts(root: str | Path, columns: Sequence[str]) -> Iterator[Table]:
    """The scores of a finished run, part by part: memory does not grow with their number, as it does in a Dataset,
    which keeps every file's metadata.

    Args:
        root: The ``--out`` folder of ``eagleray score``.
        columns: Which to read; one that a part of an older run has not is left out of its table.

    Raises:
        DataError: The run is not finished.
        ArtifactError: A listed part is missing or has another size.
    """
    import pyarrow.parquet as pq

    for path in _listed(root):
        with pq.ParquetFile(path) as file:
            present = set(file.schema_arrow.names)
            yield file.read(columns=[name for name in columns if name in present])


def _listed(root: str | Path) -> list[Path]:
    """The parts that count, each there and of its size."""
    manifest = read_manifest(root)
    paths = [Path(root) / part["path"] for part in manifest["parts"]]
    for path, part in zip(paths, manifest["parts"], strict=True):
        size = path.stat().st_size if path.is_file() else None
        if size is None or size != part.get("bytes", size):
            raise ArtifactError(
                f"{path} is {'missing' if size is None else f'{size} bytes'}",
                expected=f"{part.get('bytes', 'a file')} bytes as {MANIFEST} lists",
                fix="run the same score command again: it scores that part anew",
            )
    if not paths:
        raise DataError(f"{root} lists no parts", expected="at least one image", fix="check the source of the run")
    return paths
