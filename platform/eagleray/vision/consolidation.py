"""The end of an ingest: exact duplicates across slices, the totals, the manifest.

Only ids, uris and labels of the candidates are in memory, as Arrow. The few shards that hold a copy that is not kept
are rewritten without decoding. The manifest is published last: a crash before it leaves everything to be done once
more, with the same result.

Refuses to publish totals that do not balance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eagleray.core import storage
from eagleray.core.commits import Ledger
from eagleray.core.errors import RunIncomplete
from eagleray.vision import corpus as corpora
from eagleray.vision.corpus import ShardManifest
from eagleray.vision.intake import SHARDS, without
from eagleray.vision.shards import rewrite, write_table
from eagleray.vision.slices import Listed, listed_rows

Part = Mapping[str, Any]


@dataclass(frozen=True)
class Finish:
    """What consolidation needs to know besides the parts.

    Attributes:
        root: The corpus folder.
        home: The ingest folder in it.
        key: Of the ledger.
        listed: The frozen listing.
        about: Fields of the manifest that are known already: sources, settings, columns, skipped_special,
            metadata_unmatched.
    """

    root: Path
    home: Path
    key: str
    listed: Listed
    about: Mapping[str, Any]


def consolidate(finish: Finish, parts: Iterable[Part], beat: Callable[[], None] = lambda: None) -> ShardManifest:
    """Makes one corpus of committed slices and publishes its manifest.

    Args:
        finish: Where and what.
        parts: Every committed part.
        beat: Called now and then, so that a person sees that the run lives.

    Raises:
        RunIncomplete: The totals do not balance.
        StorageError: The storage refuses; nothing is published.
    """
    parts = sorted(parts, key=lambda part: str(part["unit"]))
    candidates = _candidates(finish.root, parts, beat)
    is_first = _is_first(candidates)
    shards = _settle(finish, parts, candidates.filter(pa.array(~is_first)), beat)
    files = {
        corpora.DUPLICATES: write_table(finish.root / corpora.DUPLICATES, _duplicates(candidates, is_first)),
        corpora.QUARANTINE: write_table(finish.root / corpora.QUARANTINE, _quarantine(finish.root, parts)),
        corpora.LISTING: write_table(
            finish.root / corpora.LISTING,
            pa.concat_tables([corpora.LISTED_SCHEMA.empty_table(), *listed_rows(finish.home, finish.listed)]),
        ),
    }
    manifest = ShardManifest(
        path=finish.root,
        images=sum(int(shard["rows"]) for shard in shards),
        duplicates=int(files[corpora.DUPLICATES]["rows"]),
        quarantined=int(files[corpora.QUARANTINE]["rows"]),
        uris_in=finish.listed.uris,
        digest=_digest(finish.root, parts, candidates, is_first),
        shards=tuple(shards),
        files=files,
        **finish.about,
    )
    _check_balance(manifest, parts)
    storage.write_json(finish.root / corpora.MANIFEST, manifest.to_json())
    return manifest


def _check_balance(manifest: ShardManifest, parts: Iterable[Part]) -> None:
    wrong = [p["unit"] for p in parts if p["uris"] != p["images"] + p["duplicates"] + p["quarantined"]]
    if wrong or manifest.uris_in != manifest.images + manifest.duplicates + manifest.quarantined:
        raise RunIncomplete(
            f"{manifest.uris_in} items in, {manifest.images} images, {manifest.duplicates} duplicates, "
            f"{manifest.quarantined} quarantined"
            + (f"; does not balance: slice {', '.join(wrong[:5])}" if wrong else ""),
            expected="items in = images + duplicates + quarantined",
            fix="run the same command again; if it stays so, ingest into another --out and report it",
        )


def _bytes32(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """A column of 32-byte values as rows of bytes, without Python objects."""
    values = column.cast(pa.binary(32)).combine_chunks()
    raw = np.frombuffer(values.buffers()[1], np.uint8) if len(values) else np.empty(0, np.uint8)
    return raw[values.offset * 32 : (values.offset + len(values)) * 32].reshape(-1, 32)


def _prefixes(ids: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of each id as a number: equal ids have equal ones, and a hundred million of them fit."""
    return np.ascontiguousarray(_bytes32(ids)[:, :8]).view(np.uint64).reshape(-1)


