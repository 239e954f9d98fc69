"""Cuts a streamed listing into slices that become shards, and remembers what was listed in a few bytes an item.

Slices are Parquet files of listing rows; when the last is written a marker freezes the listing, so that a resumed
ingest works on what was listed and nothing else. An interrupted listing starts again.

Example:
    >>> listing = write_slices(batches, home, SliceSize(4096, 64 << 20))
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from eagleray.core import storage
from eagleray.core.errors import DataError
from eagleray.vision.corpus import LISTED_SCHEMA
from eagleray.vision.shards import write_table
from eagleray.vision.sources import LISTING_SCHEMA

Stamps = npt.NDArray[np.uint64]

MARKER, FOLDER = "listing.json", "slices"
SLICE_SCHEMA = LISTING_SCHEMA.append(pa.field("stamp", pa.uint64()))
UNKNOWN_BYTES = 1 << 20  # taken for an item whose size is not known yet: a usual photo
MAX_COLUMNS = 1_000
STAMPED = json.JSONEncoder(ensure_ascii=False)  # built once: json.dumps would for every row


@dataclass(frozen=True)
class SliceSize:
    """Where a slice ends, whichever comes first."""

    max_images: int
    max_bytes: int


@dataclass(frozen=True)
class Listed:
    """A frozen listing.

    Attributes:
        uris: Items listed.
        slices: Files, relative to the ingest folder, in order; each with its number of rows.
        columns: Every metadata column, sorted.
        digest: Of all uris and their stamps, independent of order.
    """

    uris: int
    slices: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "slices": [list(entry) for entry in self.slices], "columns": list(self.columns)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Listed:
        """The listing that ``to_json`` wrote."""
        slices = tuple((str(path), int(rows)) for path, rows in value["slices"])
        return cls(int(value["uris"]), slices, tuple(value["columns"]), str(value["digest"]))


def write_slices(batches: Iterable[pa.RecordBatch], home: Path, size: SliceSize) -> Listed:
    """Writes a listing as slices.

    Args:
        batches: Record batches of LISTING_SCHEMA.
        home: The ingest folder; what an interrupted listing left in it is removed.
        size: Of a slice.

    Returns:
        What was listed.

    Raises:
        DataError: The metadata has too many columns.
        StorageError: The storage refuses.
    """
    shutil.rmtree(home / FOLDER, ignore_errors=True)
    storage.make_folder(home / FOLDER)
    slices: list[tuple[str, int]] = []
    columns: set[str] = set()
    total = Digest()
    for table in _cut(batches, size):
        stamps = stamps_of(table)
        total.add(hashes_of(table.column("uri")), stamps)
        columns.update(_keys(table))
        if len(columns) > MAX_COLUMNS:
            raise DataError(
                f"the metadata has more than {MAX_COLUMNS} different columns",
                expected="the same few columns for every image",
                fix="put what differs for each image into one column",
            )
        path = f"{FOLDER}/{len(slices):06d}.parquet"
        write_table(home / path, table.append_column("stamp", pa.array(stamps, pa.uint64())))
        slices.append((path, table.num_rows))
    return Listed(sum(rows for _, rows in slices), tuple(slices), tuple(sorted(columns)), total.hex())


def _keys(table: pa.Table) -> set[str]:
    found: set[str] = set()
    for chunk in table.column("metadata").chunks:
        found.update(chunk.keys.unique().to_pylist())
    return found


def _cut(batches: Iterable[pa.RecordBatch], size: SliceSize) -> Iterator[pa.Table]:
    pending: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in batches:
        sizes = _sizes(batch)
        start = 0
        for at in range(batch.num_rows):
            is_full = num_rows and (num_rows >= size.max_images or num_bytes + sizes[at] > size.max_bytes)
            if is_full:
                yield pa.Table.from_batches([*pending, batch.slice(start, at - start)])
                pending, start, num_rows, num_bytes = [], at, 0, 0
            num_rows, num_bytes = num_rows + 1, num_bytes + sizes[at]
        pending.append(batch.slice(start))
    if num_rows:
        yield pa.Table.from_batches(pending)


def _sizes(batch: pa.RecordBatch) -> list[int]:
    size, stored = batch.column("size").to_numpy(), batch.column("stored").to_numpy()
    known = np.where(size >= 0, size, np.where(stored >= 0, stored, UNKNOWN_BYTES))
    return known.tolist()  # type: ignore[no-any-return]


def stamps_of(table: pa.Table) -> Stamps:
    """A 64-bit stamp of each row: another one when size, time, check value, labels or metadata differ."""
    names = ["kind", "size", "stored", "crc32", "mtime_ns", "labels", "metadata"]
    stamps = np.empty(table.num_rows, np.uint64)
    at = 0
    for batch in table.select(names).to_batches():
        for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
            text = STAMPED.encode(row).encode("utf-8", "surrogatepass")
            stamps[at] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
            at += 1
    return stamps


def hashes_of(uris: pa.ChunkedArray) -> Stamps:
    """A 64-bit hash of each uri, the same on every machine."""
    values = (
        hashlib.blake2b(uri.encode(), digest_size=8).digest() for chunk in uris.chunks for uri in chunk.to_pylist()
    )
    return np.frombuffer(b"".join(values), dtype="<u8")


class Digest:
    """A digest of uris and stamps that does not depend on their order: sums modulo 2**64 of two mixes, and the count.

    Tells an accidental change; it is no defence against a forged one.
    """

    def __init__(self) -> None:
        self._count, self._sums = 0, np.zeros(2, np.uint64)

    def add(self, hashes: Stamps, stamps: Stamps) -> None:
        """Takes rows into account."""
        mixed = (hashes ^ np.uint64(0x9E3779B97F4A7C15)) * (stamps | np.uint64(1))
        self._sums += np.array([mixed.sum(dtype=np.uint64), (mixed >> np.uint64(17)).sum(dtype=np.uint64)], np.uint64)
        self._count += len(stamps)

    def hex(self) -> str:
        """The digest."""
        return hashlib.sha256(self._sums.tobytes() + str(self._count).encode()).hexdigest()


def listed_rows(home: Path, listed: Listed) -> Iterator[pa.Table]:
    """``uri`` and ``stamp`` of every slice."""
    for path, _ in listed.slices:
        yield pq.read_table(home / path, columns=list(LISTED_SCHEMA.names)).cast(LISTED_SCHEMA)


@dataclass(frozen=True)
class Difference:
    """How a new listing differs from an old one; counts of uris, and one example of each."""

    new: int
    changed: int
    vanished: int
    example: str

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.vanished)


def compare(batches: Iterable[pa.RecordBatch], before: Path) -> Difference:
    """Compares a listing with the ``listing.parquet`` of a corpus, at 16 bytes a uri.

    Args:
        batches: Record batches of LISTING_SCHEMA.
        before: The file.
    """
    old_hashes, old_stamps, old_digest = _read_listed(before)
    digest = Digest()
    seen = np.zeros(len(old_hashes), bool)
    new = changed = 0
    example = ""
    for batch in batches:
        table = pa.Table.from_batches([batch])
        hashes, stamps = hashes_of(table.column("uri")), stamps_of(table)
        digest.add(hashes, stamps)
        at = np.minimum(np.searchsorted(old_hashes, hashes), max(0, len(old_hashes) - 1))
        is_old = old_hashes[at] == hashes if len(old_hashes) else np.zeros(len(hashes), bool)
        is_changed = is_old & (old_stamps[at] != stamps) if len(old_hashes) else is_old
        if len(old_hashes):
            seen[at[is_old]] = True
        new, changed = new + int((~is_old).sum()), changed + int(is_changed.sum())
        if not example and (is_changed | ~is_old).any():
            example = table.column("uri")[int(np.argmax(is_changed | ~is_old))].as_py()
    if digest.hex() == old_digest:  # also when one uri is listed twice with two stamps
        return Difference(0, 0, 0, "")
    distinct = np.concatenate([[True], old_hashes[1:] != old_hashes[:-1]]) if len(old_hashes) else seen
    return Difference(new, changed, int((distinct & ~seen).sum()), example)


def _read_listed(path: Path) -> tuple[Stamps, Stamps, str]:
    hashes, stamps, digest = [], [], Digest()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            hashes.append(hashes_of(pa.chunked_array([batch.column("uri")])))
            stamps.append(batch.column("stamp").to_numpy())
            digest.add(hashes[-1], stamps[-1])
    if not hashes:
        return np.empty(0, np.uint64), np.empty(0, np.uint64), digest.hex()
    all_hashes, all_stamps = np.concatenate(hashes), np.concatenate(stamps)
    order = np.lexsort((all_stamps, all_hashes))
    return all_hashes[order], all_stamps[order], digest.hex()
