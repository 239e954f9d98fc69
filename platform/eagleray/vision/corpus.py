"""A corpus: every image of some sources once, validated and hashed, in Parquet shards under one manifest that balances.

::

    CORPUS/manifest.json       schema, totals, digest, every shard's path, rows, bytes and sha256; written last
    CORPUS/shards/*.parquet    id, uri, image, width, height, format, labels, then metadata columns (nullable strings)
    CORPUS/duplicates.parquet  id, uri, labels of each further copy of an image: scored once, reported for each uri
    CORPUS/quarantine.parquet  uri, reason, detail, digest (sha256 of the first 4,096 bytes; null when none were read)
    CORPUS/listing.parquet     uri, stamp: what was listed, so that a later ingest can say what has changed

``uris_in = images + duplicates + quarantined``. The corpus digest is that of the images, their labels and metadata: the
same for the same images from a folder, a zip or a tar, in any order, anywhere. Of exact duplicates the copy is kept
that has labels, then the smallest labels, metadata and uri, so the choice does not depend on the order of listing.

Refuses to open: a folder without a manifest, one of a newer schema, a manifest that was changed, a missing shard.

Example:
    >>> corpus = open_corpus("corpora/photos")
    >>> corpus.images, corpus.digest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eagleray.core import storage
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError

CORPUS_SCHEMA = 1
MANIFEST, DUPLICATES, QUARANTINE, LISTING = (
    "manifest.json",
    "duplicates.parquet",
    "quarantine.parquet",
    "listing.parquet",
)
DUPLICATES_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("labels", pa.list_(pa.string()))])
QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("uri", "reason", "detail", "digest")])
LISTED_SCHEMA = pa.schema([("uri", pa.string()), ("stamp", pa.uint64())])
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
SPLITS_SUM_TOLERANCE = 1e-9  # fractions are typed by people: 0.7 + 0.2 + 0.1 is not 1.0 in binary


@dataclass(frozen=True)
class Sample:
    """One image of a corpus, without its pixels.

    Attributes:
        id: SHA-256 of the bytes, hex.
        uri: Where the kept copy came from.
        width: Upright, px.
        height: Upright, px.
        format: As Pillow spells it, e.g. ``"JPEG"``.
        labels: Label ids; one entry when there is one label.
        metadata: Columns of the source, strings; absent ones are left out.
    """

    id: str
    uri: str
    width: int
    height: int
    format: str
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    schema: int = CORPUS_SCHEMA

    def to_json(self) -> dict[str, Any]:
        """JSON values, for ``from_json``."""
        return {**vars(self), "labels": list(self.labels), "metadata": dict(self.metadata)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sample:
        """The sample that ``to_json`` wrote."""
        return cls(**{**value, "labels": tuple(value["labels"])})

    def split(self, fractions: Mapping[str, float], seed: int = 0) -> str:
        """The sample's split: the source's own where it names one, else by content hash."""
        return self.metadata.get("split") or split_of(self.id, fractions, seed)


@dataclass(frozen=True)
class ShardManifest:
    """What a corpus is made of.

    Attributes:
        path: The corpus folder.
        images: Distinct images, one row each.
        duplicates: Further uris of images that were kept under another uri.
        quarantined: Items that are no usable image.
        uris_in: Everything that was listed: images + duplicates + quarantined.
        digest: Of the images, their labels and metadata; independent of order, place and shards.
        columns: Metadata columns of every shard.
        shards: ``path`` (relative), ``rows``, ``bytes``, ``sha256`` of each.
        sources: What was ingested, as given.
        settings: Digest of the settings that the corpus was made with.
        files: ``rows``, ``bytes``, ``sha256`` of the other files, by name.
        skipped_special: Links, devices and the like in the sources: no regular files.
        metadata_unmatched: Rows of metadata files that name no item.
    """

    path: Path
    images: int
    duplicates: int
    quarantined: int
    uris_in: int
    digest: str
    columns: tuple[str, ...]
    shards: tuple[Mapping[str, Any], ...]
    sources: tuple[str, ...]
    settings: str = ""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skipped_special: int = 0
    metadata_unmatched: int = 0
    schema: int = CORPUS_SCHEMA

    def to_json(self) -> dict[str, Any]:
        """JSON values without the path, with the digest of the rest as ``manifest_sha256``."""
        value = {key: item for key, item in vars(self).items() if key != "path"}
        value |= {
            "columns": list(self.columns),
            "shards": [dict(shard) for shard in self.shards],
            "sources": list(self.sources),
            "files": {name: dict(entry) for name, entry in self.files.items()},
        }
        return {**value, "manifest_sha256": digest_json(value)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], path: Path) -> ShardManifest:
        """The manifest that ``to_json`` wrote.

        Raises:
            TypeError, KeyError: It is none.
        """
        rest = {key: item for key, item in value.items() if key != "manifest_sha256"}
        return cls(
            **{
                **rest,
                "path": path,
                "columns": tuple(rest["columns"]),
                "shards": tuple(rest["shards"]),
                "sources": tuple(rest["sources"]),
            }
        )

    def shard_path(self, shard: Mapping[str, Any]) -> Path:
        """The file of a shard."""
        return self.path / str(shard["path"])


def is_corpus(path: str | Path) -> bool:
    """Whether a folder holds a finished corpus."""
    return "://" not in str(path) and (Path(path) / MANIFEST).is_file()


def open_corpus(path: str | Path) -> ShardManifest:
    """Opens a corpus: its manifest is checked, and that every file it lists is there with its size.

    Raises:
        ArtifactError: There is none, it is of a newer schema, was changed, or lacks a file.
    """
    home = Path(str(path).removeprefix("file://"))
    value = _read_manifest(home)
    try:
        corpus = ShardManifest.from_json(value, home)
        expected = digest_json({key: item for key, item in value.items() if key != "manifest_sha256"})
        if value.get("manifest_sha256") != expected:
            raise ArtifactError(
                f"{home / MANIFEST} was changed after it was written",
                expected=f"sha256 {str(value.get('manifest_sha256'))[:16]}..., seen {expected[:16]}...",
                fix="get the corpus again, or ingest into another --out",
            )
    except (TypeError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"{home / MANIFEST} is no corpus manifest: {error}",
            expected="the --out folder of a finished `eagleray ingest`",
            fix="check the path",
        ) from None
    for entry in (*corpus.shards, *({"path": name, **entry} for name, entry in corpus.files.items())):
        _check_file(home / entry["path"], entry)
    return corpus


def _read_manifest(home: Path) -> dict[str, Any]:
    try:
        value = storage.read_json(home / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        is_unfinished = (home / "_ingest").is_dir()
        raise ArtifactError(
            f"{home} holds {'an unfinished corpus' if is_unfinished else 'no corpus'} (no {MANIFEST})",
            expected="the --out folder of a finished `eagleray ingest`",
            fix="run the same ingest command again: it resumes" if is_unfinished else "check the path",
        ) from None
    except ValueError as error:
        raise ArtifactError(
            f"{home / MANIFEST} is not JSON: {error}", expected="a manifest as written", fix="get the corpus again"
        ) from None
    schema = value.get("schema", 0) if isinstance(value, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise ArtifactError(
            f"{home / MANIFEST} has no schema number",
            expected="the --out folder of a finished `eagleray ingest`",
            fix="check the path",
        )
    if schema > CORPUS_SCHEMA:
        raise ArtifactError(
            f"{home / MANIFEST} has schema {schema}",
            expected=f"schema {CORPUS_SCHEMA} or older",
            fix="use the eagleray that wrote it, or a newer one",
        )
    return value  # type: ignore[no-any-return]


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
        raise ArtifactError(
            f"{path} is {'missing' if size is None else f'{size} bytes'}",
            expected=f"{entry['bytes']} bytes as {MANIFEST} lists",
            fix="get the corpus again, or ingest into another --out",
        )


def verify(corpus: ShardManifest) -> None:
    """Reads every file that the manifest lists and compares its digest.

    Raises:
        ArtifactError: One differs; the message names it.
    """
    listed = [*corpus.shards, *({"path": name, **entry} for name, entry in corpus.files.items())]
    for entry in listed:
        path = corpus.path / entry["path"]
        _check_file(path, entry)
        seen = storage.sha256_file(path)
        if seen != entry["sha256"]:
            raise ArtifactError(
                f"{path} was changed after it was written",
                expected=f"sha256 {entry['sha256'][:16]}..., seen {seen[:16]}...",
                fix="get the corpus again, or ingest into another --out",
            )


def read_rows(
    shard_path: str | Path,
    first_row_group: int = 0,
    num_row_groups: int | None = None,
    *,
    columns: tuple[str, ...] = ("id", "uri", "image"),
) -> pa.Table:
    """Some row groups of a shard.

    Args:
        shard_path: The shard's file.
        first_row_group: From 0.
        num_row_groups: How many; None for all that follow.
        columns: Of the shard.

    Returns:
        A table of at most 256 rows and about 32 MiB of images for each row group.
    """
    with pq.ParquetFile(shard_path, pre_buffer=False) as file:
        count = file.metadata.num_row_groups
        end = count if num_row_groups is None else min(count, first_row_group + num_row_groups)
        return file.read_row_groups(list(range(first_row_group, end)), columns=list(columns), use_threads=False)


def uris_by_id(corpus: ShardManifest) -> pa.Table:
    """The further uris of images with exact duplicates: ``id``, ``uri``, ``labels``, sorted by id and uri."""
    return pq.read_table(corpus.path / DUPLICATES, schema=DUPLICATES_SCHEMA)


def samples(corpus: ShardManifest) -> Iterator[Sample]:
    """Every image of a corpus, without its pixels, shard by shard."""
    names = ("id", "uri", "width", "height", "format", "labels", *corpus.columns)
    for shard in corpus.shards:
        with pq.ParquetFile(corpus.shard_path(shard), pre_buffer=False) as file:
            for batch in file.iter_batches(columns=list(names)):
                for row in batch.to_pylist():
                    metadata = {name: row.pop(name) for name in corpus.columns}
                    known = {key: text for key, text in metadata.items() if text is not None}
                    yield Sample(**{**row, "labels": tuple(row["labels"] or ())}, metadata=known)


def split_of(image_id: str, fractions: Mapping[str, float], seed: int = 0) -> str:
    """The split of an image by its content, so that an image and its exact duplicate never straddle two.

    The hash of seed and id is a point in [0, 1); the splits are intervals of it in the order given. Adding images moves
    none of those already there.

    Args:
        image_id: SHA-256 of the bytes, hex.
        fractions: Split name to its share; they sum to 1.
        seed: Another seed is another, independent draw.

    Raises:
        ConfigError: The fractions are negative or do not sum to 1.
    """
    if not fractions or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > SPLITS_SUM_TOLERANCE:
        raise ConfigError(
            f"splits {dict(fractions)}", expected="shares that sum to 1, e.g. train 0.8, test 0.2", fix="mend splits"
        )
    point = int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:8], "big") / 2**64
    edge = 0.0
    for name, share in fractions.items():
        edge += share
        if point < edge:
            return name
    return [name for name, share in fractions.items() if share > 0][-1]  # the shares sum to a hair less than 1


def row_hash(image_id: str, labels: tuple[str, ...], metadata: Mapping[str, str]) -> bytes:
    """SHA-256 of what a corpus says about one image; the corpus digest is that of these, sorted."""
    value = CANONICAL.encode([image_id, list(labels), dict(metadata)])
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest()


def corpus_digest(row_hashes: bytes) -> str:
    """The digest of a corpus.

    Args:
        row_hashes: ``row_hash`` of every image, one after the other, in any order.
    """
    import numpy as np

    values = np.sort(np.frombuffer(row_hashes, dtype="S32")).tobytes()
    return hashlib.sha256(b"eagleray-corpus-v1\n" + values).hexdigest()
