"""The work of ingest on one slice: read, hash, validate once, keep or quarantine, write one shard, commit.

Knows no Ray: a scheduler builds a SliceIngester from JSON settings and calls it with one unit at a time. A unit that
has failed twice is validated image by image in a limited child process, where an image that kills, hangs or eats memory
is quarantined as ``poison``.

Example:
    >>> ingester = SliceIngester(settings)
    >>> ingester({"unit": "000000", "slice": "_ingest/slices/000000.parquet"})
    {'unit': '000000', 'uris': 4096, 'images': 4090, 'duplicates': 4, 'quarantined': 2, 'bytes': 201326592}
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagleray.core.commits import CAREFUL_FROM_ATTEMPT, Ledger
from eagleray.core.errors import storage_error
from eagleray.vision.corpus import QUARANTINE_SCHEMA, row_hash, split_of
from eagleray.vision.images import Header, ImageRefused, Limits, validate
from eagleray.vision.shards import ShardWriter, rewrite, write_table
from eagleray.vision.sources import locations
from eagleray.vision.sources.containers import Containers
from eagleray.vision.sources.reading import RUN_ROWS, read_items

HOME = "_ingest"  # of what only the ingest needs; removed when the manifest stands
SHARDS, INDEX, REFUSED = "shards", f"{HOME}/index", f"{HOME}/refused"
SLOW_KINDS = frozenset({"remote", "tar_stream"})  # a long read of these is no hang: a network, or gigabytes skipped
HEAD_BYTES = 4096  # of a quarantined item, hashed so that two sightings of one bad file can be recognised
ANSWERED = ("unit", "uris", "images", "duplicates", "quarantined", "bytes")
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.binary()),
        ("rank", pa.binary()),  # of exact duplicates the smallest (rank, uri) is kept
        ("uri", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("row_hash", pa.binary(32)),
        ("is_kept", pa.bool_()),  # within its slice
    ]
)

RANK = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # built once: json.dumps would for every image

Validate = Callable[[bytes], Header]


@dataclass(frozen=True)
class _Copy:
    """One sighting of an image: what the index and the shard say about it."""

    rank: bytes
    uri: str
    labels: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def order(self) -> tuple[bytes, str]:
        return self.rank, self.uri


class SliceIngester:
    """Ingests slices into a corpus folder.

    Args:
        settings: JSON values: ``root`` (the corpus folder), ``key`` (of the ledger), ``columns`` (metadata columns of
            every shard), ``limits`` (fields of images.Limits), ``splits`` and ``seed`` (see corpus.split_of; empty for
            none), ``hang_timeout_s`` (an image that is not validated in so long ends this process; 0 for no limit).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._root = Path(settings["root"])
        self._ledger = Ledger(self._root, str(settings["key"]))
        self._columns = tuple(settings["columns"])
        self._limits = Limits(**settings["limits"])
        self._splits: Mapping[str, float] = settings["splits"]
        self._seed = int(settings["seed"])
        self._hang_timeout_s = float(settings["hang_timeout_s"])
        self._containers = Containers()  # kept over slices: a compressed tar is read on, not from its start

    def __call__(self, unit: Mapping[str, Any]) -> dict[str, Any]:
        """Ingests one slice.

        Args:
            unit: ``unit`` (its id) and ``slice`` (its file, relative to the root).

        Returns:
            ``unit`` and the counts ``uris``, ``images``, ``duplicates``, ``quarantined``, ``bytes``.

        Raises:
            DataError: An archive is gone or has changed.
            StorageError: The storage refuses or does not answer; nothing is committed.
            RunIncomplete: The slice has failed too often.
        """
        try:
            return self._ingest(str(unit["unit"]), self._root / unit["slice"])
        except OSError as error:
            raise storage_error(error, f"ingesting slice {unit['unit']} of {self._root}") from error

    def _ingest(self, name: str, path_of_slice: Path) -> dict[str, Any]:
        done = self._ledger.find(name)
        if done is not None:  # by an attempt whose worker died before it had answered
            return {key: done[key] for key in ANSWERED}
        attempt = self._ledger.begin(name)
        listing = pq.read_table(path_of_slice)
        is_careful = attempt >= CAREFUL_FROM_ATTEMPT
        with (
            _validator(self._limits, is_careful=is_careful) as check,
            _Watch(0.0 if is_careful else self._hang_timeout_s) as watch,
        ):
            slice_ = _Slice(self, listing, check, watch)
            path = self._ledger.new_part(name, SHARDS)
            part = slice_.write(path)
        index = self._ledger.new_part(name, INDEX)
        write_table(index, slice_.index())
        refused = self._ledger.new_part(name, REFUSED)
        write_table(refused, pa.Table.from_pylist(slice_.refused, schema=QUARANTINE_SCHEMA))
        counts = {
            "uris": listing.num_rows,
            "images": part["rows"],
            "duplicates": listing.num_rows - part["rows"] - len(slice_.refused),
            "quarantined": len(slice_.refused),
        }
        files = {
            "path": f"{SHARDS}/{path.name}",
            "index": f"{INDEX}/{index.name}",
            "refused": f"{REFUSED}/{refused.name}",
        }
        answer = {"unit": name, **counts, "bytes": part["bytes"]}
        self._ledger.commit(name, {**files, **part, **answer})
        return answer

    def copy_of(self, row: Mapping[str, Any], image_id: str) -> _Copy:
        """What a listing row says about an image, with its split when splits are asked for."""
        metadata = dict(row["metadata"] or ())
        if self._splits and not metadata.get("split"):
            metadata["split"] = split_of(image_id, self._splits, self._seed)
        labels = tuple(row["labels"] or ())
        rank = RANK.encode([not labels, labels, sorted(metadata.items())])
        return _Copy(rank.encode("utf-8", "surrogatepass"), row["uri"], labels, metadata)

    @property
    def columns(self) -> tuple[str, ...]:
        """Metadata columns of every shard."""
        return self._columns

    def read(self, listing: pa.Table) -> Iterator[tuple[int, bytes | ImageRefused]]:
        """The bytes of a slice's items."""
        return read_items(listing, self._limits, containers=self._containers)


