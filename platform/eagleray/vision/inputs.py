"""The frozen input of a scoring run: what is to be scored, cut into units that stay the same over every resume.

A corpus is cut by row groups of its shards; a Selection of it (a split) into units of the rows that it keeps, without a
copy of any image. A source that can be read in place (folder, zip, tar, listing) is listed
once into Parquet under ``DIR/input`` and scored without a copy. A later run lists again: items that are as they were
keep their unit and their scores, new and changed ones get new units, vanished ones are dropped and reported.

Files of equal size are put side by side, so that exact duplicates meet in one unit and are inferred once.

Example:
    >>> frozen = freeze_listing("photos/", Path("runs/a/input"))
    >>> frozen.images_in, len(frozen.units)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagleray.core import storage
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError, DataError

if TYPE_CHECKING:
    from eagleray.vision.corpus import ShardManifest

SCHEMA = 1
WINDOW_ITEMS = 1 << 18  # listed items held at once; duplicates are brought together within a window
UNIT_IMAGES, MAX_UNIT_IMAGES = 128, 4096  # small units end together and lose little to a crash; big archives grow them
SMALLEST_UNIT_IMAGES = (8, 32)  # of a small and of a large archive
FILE_UNITS = 64  # row groups a listing file: each unit's worker reads the file's whole footer, 8 us a group (measured)
TAPER = 8  # the last units are an eighth of what is left
UNITS_SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("kind", pa.string()),  # listing, corpus, or set_aside: what ingest had quarantined
        ("path", pa.string()),
        ("first_group", pa.int32()),
        ("num_groups", pa.int32()),
        ("images", pa.int64()),
        ("derived_from", pa.string()),
        ("keep", pa.string()),  # one bit a row, packed, in hex: 1 = of the unit; empty = every row
    ]
)


@dataclass(frozen=True)
class FrozenInput:
    """What a run is to score.

    Attributes:
        source: The source as a canonical string.
        kind: ``corpus`` or ``listing``.
        digest: Digest of the input; equal inputs have equal digests.
        images_in: Uris to account for.
        units: One JSON dict a unit (UNITS_SCHEMA).
        changes: ``new``, ``changed``, ``vanished`` items since the last run; all 0 the first time.
    """

    source: str
    kind: str
    digest: str
    images_in: int
    units: tuple[dict[str, Any], ...]
    changes: dict[str, int]


def unit_images(already: int) -> int:
    """Images a unit holds at most.

    Args:
        already: Items cut into units so far; units grow with it, so that 100 million images make some 25,000 parts.
    """
    return min(MAX_UNIT_IMAGES, UNIT_IMAGES << min(8, already // WINDOW_ITEMS))


def unit_sizes(already: int, num_items: int, *, is_last: bool) -> list[int]:
    """How a window of items is cut.

    Args:
        already: Items cut before.
        num_items: Items of the window.
        is_last: Whether the archive ends here: its last units shrink, so that workers end together.

    Returns:
        The units' sizes, in order; their sum is ``num_items``. Source of the taper: guided self-scheduling,
        Polychronopoulos and Kuck 1987.
    """
    low, high = SMALLEST_UNIT_IMAGES
    smallest = min(high, max(low, num_items // high))
    sizes, left = [], num_items
    while left:
        size = unit_images(already)
        if is_last:
            size = min(size, max(smallest, left // TAPER))
        sizes.append(min(size, left))
        left -= sizes[-1]
    return sizes


@dataclass(frozen=True)
class Selection:
    """Some images of a corpus: a split.

    Attributes:
        keep: bool (N,): whether an image is chosen, in the order of the corpus' shards and their rows.
    """

    keep: np.ndarray

    @property
    def digest(self) -> str:
        """Of the choice."""
        return hashlib.sha256(len(self.keep).to_bytes(8, "big") + np.packbits(self.keep).tobytes()).hexdigest()


def freeze_corpus(corpus: ShardManifest, home: Path, selection: Selection | None = None) -> FrozenInput:
    """Cuts a corpus into units by row groups; what its ingest had quarantined is one more unit.

    Args:
        corpus: An opened corpus.
        home: ``DIR/input``.
        selection: Only these images; each counts once, under the uri that the corpus kept, and nothing is set aside.
    """
    source = str(Path(corpus.path).resolve())
    digest = digest_json([corpus.digest, selection.digest]) if selection else corpus.digest
    previous = _read_head(home, source)
    if previous and previous["digest"] == digest:
        return _frozen(home, previous, {"new": 0, "changed": 0, "vanished": 0})
    if selection and len(selection.keep) != corpus.images:
        raise ValueError(f"a selection of {len(selection.keep)} images does not fit a corpus of {corpus.images}")
    units = list(_corpus_units(corpus, selection))
    if corpus.quarantined and selection is None:
        path = Path(corpus.path) / "quarantine.parquet"
        name = digest_json(["set_aside", storage.sha256_file(path)])[:24]
        units.append(_unit(name, "set_aside", str(path), 0, len(_group_rows(path)), corpus.quarantined, "", ""))
    images_in = int(selection.keep.sum()) if selection else corpus.uris_in
    head = {"source": source, "kind": "corpus", "digest": digest, "images_in": images_in}
    return _publish(home, head, units, generation=0, changes={"new": 0, "changed": 0, "vanished": 0})


def _corpus_units(corpus: ShardManifest, selection: Selection | None) -> Iterator[dict[str, Any]]:
    """Runs of row groups with at most ``unit_images`` images to score; none where nothing is chosen."""
    already = start = 0
    for shard in corpus.shards:
        path = Path(corpus.path) / shard["path"]
        rows = _group_rows(path)
        edges = [start, *(start + edge for edge in itertools.accumulate(rows))]
        start = edges[-1]
        keeps = [selection.keep[a:b] for a, b in itertools.pairwise(edges)] if selection else None
        wanted = [int(keep.sum()) for keep in keeps] if keeps is not None else rows
        first = 0
        while first < len(rows):
            last, images = first, 0
            while last < len(rows) and (images == 0 or images + wanted[last] <= unit_images(already)):
                images += wanted[last]
                last += 1
            if images:
                keep = np.packbits(np.concatenate(keeps[first:last])).tobytes().hex() if keeps is not None else ""
                name = digest_json([shard["sha256"], first, last, *([keep] if keep else [])])[:24]
                yield _unit(name, "corpus", str(path), first, last - first, images, "", keep)
            first, already = last, already + images


def freeze_listing(source: str, batches: Iterable[pa.RecordBatch], home: Path) -> FrozenInput:
    """Lists a source that is read in place and cuts it into units; a later run keeps what has not changed.

    Args:
        source: The source as a canonical string.
        batches: The listing, streamed, in LISTING_SCHEMA.
        home: ``DIR/input``.

    Raises:
        DataError: The source holds no file.
        ConfigError: ``home`` belongs to another source.
    """
    previous = _read_head(home, source)
    old = _Listed.read(home, previous) if previous else None
    generation = previous["generation"] + 1 if previous else 0
    cutter = _Cutter(home, generation, keeps_uris=old is not None)
    is_known = _Known(old)
    for batch in batches:
        cutter.add(is_known.fresh(pa.Table.from_batches([batch])))
    fresh_uris = cutter.close()
    if not is_known.total:
        raise DataError(f"{source} is empty", expected="at least one file or member", fix="check the source")
    if old is None:
        changes = {"new": 0, "changed": 0, "vanished": 0}
        units = cutter.units
    else:
        kept, changes = is_known.reconcile(fresh_uris)
        if previous and not any(changes.values()):
            return _frozen(home, previous, changes)
        units = [*old.surviving_units(kept, cutter), *cutter.units]
    head = {"source": source, "kind": "listing", "digest": is_known.digest(), "images_in": is_known.total}
    return _publish(home, head, units, generation=generation, changes=changes)


def read_unit_listing(unit: dict[str, Any]) -> pa.Table:
    """The listed items of one unit."""
    with pq.ParquetFile(unit["path"]) as file:
        return file.read_row_groups(range(unit["first_group"], unit["first_group"] + unit["num_groups"]))


class _Cutter:
    """Cuts listed items into units, one Parquet row group a unit, at most FILE_UNITS a file."""

    def __init__(self, home: Path, generation: int, *, keeps_uris: bool) -> None:
        self._home, self._generation, self._keeps_uris = storage.make_folder(home), generation, keeps_uris
        self._held: list[pa.Table] = []
        self._num_held = self._already = self._files = 0
        self._uris: list[pa.ChunkedArray] = []
        self.units: list[dict[str, Any]] = []

    def add(self, table: pa.Table) -> None:
        if table.num_rows:
            self._held.append(table)
            self._num_held += table.num_rows
            if self._keeps_uris:
                self._uris.append(table.column("uri"))
        if self._num_held >= WINDOW_ITEMS:
            self._cut(is_last=False)

    def close(self) -> pa.ChunkedArray:
        """Cuts what is held; returns every uri that came in, where they are kept."""
        if self._num_held:
            self._cut(is_last=True)
        return pa.chunked_array([c for u in self._uris for c in u.chunks], type=pa.string())

    def _cut(self, *, is_last: bool) -> None:
        table = _equal_sizes_together(pa.concat_tables(self._held))
        self._held, self._num_held = [], 0
        sizes = unit_sizes(self._already, table.num_rows, is_last=is_last)
        starts = [0, *itertools.accumulate(sizes)]
        pieces = [table.slice(at, size) for at, size in zip(starts, sizes, strict=False)]
        self.units += self.write(pieces, [""] * len(pieces))
        self._already += table.num_rows

    def write(self, pieces: list[pa.Table], derived_from: list[str]) -> list[dict[str, Any]]:
        """Writes pieces as row groups and returns their units."""
        cuts = [slice(at, at + FILE_UNITS) for at in range(0, len(pieces), FILE_UNITS)]
        return [unit for cut in cuts for unit in self._write_file(pieces[cut], derived_from[cut])]

    def _write_file(self, pieces: list[pa.Table], derived_from: list[str]) -> list[dict[str, Any]]:
        path = self._home / f"listing-{self._generation:04d}-{self._files:05d}.parquet"
        self._files += 1
        aside = storage.aside_path(path)
        units = []
        with pq.ParquetWriter(aside, pieces[0].schema, compression="zstd") as writer:
            for group, (piece, ancestor) in enumerate(zip(pieces, derived_from, strict=True)):
                writer.write_table(piece, row_group_size=max(1, piece.num_rows))
                name = hashlib.blake2b(b"".join(_fingerprints(piece).to_pylist()), digest_size=12).hexdigest()
                units.append(_unit(name, "listing", path.name, group, 1, piece.num_rows, ancestor, ""))
        storage.publish_file(aside, path)
        return units


class _Known:
    """Compares a new listing, as it streams, with the one before."""

    def __init__(self, old: _Listed | None) -> None:
        self._old, self.total = old, 0
        self._prints: list[pa.Array] = []

    def fresh(self, table: pa.Table) -> pa.Table:
        """The items that the listing before does not have as they are now."""
        prints = _fingerprints(table)
        self._prints.append(prints)
        self.total += table.num_rows
        if self._old is None:
            return table
        return table.filter(pc.invert(pc.is_in(prints, value_set=self._old.prints)))

    def reconcile(self, fresh_uris: pa.ChunkedArray) -> tuple[pa.Array, dict[str, int]]:
        """Which old items are still there as they were, and the counts of what is not."""
        assert self._old is not None
        kept = pc.is_in(self._old.prints, value_set=pa.concat_arrays(self._prints))
        changed = pc.sum(pc.is_in(fresh_uris, value_set=self._old.uris)).as_py() or 0 if len(fresh_uris) else 0
        gone = len(kept) - (pc.sum(kept).as_py() or 0)
        return kept, {"new": len(fresh_uris) - changed, "changed": changed, "vanished": max(0, gone - changed)}

    def digest(self) -> str:
        """Independent of the order of listing."""
        prints = np.concatenate([np.frombuffer(a.buffers()[1], dtype="S16", count=len(a)) for a in self._prints])
        return hashlib.sha256(np.sort(prints).tobytes()).hexdigest()


@dataclass
class _Listed:
    """The listing of the run before, by unit."""

    units: list[dict[str, Any]]
    prints: pa.Array
    uris: pa.Array
    starts: list[int]

    @classmethod
    def read(cls, home: Path, head: dict[str, Any]) -> _Listed:
        units = read_units(home, head)
        prints, uris, starts, at = [], [], [], 0
        for unit in units:
            table = read_unit_listing(unit)
            prints.append(_fingerprints(table))
            uris.append(table.column("uri").combine_chunks())
            starts.append(at)
            at += table.num_rows
        return cls(units, pa.concat_arrays(prints), pa.concat_arrays(uris), starts)

    def surviving_units(self, kept: pa.Array, cutter: _Cutter) -> Iterator[dict[str, Any]]:
        """Whole units as they are; a unit that lost items becomes one of the rest, derived from it."""
        mask = kept.to_numpy(zero_copy_only=False)
        pieces, ancestors = [], []
        for unit, start in zip(self.units, self.starts, strict=True):
            here = mask[start : start + unit["images"]]
            if here.all():
                yield {**unit, "path": Path(unit["path"]).name}
            elif here.any():
                pieces.append(read_unit_listing(unit).filter(pa.array(here)))
                ancestors.append(unit["unit"])
        yield from cutter.write(pieces, ancestors)


def _fingerprints(table: pa.Table) -> pa.Array:
    """16 bytes that change when an item's uri, size or time does."""
    rows = zip(table["uri"].to_pylist(), table["size"].to_pylist(), table["mtime_ns"].to_pylist(), strict=True)
    digests = [hashlib.blake2b(f"{u}\0{s}\0{t}".encode(), digest_size=16).digest() for u, s, t in rows]
    return pa.array(digests, type=pa.binary(16))