def _candidates(root: Path, parts: list[Part], beat: Callable[[], None]) -> pa.Table:
    """Index rows of images that may occur more than once, best copy first; with the number of their part."""
    found = [np.empty(0, np.uint64)]
    for part in parts:
        found.append(_prefixes(pq.read_table(root / part["index"], columns=["id"]).column("id")))
        beat()
    values, counts = np.unique(np.concatenate(found), return_counts=True)
    repeated = values[counts > 1]
    names = ["id", "rank", "uri", "labels", "row_hash", "is_kept"]
    tables = []
    for number, part in enumerate(parts):
        mask = np.isin(found[number + 1], repeated, assume_unique=False)
        if mask.any():
            table = pq.read_table(root / part["index"], columns=names).filter(pa.array(mask))
            tables.append(table.append_column("part", pa.array([number] * table.num_rows, pa.int32())))
    if not tables:
        from eagleray.vision.intake import INDEX_SCHEMA

        return INDEX_SCHEMA.append(pa.field("part", pa.int32())).empty_table()
    order = [(name, "ascending") for name in ("id", "rank", "uri", "part")]
    return pa.concat_tables(tables).sort_by(order)


def _is_first(candidates: pa.Table) -> npt.NDArray[np.bool_]:
    """Whether each candidate is the best copy of its image: they are sorted, so it is where the id changes."""
    ids = candidates.column("id").combine_chunks()
    if not len(ids):
        return np.empty(0, np.bool_)
    changes = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
    first = np.concatenate([[True], changes])
    # Two copies of one slice may have the same rank and uri (a listing that names a file twice): the kept one is where
    # the shard says it is, so the mark moves to it.
    kept = candidates.column("is_kept").to_numpy(zero_copy_only=False)
    for at in np.flatnonzero(first & ~kept):
        same = at
        while not kept[same]:
            same += 1
        first[at], first[same] = False, True
    return first


def _settle(finish: Finish, parts: list[Part], others: pa.Table, beat: Callable[[], None]) -> list[dict[str, Any]]:
    """The shards that count: those of the parts, rewritten where they hold a copy that is not kept."""
    ledger = Ledger(finish.root, finish.key)
    lost = others.filter(others.column("is_kept"))
    by_part: dict[int, list[str]] = {}
    for number, image_id in zip(lost.column("part").to_pylist(), lost.column("id").to_pylist(), strict=True):
        by_part.setdefault(number, []).append(image_id.hex())
    shards = []
    for number, part in enumerate(parts):
        ids = by_part.get(number, [])
        if len(ids) == part["rows"]:
            continue  # nothing of it is left
        shard = {key: part[key] for key in ("path", "rows", "bytes", "sha256")}
        if ids:
            path = ledger.new_part(str(part["unit"]), SHARDS)
            change = partial(without, ids=pa.array(ids, pa.string()))
            shard = rewrite(finish.root / part["path"], path, finish.about["columns"], change)
            shard["path"] = f"{SHARDS}/{path.name}"
            beat()
        shards.append({"path": shard.pop("path"), **shard})
    return shards


def _duplicates(candidates: pa.Table, is_first: npt.NDArray[np.bool_]) -> pa.Table:
    others = candidates.filter(pa.array(~is_first)).sort_by([("id", "ascending"), ("uri", "ascending")])
    ids = pa.array([value.hex() for value in others.column("id").to_pylist()], pa.string())
    return pa.table([ids, others.column("uri"), others.column("labels")], schema=corpora.DUPLICATES_SCHEMA)


def _quarantine(root: Path, parts: list[Part]) -> pa.Table:
    tables = [pq.read_table(root / part["refused"]) for part in parts if part["quarantined"]]
    return pa.concat_tables([corpora.QUARANTINE_SCHEMA.empty_table(), *tables]).sort_by("uri")


def _digest(root: Path, parts: list[Part], candidates: pa.Table, is_first: npt.NDArray[np.bool_]) -> str:
    """Of the kept rows: those of images seen once, and the best copies."""
    hashes = [_bytes32(candidates.filter(pa.array(is_first)).column("row_hash")).tobytes()]
    repeated = np.unique(_prefixes(candidates.column("id")))
    for part in parts:
        table = pq.read_table(root / part["index"], columns=["id", "row_hash"])
        once = table.filter(pa.array(~np.isin(_prefixes(table.column("id")), repeated)))
        hashes.append(_bytes32(once.column("row_hash")).tobytes())
    return corpora.corpus_digest(b"".join(hashes))