class _Slice:
    """One slice on its way into a shard."""

    def __init__(self, ingester: SliceIngester, listing: pa.Table, check: Validate, watch: _Watch) -> None:
        self._ingester, self._listing, self._check, self._watch = ingester, listing, check, watch
        self._is_slow = bool(SLOW_KINDS & set(listing.column("kind").unique().to_pylist())) or any(
            locations.is_remote(name) for name in listing.column("container").unique().to_pylist()
        )
        self._known = listing.select(["uri", "labels", "metadata"])
        self._best: dict[str, _Copy] = {}
        self._written: dict[str, _Copy] = {}
        self._copies: list[tuple[str, _Copy]] = []
        self.refused: list[dict[str, str | None]] = []

    def write(self, path: Path) -> dict[str, Any]:
        """Reads and validates everything and writes the shard."""
        with ShardWriter(path, self._ingester.columns) as writer:
            rows = (row for batch in self._known.to_batches(max_chunksize=RUN_ROWS) for row in batch.to_pylist())
            for row, (_, data) in zip(rows, self._ingester.read(self._listing), strict=True):
                if isinstance(data, ImageRefused):
                    self._refuse(row["uri"], data, None)
                else:
                    self._take(writer, row, data)
        if all(self._best[image_id] is copy for image_id, copy in self._written.items()):
            return writer.part
        better = path.with_name(f"{path.stem}-b{path.suffix}")
        part = rewrite(path, better, self._ingester.columns, self._replace)
        better.replace(path)
        return part

    def _take(self, writer: ShardWriter, row: Mapping[str, Any], data: bytes) -> None:
        image_id = hashlib.sha256(data).hexdigest()
        if image_id not in self._best:
            self._watch.arm()
            try:
                header = self._check(data)
            except ImageRefused as refusal:
                self._refuse(row["uri"], refusal, data)
                return
            if self._is_slow or writer.is_full_with(len(data)):
                self._watch.rest()
            copy = self._ingester.copy_of(row, image_id)
            self._best[image_id] = self._written[image_id] = copy
            picture = {"image": data, "width": header.width, "height": header.height, "format": header.format}
            writer.add({"id": image_id, "uri": copy.uri, "labels": copy.labels, **picture, **copy.metadata})
        else:
            copy = self._ingester.copy_of(row, image_id)
            if copy.order < self._best[image_id].order:
                self._best[image_id] = copy
        self._copies.append((image_id, copy))

    def _refuse(self, uri: str, refusal: ImageRefused, data: bytes | None) -> None:
        digest = None if data is None else hashlib.sha256(data[:HEAD_BYTES]).hexdigest()
        self.refused.append(
            {"uri": uri, "reason": str(refusal.reason), "detail": refusal.detail or None, "digest": digest}
        )

    def _replace(self, rows: pa.Table) -> pa.Table:
        """A row group whose images tell what their best copy tells."""
        best = [self._best[image_id] for image_id in rows.column("id").to_pylist()]
        for name in ("uri", "labels", *self._ingester.columns):
            values = [
                copy.metadata.get(name) if name in self._ingester.columns else getattr(copy, name) for copy in best
            ]
            at = rows.schema.get_field_index(name)
            rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
        return rows

    def index(self) -> pa.Table:
        """A row for every valid item, kept or not."""
        columns: list[list[Any]] = [[], [], [], [], [], []]
        for image_id, copy in self._copies:
            is_kept = self._best[image_id] is copy
            digest = row_hash(image_id, copy.labels, copy.metadata)
            values = (bytes.fromhex(image_id), copy.rank, copy.uri, copy.labels, digest, is_kept)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
        return pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA)


class _Watch:
    """Ends the process when one image is validated for too long; the next attempts find the culprit.

    The timer is faulthandler's, a C thread: it fires even when a decoder hangs with the interpreter lock held. Arming
    starts a thread, so it is armed at most once a second and stays armed over quick reads.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._armed_at = timeout_s, 0.0
        self._sink = open(os.devnull, "w", encoding="ascii")  # noqa: SIM115  lives as long as the timer may fire

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        self._sink.close()

    def arm(self) -> None:
        """Says that an image is being validated."""
        now = time.monotonic()
        if self._timeout_s > 0 and now - self._armed_at > 1.0:
            self._armed_at = now
            faulthandler.dump_traceback_later(self._timeout_s + 1.0, exit=True, file=self._sink)

    def rest(self) -> None:
        """Says that something else may take its time now."""
        if self._armed_at:
            faulthandler.cancel_dump_traceback_later()
            self._armed_at = 0.0


@contextmanager
def _validator(limits: Limits, *, is_careful: bool) -> Iterator[Validate]:
    """Validation in this process, or, for a slice that has killed its worker twice, in a limited child process."""
    if not is_careful:
        yield lambda data: validate(data, limits)
        return
    from eagleray.vision.sandbox import SandboxedDecoder

    with SandboxedDecoder(limits=limits) as decoder:
        yield decoder.validate


def without(rows: pa.Table, ids: pa.Array) -> pa.Table:
    """A row group without some images."""
    return rows.filter(pc.invert(pc.is_in(rows.column("id"), value_set=ids)))