def _equal_sizes_together(table: pa.Table) -> pa.Table:
    """Moves each item beside the first one of its size; otherwise keeps the order."""
    sizes = table.column("size").to_numpy()
    _, first, inverse = np.unique(sizes, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")
    return table if np.array_equal(order, np.arange(len(order))) else table.take(pa.array(order))


def _unit(*values: str | int) -> dict[str, Any]:
    """A row of UNITS_SCHEMA."""
    return dict(zip(UNITS_SCHEMA.names, values, strict=True))


def _group_rows(path: Path) -> list[int]:
    """Rows of each row group."""
    with pq.ParquetFile(path) as file:
        return [int(file.metadata.row_group(group).num_rows) for group in range(file.metadata.num_row_groups)]


def _read_head(home: Path, source: str) -> dict[str, Any] | None:
    try:
        head: dict[str, Any] = storage.read_json(home / "input.json")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{home}/input.json is not JSON", expected="as written", fix="use a new --out") from error
    if head["schema"] > SCHEMA:
        raise ArtifactError(
            f"{home} has schema {head['schema']}", expected=f"{SCHEMA} or older", fix="use a newer eagleray"
        )
    if head["source"] != source:
        raise ConfigError(
            f"{home.parent} holds a run over another source: {head['source']}",
            expected=f"a new or empty folder, or one that holds a run over {source}",
            fix="give another --out",
        )
    return head


def read_units(home: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The units of an input, by what its ``input.json`` says; paths as they are here and now."""
    units: list[dict[str, Any]] = pq.read_table(home / head["units"]).to_pylist()
    for unit in units:
        if unit["kind"] == "listing":  # kept by name, so that a run's folder can be moved
            unit["path"] = str(home / unit["path"])
    return units


def _frozen(home: Path, head: dict[str, Any], changes: dict[str, int]) -> FrozenInput:
    units = tuple(read_units(home, head))
    return FrozenInput(head["source"], head["kind"], head["digest"], head["images_in"], units, changes)


def _publish(
    home: Path, head: dict[str, Any], units: list[dict[str, Any]], *, generation: int, changes: dict[str, int]
) -> FrozenInput:
    storage.make_folder(home)
    name = f"units-{generation:04d}.parquet"
    storage.write_table(pa.Table.from_pylist(units, schema=UNITS_SCHEMA), home / name)
    whole = {"schema": SCHEMA, **head, "units": name, "generation": generation}
    storage.write_json(home / "input.json", whole)
    return _frozen(home, whole, changes)
